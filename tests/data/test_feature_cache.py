"""The feature cache: what it keeps, when it computes anew, and what it stands."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from clips import greys, render
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import files_of, tiny_model, tiny_processor

from vidprism_hf.data import ClipAugmentation, ClipDataset, ClipReader, DataError, FileTable, normalize_clips
from vidprism_hf.data.features import cache as module
from vidprism_hf.data.features import shards as feature_shards
from vidprism_hf.data.features.cache import FeatureCache, parse_size
from vidprism_hf.data.features.encoder import FrameEncoder, tower_digest
from vidprism_hf.data.fetch import contents
from vidprism_hf.model import VideoDecodeError, decode_video

LABELS = [0, 1, 0, 1, 0]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def table(tmp_path):
    """Five clips of two labels."""
    names = [f"{index}.mp4" for index in range(len(LABELS))]
    for index, name in enumerate(names):
        render(tmp_path / "clips" / name, greys(12 + index))
    return FileTable.from_lists(tmp_path / "clips", names, LABELS)


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "clips").mkdir()
    return tmp_path / "cache"


class Tower:
    """A real tower that counts its clips."""

    def __init__(self, model, digest="tower", precision="32-true"):
        self.model, self.clips, self.lock = model, 0, threading.Lock()
        self.encoder = FrameEncoder(digest, precision, self.encode)

    @torch.no_grad()
    def encode(self, pixels):
        with self.lock:
            self.clips += len(pixels)
        return self.model.vidprism.get_frame_features(normalize_clips(pixels, tiny_processor()))


def training(table, views=2, seed=0, processor=None, stride=None, **augmentation):
    reader = ClipReader(
        processor or tiny_processor(), ClipAugmentation((32, 32), **augmentation), frame_stride=stride, seed=seed
    )
    return ClipDataset(table, reader, views)


def evaluation(table, clips=1, crops=1, processor=None):
    return ClipDataset(table, ClipReader(processor or tiny_processor(), num_clips=clips, num_crops=crops))


def cached(folder, tower, clips, limit="1GB", **more):
    """The clips with features."""
    return FeatureCache(folder, limit, tower.encoder, batch_size=4, **more).cached({"part": clips})["part"]


def rows(clips, views=2):
    return torch.stack([clips[view, index]["frame_features"] for view in range(views) for index in range(len(clips))])


def fail(error):
    raise error


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.fixture
def no_videos(monkeypatch):
    """From when it is called, clips can no longer be decoded."""

    def call(*args, **kwargs):
        raise AssertionError("a video was decoded")

    return lambda: monkeypatch.setattr("vidprism_hf.data.loading.dataset.decode_video", call)


# --- what it keeps


@pytest.mark.parametrize("workers", [0, 1])
def test_features_are_the_towers_own_and_computed_once(table, folder, model, no_videos, workers):
    tower, clips = Tower(model), training(table)
    first = cached(folder, tower, clips, num_workers=workers)
    assert tower.clips == 2 * len(table) + 1  # and a clip of zeros
    for view in range(2):
        expected = tower.encode(torch.stack([clips[view, index]["pixel_values_videos"] for index in range(len(table))]))
        torch.testing.assert_close(rows(first)[len(table) * view :][: len(table)], expected, rtol=1e-5, atol=1e-6)
    no_videos()
    tower = Tower(model)
    again = cached(folder, tower, training(table))
    assert tower.clips == 0
    assert torch.equal(rows(again), rows(first))


def test_views_of_an_evaluation(table, folder, model):
    tower, clips = Tower(model), evaluation(table, clips=2, crops=3)
    items = cached(folder, tower, clips)
    expected = tower.encode(clips[3]["pixel_values_videos"])
    assert items[3]["frame_features"].shape == (6, 8, 64)
    torch.testing.assert_close(items[3]["frame_features"], expected, rtol=1e-5, atol=1e-6)


def test_other_views_of_a_selection_are_there(table, folder, model):
    """Of a few-shot draw or another fold, in which clips have other indices."""
    whole = cached(folder, Tower(model), training(table))
    tower = Tower(model)
    chosen = cached(folder, tower, training(table.select([4, 2])))
    assert tower.clips == 0
    assert torch.equal(rows(chosen, 1), rows(whole, 1)[[4, 2]])


def test_rows_that_hold_videos(table, folder, model):
    """A dataset of the Hub: the bytes count, not where they are."""

    class Rows(FileTable):
        def video(self, index):
            return Path(super().video(index)).read_bytes()

    files = cached(folder, Tower(model), evaluation(table))
    tower = Tower(model)
    assert torch.equal(rows(cached(folder, tower, evaluation(Rows(**vars(table)))), 1), rows(files, 1))
    assert tower.clips == 0


def test_features_in_half_precision(table, folder, model):
    tower = Tower(model, precision="bf16-mixed")
    encode = tower.encode
    tower.encoder = dataclasses.replace(tower.encoder, encode=lambda pixels: encode(pixels).bfloat16())
    assert cached(folder, tower, training(table))[0]["frame_features"].dtype == torch.bfloat16


# --- when it computes anew


def other_mean():
    processor = tiny_processor()
    processor.image_mean = (0.5, 0.5, 0.5)
    return processor


def more_frames():
    processor = tiny_processor()
    processor.num_frames = 4
    return processor


CHANGES = {
    "seed": ({"seed": 1}, {}),
    "augmentation": ({"grayscale": 0.5}, {}),
    "stride": ({"stride": 2}, {}),
    "mean": ({"processor": other_mean}, {}),
    "frames": ({"processor": more_frames}, {}),
    "weights": ({}, {"digest": "other"}),
    "precision": ({}, {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_computed_anew(table, folder, model, change):
    cached(folder, Tower(model), training(table, views=1))
    of_clips, of_tower = CHANGES[change]
    of_clips = {name: value() if callable(value) else value for name, value in of_clips.items()}
    tower = Tower(model, **of_tower)
    cached(folder, tower, training(table, views=1, **of_clips))
    assert tower.clips >= len(table)
    tower = Tower(model)
    cached(folder, tower, training(table, views=1))  # the old ones are still there
    assert tower.clips == 0


def test_one_more_view_is_all_that_is_computed(table, folder, model):
    cached(folder, Tower(model), training(table, views=2))
    tower = Tower(model)
    cached(folder, tower, training(table, views=3))
    assert tower.clips == len(table)


def test_evaluations_in_other_views_are_kept_apart(table, folder, model):
    # Of the clip of zeros there are as many views as of the others.
    for clips, computed in ((evaluation(table), 6), (evaluation(table, clips=2), 12), (evaluation(table), 0)):
        tower = Tower(model)
        cached(folder, tower, clips)
        assert tower.clips == computed


def test_the_digest_follows_from_weights_and_architecture(model):
    def digest(model):
        return tower_digest(model.vidprism.vision_tower, model.config.vision_config)

    assert digest(tiny_model()) == digest(model)
    assert digest(tiny_model(seed=1)) != digest(model)
    assert digest(tiny_model().bfloat16()) != digest(model)
    moved = tiny_model()
    moved.config.vision_config.layer_norm_eps = 1e-6
    assert digest(moved) != digest(model)
    changed = tiny_model()
    with torch.no_grad():
        changed.vidprism.vision_tower.visual_projection.weight[0, 0] += 1e-6
    assert digest(changed) != digest(model)


@pytest.mark.parametrize("settled", [0, 3 * 10**9])
def test_a_clip_with_other_content_under_the_same_name(table, folder, model, monkeypatch, settled):
    """Also where size and modification time say that nothing has changed."""
    monkeypatch.setattr(contents, "SETTLED_NS", settled)
    before = rows(cached(folder, Tower(model), evaluation(table)), 1)
    path = Path(table.video(1))
    stat, content = path.stat(), bytearray(path.read_bytes())
    other = render(path.with_name("other.mp4"), greys(13)[::-1]).read_bytes()
    content = other[: len(content)].ljust(len(content), b"\0")
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    tower = Tower(model)
    after = rows(cached(folder, tower, evaluation(table)), 1)
    assert tower.clips == 1
    changed = [index for index in range(len(table)) if not torch.equal(before[index], after[index])]
    assert changed == [1]


def test_untouched_files_are_not_read(table, folder, model, monkeypatch):
    monkeypatch.setattr(contents, "SETTLED_NS", -(10**12))
    cached(folder, Tower(model), evaluation(table))
    monkeypatch.setattr(contents, "file_hash", lambda path: pytest.fail("a clip was read"))
    cached(folder, Tower(model), evaluation(table))


def test_a_memo_that_is_damaged_costs_time_only(table, folder, model):
    first = rows(cached(folder, Tower(model), evaluation(table)), 1)
    for text in ("{", "[]", json.dumps({table.video(0): 7, table.video(1): [1, 2]})):
        (folder / "contents.json").write_text(text)
        tower = Tower(model)
        assert torch.equal(rows(cached(folder, tower, evaluation(table)), 1), first)
        assert tower.clips == 0


def test_a_clip_that_changes_while_it_is_read_is_bad(table, folder, model, monkeypatch):
    monkeypatch.setattr("vidprism_hf.data.features.split.signature", lambda path: None)
    items = cached(folder, Tower(model), evaluation(table))
    assert items[0]["bad_clips"] == [("0.mp4", 0, "changes while it is read")]
    assert not items[0]["readable"]


# --- what it stands


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(table, folder, model, where, bit):
    first = rows(cached(folder, Tower(model), evaluation(table)), 1)
    (shard,) = shards(folder)
    content = bytearray(shard.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    shard.write_bytes(content)
    tower = Tower(model)
    with pytest.warns(UserWarning, match=rf"{shard.name} is damaged; its rows will be recomputed"):
        again = cached(folder, tower, evaluation(table))
    assert tower.clips == len(table) + 1
    assert torch.equal(rows(again, 1), first)


@pytest.mark.parametrize("size", [0, 100])
def test_a_shard_that_is_cut_off_is_found(table, folder, model, size):
    first = rows(cached(folder, Tower(model), evaluation(table)), 1)
    (shard,) = shards(folder)
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.warns(UserWarning, match="is damaged"):
        assert torch.equal(rows(cached(folder, Tower(model), evaluation(table)), 1), first)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(13, "Permission denied")])
@pytest.mark.parametrize("where", ["_keys", "file_hash"])
def test_a_shard_that_cannot_be_read_is_kept(table, folder, model, monkeypatch, error, where):
    cached(folder, Tower(model), evaluation(table))
    (shard,) = shards(folder)
    content = shard.read_bytes()
    monkeypatch.setattr(feature_shards, where, lambda path: fail(error))
    with pytest.raises(DataError, match=rf"{shard}: cannot be read \({error.strerror}\); check the disk"):
        cached(folder, Tower(model), evaluation(table))
    assert shard.read_bytes() == content


def test_a_shard_that_another_process_has_removed_is_no_damaged_one(table, folder, model, monkeypatch, recwarn):
    first = rows(cached(folder, Tower(model), evaluation(table)), 1)
    (shard,) = shards(folder)
    monkeypatch.setattr(feature_shards, "file_hash", lambda path: shard.unlink() or fail(FileNotFoundError(2, "gone")))
    tower = Tower(model)
    assert torch.equal(rows(cached(folder, tower, evaluation(table)), 1), first)
    assert tower.clips == len(table) + 1
    assert not [warning for warning in recwarn if "damaged" in str(warning.message)]


def test_only_shards_with_rows_that_are_needed_are_read(table, folder, model, monkeypatch):
    monkeypatch.setattr(module, "SHARD_SECONDS", 0.0)
    FeatureCache(folder, "1GB", Tower(model).encoder, batch_size=1).cached({"part": evaluation(table)})
    assert len(shards(folder)) == len(table)
    whole, read = feature_shards.file_hash, []
    monkeypatch.setattr(feature_shards, "file_hash", lambda path: read.append(path.name) or whole(path))
    tower = Tower(model)
    drawn = cached(folder, tower, evaluation(table.select([4, 2])))
    assert tower.clips == 0
    assert len(read) == 3  # theirs, and that of the clip of zeros
    assert torch.equal(rows(drawn, 1), rows(cached(folder, tower, evaluation(table)), 1)[[4, 2]])


@pytest.mark.parametrize("workers", [0, 1])
def test_it_may_be_stopped_between_shards(table, folder, model, monkeypatch, workers):
    monkeypatch.setattr(module, "SHARD_SECONDS", 0.0)
    calls = []

    def stop():
        calls.append(len(shards(folder)))
        if len(calls) == 2:
            raise SystemExit(143)

    with pytest.raises(SystemExit) as ended:
        cached(folder, Tower(model), training(table), num_workers=workers, between_shards=stop)
    assert ended.value.code == 143
    assert calls == [1, 2]
    assert not list(folder.rglob(".*.tmp"))
    tower = Tower(model)
    resumed = rows(cached(folder, tower, training(table)))
    assert tower.clips == 2  # ten rows in batches of four
    fresh = rows(cached(folder.with_name("fresh"), Tower(model), training(table)))
    torch.testing.assert_close(resumed, fresh, rtol=1e-5, atol=1e-6)


def test_it_may_be_stopped_while_another_run_fills_the_folder(table, folder, model, monkeypatch):
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.05)
    folder.mkdir()
    with module.FileLock(folder / ".lock"), pytest.raises(SystemExit):
        cached(folder, Tower(model), evaluation(table), between_shards=lambda: fail(SystemExit(138)))
    cached(folder, Tower(model), evaluation(table))


@pytest.mark.parametrize("locked", [True, False])
def test_runs_fill_it_at_the_same_time(table, folder, model, locked, monkeypatch):
    monkeypatch.setattr(module, "SHARD_SECONDS", 0.0)
    if not locked:  # as on a file system without locks
        monkeypatch.setattr(module, "FileLock", lambda path: contextlib.nullcontext(path))
        monkeypatch.setattr(FeatureCache, "_acquire", lambda *_: None)
        monkeypatch.setattr(contextlib.nullcontext, "release", lambda self: None, raising=False)
    # Evaluation, since augmentation in threads would share the generator of its random numbers.
    tower, found = Tower(model), [None] * 3

    def run(number):
        found[number] = rows(cached(folder, tower, evaluation(table)), 1)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    if locked:
        assert tower.clips == len(table) + 1
    tower = Tower(model)
    assert torch.equal(rows(cached(folder, tower, evaluation(table)), 1), found[0])
    assert tower.clips == 0


KILLED = """
import os, signal, sys
sys.path[:0] = {tests!r}
import test_feature_cache as test
from vidprism_hf.data import FileTable
from vidprism_hf.data.features import cache as feature_cache

feature_cache.SHARD_SECONDS = 0.0
replace, count = os.replace, 0

def killing(source, target):
    global count
    count += str(target).endswith(".safetensors")
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = killing
table = FileTable.from_lists({clips!r}, [f"{{index}}.mp4" for index in range(5)], test.LABELS)
test.cached(test.Path({folder!r}), test.Tower(test.tiny_model()), test.training(table))
"""


@pytest.mark.slow
def test_a_killed_process_loses_the_shard_that_it_was_writing(table, folder, model):
    tests = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = KILLED.format(tests=tests, clips=table.origin, folder=str(folder))
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert finished.returncode == -9, finished.stderr
    # Ten rows in batches of four: the third shard was being written.
    assert len(shards(folder)) == 2
    assert len(list(folder.rglob(".*.tmp"))) == 1
    tower = Tower(model)
    resumed = cached(folder, tower, training(table))
    assert tower.clips == 2
    fresh = cached(folder.with_name("fresh"), Tower(model), training(table))
    torch.testing.assert_close(rows(resumed), rows(fresh), rtol=1e-5, atol=1e-6)


def test_a_bad_clip_of_a_training_without_augmentation_gives_way(table, folder, model):
    Path(table.video(2)).write_bytes(b"no video")
    clips = ClipDataset(table, ClipReader(tiny_processor()), training=True)
    parts = {"train": clips, "val": evaluation(table)}
    train, val = FeatureCache(folder, "1GB", Tower(model).encoder, batch_size=4).cached(parts).values()
    item, lost = train[3, 2], val[2]
    assert (item["readable"], item["labels"], item["clip_index"]) == (True, 0, clips[3, 2]["clip_index"])
    assert torch.equal(item["frame_features"], val[item["clip_index"]]["frame_features"])
    assert (lost["readable"], lost["clip_index"]) == (False, 2)
    assert item["bad_clips"] == lost["bad_clips"]
    assert len(list(folder.glob("*-*/"))) == 1  # both have the evaluation's rows


def test_bad_clips_are_as_without_it(table, folder, model):
    Path(table.video(2)).write_bytes(b"no video")
    Path(table.video(3)).unlink()
    for clips, epochs in ((training(table), range(4)), (evaluation(table), range(1))):
        items = cached(folder, Tower(model), clips)
        for key in [(epoch, index) for epoch in epochs for index in range(len(table))]:
            one, two = clips[key], items[key]
            assert two.pop("frame_features").shape == (8, 64)
            assert one.pop("pixel_values_videos").shape == (8, 3, 32, 32)
            assert one == two
        tower = Tower(model)
        cached(folder, tower, clips)
        assert tower.clips == 0


@pytest.mark.parametrize("make", [training, evaluation])
def test_what_is_known_to_be_bad_is_not_tried_again(table, folder, model, no_videos, monkeypatch, make):
    """The folder may be read-only: nothing is locked or written."""
    Path(table.video(2)).write_bytes(b"no video")
    first = cached(folder, Tower(model), make(table))
    before = files_of(folder)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    no_videos()
    monkeypatch.setattr(module, "FileLock", refuse)
    monkeypatch.setattr(contents, "FileLock", refuse)
    again = cached(folder, Tower(model), make(table))
    assert files_of(folder) == before
    for index in range(len(table)):
        one, two = first[index], again[index]
        assert torch.equal(one.pop("frame_features"), two.pop("frame_features"))
        assert one == two
    ((name, label, cause),) = again[2]["bad_clips"]
    assert (name, label) == ("2.mp4", 0)
    assert cause.startswith("is not a video")
    with pytest.raises(DataError, match=r"cannot be used \(Permission denied\)"):
        cached(folder, Tower(model, digest="other"), make(table))


def test_known_bad_content_that_is_mended(table, folder, model):
    whole = Path(table.video(2)).read_bytes()
    Path(table.video(2)).write_bytes(b"no video")
    assert not cached(folder, Tower(model), evaluation(table))[2]["readable"]
    Path(table.video(2)).write_bytes(whole)
    tower = Tower(model)
    assert cached(folder, tower, evaluation(table))[2]["readable"]
    assert tower.clips == 1


@pytest.mark.parametrize("passing", ["time", "disk", "decoder"])
def test_what_may_be_otherwise_next_time_is_tried_again(table, folder, model, monkeypatch, passing):
    decode = decode_video

    def failing(video, *args, **kwargs):
        if video != table.video(2):
            return decode(video, *args, **kwargs)
        if passing == "time":
            time.sleep(1.1)
        try:
            raise ValueError if passing != "disk" else OSError(5, "Input/output error")
        except (ValueError, OSError) as error:
            raise VideoDecodeError(f"{video}: bad", video, "bad") from error

    clips = evaluation(table)
    clips.reader.time_limit = 1.0
    with monkeypatch.context() as patch:
        patch.setattr("vidprism_hf.data.loading.dataset.decode_video", failing)
        assert cached(folder, Tower(model), clips)[2]["bad_clips"] == [("2.mp4", 0, "bad")]
    if passing == "decoder":
        tower = Tower(model)
        assert not cached(folder, tower, evaluation(table))[2]["readable"]
        assert tower.clips == 0
        monkeypatch.setattr("vidprism_hf.data.features.split.DECODER", "another")
    tower = Tower(model)
    assert cached(folder, tower, evaluation(table))[2]["readable"]
    assert tower.clips == 1


def test_an_unreadable_clip_has_the_features_of_zeros(table, folder, model):
    Path(table.video(2)).write_bytes(b"no video")
    tower = Tower(model)
    item = cached(folder, tower, evaluation(table))[2]
    zeros = tower.encode(torch.zeros(1, 8, 3, 32, 32, dtype=torch.uint8))[0]
    assert torch.equal(item["frame_features"], zeros)


# --- limits and folders


def test_the_size_is_told_and_bounded(table, folder, model):
    said = "5 clips x 2 views x 8 frames x 64 x 4 bytes = 20.48 KB, 10 of 10 rows to compute"
    with pytest.raises(DataError, match=rf"data\.feature_cache_limit=20KB: too little for part {said}"):
        cached(folder, Tower(model), training(table), limit="20KB")
    assert shards(folder) == []
    cached(folder, Tower(model), training(table), limit="21KB")
    cached(folder, Tower(model), training(table), limit="1KB")  # there is nothing to add
    with pytest.raises(DataError, match=r"20\.48 KB to be added to 2\d\.\d* KB"):
        cached(folder, Tower(model), training(table, seed=1), limit="30KB")


def test_the_disk_must_have_room(table, folder, model, monkeypatch):
    usage = module.shutil.disk_usage(table.origin)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"but 1 KB of disk free; make room"):
        cached(folder, Tower(model), training(table))


def test_a_folder_that_is_none(table, folder, model):
    folder.write_text("a file")
    with pytest.raises(DataError, match=rf"data\.feature_cache {folder}: cannot be used"):
        cached(folder, Tower(model), training(table))


def test_clips_at_an_address(folder, model):
    table = FileTable.from_lists("https://example.org", ["a.mp4"], [0])
    with pytest.raises(DataError, match="may change unnoticed; download it"):
        cached(folder, Tower(model), evaluation(table))


@pytest.mark.parametrize(
    ("text", "size"), [("50GB", 50 * 10**9), ("1.5 mb", 1500000), (7, 7), ("2TB", 2 * 10**12), ("12B", 12)]
)
def test_sizes(text, size):
    assert parse_size(text) == size
