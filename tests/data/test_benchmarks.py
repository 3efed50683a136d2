"""The four benchmarks at toy size: local copies, downloads that resume, counts, missing clips, the manifest."""

import dataclasses
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from benchmark_layouts import CLASSES, REPOSITORIES, clip_bytes, local_copy, published, toy
from hub_server import Hub
from small import files_of
from web_server import serve_folder

from vidprism_hf.data import benchmark_parts, download
from vidprism_hf.data.benchmarks import BENCHMARKS, benchmark_splits, prepare
from vidprism_hf.data.tables import DataError
from vidprism_hf.model.video_decoding_vidprism import decode_video

NAMES = tuple(BENCHMARKS)
LABELS = {name: {n: label.replace("[", "").replace("]", "") for n, label in enumerate(CLASSES[name])} for name in NAMES}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No pauses, and no address that a test has not set up."""
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


def names_of(table):
    return [table.name(index) for index in range(len(table))]


def offline(name, **counts):
    """A toy benchmark that nothing can be fetched for: port 9 is closed."""
    return toy(name, address="http://127.0.0.1:9", **counts)


@pytest.mark.parametrize("name", NAMES)
def test_a_local_copy_is_used_as_it_is(name, tmp_path):
    folder = local_copy(name, tmp_path)
    before = files_of(folder)
    splits = benchmark_splits(offline(name), tmp_path)
    assert splits.id2label == LABELS[name]
    assert [len(splits.train), len(splits.val)] == [4, 2]
    assert splits.train.labels.tolist() == [0, 0, 1, 1]
    assert splits.val.labels.tolist() == [0, 1]
    assert splits.notes == ()
    assert splits.missing == {}
    for table in (splits.train, splits.val):
        for index, label in enumerate(table.labels):
            with open(table.video(index), "rb") as file:
                assert file.read() == clip_bytes(os.path.splitext(table.name(index))[1], label)
    assert not set(names_of(splits.train)) & set(names_of(splits.val))
    after = files_of(folder)
    assert json.loads(after.pop("manifest.json"))["sources"] == dict.fromkeys(BENCHMARKS[name].parts, "local copy")
    assert after == before


def test_clips_decode_and_have_their_class(tmp_path):
    for name in NAMES:
        local_copy(name, tmp_path)
        splits = benchmark_splits(offline(name), tmp_path)
        for index, label in enumerate(splits.train.labels):
            frames = decode_video(splits.train.video(index), lambda count: [0, count - 1])[0].astype(int)
            assert (frames[1].mean() > frames[0].mean()) == (label == 0)


def test_names_are_those_of_the_official_lists(tmp_path):
    # Few-shot lists and seeds speak of these names: they must not depend on the folders around the clips.
    for name, first in (("ucf101", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"), ("ssv2", "1000.webm")):
        local_copy(name, tmp_path)
        assert benchmark_splits(offline(name), tmp_path).train.name(0) == first


@pytest.mark.parametrize("name", NAMES)
def test_other_layouts_of_local_copies(name, tmp_path):
    folder = local_copy(name, tmp_path)
    if name in ("ucf101", "hmdb51"):  # class folders directly below
        for path in (folder / ("UCF-101" if name == "ucf101" else "hmdb51_org")).iterdir():
            path.rename(folder / path.name)
    elif name == "k400":  # flat files, lists at the top, a part of the archives
        for split in ("train", "val"):
            for path in list((folder / split).glob("*/*")):
                path.rename(folder / split / path.name)
            for path in list((folder / split).iterdir()):
                if path.is_dir():
                    path.rmdir()
            (folder / f"annotations/{split}.csv").rename(folder / ("train.csv" if split == "train" else "validate.csv"))
    else:  # the names of the official download, and clips that were converted
        for path in list((folder / "labels").iterdir()):
            path.rename(folder / f"something-something-v2-{path.name}")
        for path in list((folder / "20bn-something-something-v2").iterdir()):
            path.rename(path.with_suffix(".mp4"))
    splits = benchmark_splits(offline(name), tmp_path)
    assert [len(splits.train), len(splits.val), splits.notes] == [4, 2, ()]
    assert splits.id2label == LABELS[name]


@pytest.mark.parametrize("name", ["ucf101", "hmdb51", "ssv2"])
def test_fetch_from_the_hub(name, tmp_path, hub):
    repository = hub.add_dataset(REPOSITORIES[name], published(name, tmp_path / "hub"))
    benchmark = toy(name, address=hub.url)
    manifest = prepare(benchmark, tmp_path / "data")
    origin = f"hf://datasets/{REPOSITORIES[name]}@{repository.commit('main').oid}"
    assert manifest.sources == {"lists": origin, "clips": origin}
    folder = tmp_path / "data" / name
    assert not (folder / "downloads").exists()
    assert not any(b"not to be fetched" in content for content in files_of(folder).values())
    split = manifest.splits["1"]
    assert split["train"] == {"expected": 4, "listed": 4, "found": 4, "missing": 0}
    assert split["classes"] == 2
    local_copy(name, tmp_path / "copy")
    fetched, copied = (benchmark_splits(benchmark, tmp_path / place) for place in ("data", "copy"))
    for one, other in ((fetched.train, copied.train), (fetched.val, copied.val)):
        assert names_of(one) == names_of(other)
        assert one.labels.tolist() == other.labels.tolist()
    assert fetched.id2label == copied.id2label


def test_fetch_k400_from_the_web(tmp_path):
    published("k400", tmp_path / "web")
    with serve_folder(tmp_path / "web") as site:
        manifest = prepare(toy("k400", address=site.url), tmp_path / "data")
    base = f"{site.url}/kinetics/400/"
    assert manifest.sources == {"lists": f"{base}annotations/", "val": f"{base}val/", "train": f"{base}train/"}
    splits = benchmark_splits(offline("k400"), tmp_path / "data")
    assert [len(splits.train), len(splits.val)] == [4, 2]
    # The corrupt clip was replaced.
    for index, label in enumerate(splits.train.labels):
        with open(splits.train.video(index), "rb") as file:
            assert file.read() == clip_bytes(".mp4", label)
    assert not list((tmp_path / "data").rglob("*.gz"))
    assert not (tmp_path / "data/k400/downloads").exists()


@pytest.mark.parametrize("name", ["ucf101", "hmdb51", "ssv2"])
def test_the_second_call_asks_nobody_and_writes_nothing(name, tmp_path, hub):
    hub.add_dataset(REPOSITORIES[name], published(name, tmp_path / "hub"))
    benchmark = toy(name, address=hub.url)
    first = prepare(benchmark, tmp_path)
    asked, files = len(hub.requests), files_of(tmp_path / name)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / name).rglob("*")}
    assert prepare(benchmark, tmp_path) == first
    assert len(hub.requests) == asked
    assert files_of(tmp_path / name) == files
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / name).rglob("*")} == times


def test_only_what_is_missing_is_fetched(tmp_path, hub):
    hub.add_dataset(REPOSITORIES["ucf101"], published("ucf101", tmp_path / "hub"))
    folder = local_copy("ucf101", tmp_path)
    shutil.rmtree(folder / "ucfTrainTestlist")
    manifest = prepare(toy("ucf101", address=hub.url), tmp_path)
    assert manifest.sources["clips"] == "local copy"
    assert manifest.sources["lists"].startswith("hf://")
    assert not [entry.path for entry in hub.requests if "UCF-101.zip" in entry.path]


def test_only_the_missing_split_of_k400_is_fetched(tmp_path):
    published("k400", tmp_path / "web")
    folder = local_copy("k400", tmp_path)
    shutil.rmtree(folder / "val")
    with serve_folder(tmp_path / "web") as site:
        splits = benchmark_splits(toy("k400", address=site.url), tmp_path)
    assert [len(splits.train), len(splits.val)] == [4, 2]
    assert {path.split("/")[3] for _, path, _ in site.requests} == {"val"}


@pytest.mark.parametrize("name", ["ucf101", "ssv2"])
def test_archives_that_a_person_has_are_unpacked_and_kept(name, tmp_path):
    folder = published(name, tmp_path / name)
    archives = {path: content for path, content in files_of(folder).items() if not path.endswith((".md", ".json"))}
    benchmark = offline(name)
    splits = benchmark_splits(benchmark, tmp_path)
    assert [len(splits.train), len(splits.val)] == [4, 2]
    assert archives.items() <= files_of(folder).items()
    assert prepare(benchmark, tmp_path).sources["clips"] == "local archives"


def test_k400_archives_that_a_person_has_are_used(tmp_path):
    published("k400", tmp_path / "web")
    shutil.copytree(tmp_path / "web/kinetics/400/annotations", tmp_path / "k400/annotations")
    shutil.copytree(tmp_path / "web/kinetics/400/val", tmp_path / "k400/val")
    with serve_folder(tmp_path / "web") as site:
        splits = benchmark_splits(toy("k400", address=site.url), tmp_path)
    assert [len(splits.train), len(splits.val)] == [4, 2]
    assert not site.fetched("/kinetics/400/val/part_0.tar.gz")
    assert (tmp_path / "k400/val/part_0.tar.gz").exists()


def test_a_cut_off_download_goes_on_in_the_next_run(tmp_path):
    published("k400", tmp_path / "web")
    path = "/kinetics/400/train/part_1.tar.gz"
    size = (tmp_path / "web" / path[1:]).stat().st_size
    with serve_folder(tmp_path / "web") as site:
        site.cuts[path] = [100] + [0] * 20
        benchmark = toy("k400", address=site.url)
        with pytest.raises(DataError, match="run again to go on"):
            prepare(benchmark, tmp_path)
        part = tmp_path / "k400/downloads/train/part_1.tar.gz.part"
        assert part.stat().st_size == 100 < size
        assert not (tmp_path / "k400/manifest.json").read_text().count('"train"')
        site.cuts.clear()
        site.requests.clear()
        assert prepare(benchmark, tmp_path).splits["1"]["train"]["found"] == 4
    assert site.fetched(path) == [100]
    assert not site.fetched("/kinetics/400/train/part_0.tar.gz")
    assert not site.fetched("/kinetics/400/val/part_0.tar.gz")


def test_a_hub_download_survives_a_busy_hub_and_goes_on(tmp_path, hub):
    hub.add_dataset(REPOSITORIES["hmdb51"], published("hmdb51", tmp_path / "hub"))
    benchmark = toy("hmdb51", address=hub.url)
    hub.fault("info", status=503)
    hub.fault("resolve", status=503, skip=4, times=2)
    assert prepare(benchmark, tmp_path).splits["1"]["train"]["found"] == 4


def test_a_hub_download_that_ends_goes_on_in_the_next_run(tmp_path, hub):
    hub.add_dataset(REPOSITORIES["hmdb51"], published("hmdb51", tmp_path / "hub"))
    benchmark = toy("hmdb51", address=hub.url)
    shutil.copytree(local_copy("hmdb51", tmp_path / "copy") / "testTrainMulti_7030_splits", tmp_path / "hmdb51/lists")
    hub.fault("content", status=403, skip=3)  # of six clips
    with pytest.raises(DataError, match="CVML-TueAI/HMDB51: the Hub does not give it"):
        prepare(benchmark, tmp_path)
    there = list((tmp_path / "hmdb51/downloads").rglob("*.avi"))
    assert there
    assert not (tmp_path / "hmdb51/hmdb51_org").exists()
    hub.requests.clear()
    assert prepare(benchmark, tmp_path).splits["1"]["train"]["found"] == 4
    for path in there:
        assert not [entry for entry in hub.requests if entry.method == "GET" and quote(path.name) in entry.path]


@pytest.mark.parametrize("name", ["ucf101", "hmdb51", "ssv2"])
@pytest.mark.parametrize("key", ["lists", "clips"])
def test_a_run_that_ends_when_all_is_in_its_place_is_finished_by_the_next(name, key, tmp_path, hub, monkeypatch):
    hub.add_dataset(REPOSITORIES[name], published(name, tmp_path / "hub"))
    benchmark = toy(name, address=hub.url)
    rename = Path.rename

    def killed(self, target):
        if Path(target).name == f".{key}":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(benchmark, tmp_path)
    monkeypatch.undo()
    hub.requests.clear()
    assert prepare(benchmark, tmp_path).splits["1"]["train"]["found"] == 4
    assert not (tmp_path / name / "downloads").exists()
    if key == "clips":
        assert hub.count("content") == 0


def test_processes_that_start_together_fetch_once(tmp_path):
    published("k400", tmp_path / "web")
    with serve_folder(tmp_path / "web") as site, ThreadPoolExecutor(3) as pool:
        benchmark = toy("k400", address=site.url)
        splits = list(pool.map(lambda _: benchmark_splits(benchmark, tmp_path / "data"), range(3)))
    assert [len(split.train) for split in splits] == [4, 4, 4]
    assert site.fetched("/kinetics/400/train/part_0.tar.gz") == [0]


def test_splits_differ_in_their_lists(tmp_path):
    folder = local_copy("ucf101", tmp_path)
    lists = folder / "ucfTrainTestlist"
    train, val = (lists / f"{name}list03.txt" for name in ("train", "test"))
    moved, *rest = train.read_text().splitlines()
    train.write_text("\n".join(rest))
    val.write_text(val.read_text() + moved.split()[0] + "\n")
    benchmark = dataclasses.replace(offline("ucf101"), counts=((4, 2), (4, 2), (3, 3)))
    assert [len(benchmark_splits(benchmark, tmp_path, split).train) for split in (1, 2, 3)] == [4, 4, 3]
    assert prepare(benchmark, tmp_path).splits.keys() == {"1", "2", "3"}
    with pytest.raises(DataError, match=r"data\.split=4: ucf101 has the splits 1 to 3"):
        prepare(benchmark, tmp_path, split=4)


@pytest.mark.parametrize("name", ["ucf101", "hmdb51"])
def test_a_missing_clip_is_an_error_or_a_note(name, tmp_path):
    folder = local_copy(name, tmp_path)
    gone = sorted(folder.rglob("*.avi"))[0]
    gone.unlink()
    listed = f"{gone.parent.name}/{gone.name}"
    with pytest.raises(DataError) as error:
        prepare(offline(name), tmp_path)
    assert "1 of 4 train clips are missing, the first " + listed in str(error.value)
    assert "data.verify_counts to false" in str(error.value)
    assert "\n" not in str(error.value)
    splits = benchmark_splits(offline(name), tmp_path, verify=False)
    assert splits.missing == {"train": (listed,)}
    assert len(splits.train) == 3
    assert len(splits.notes) == 1
    assert "1 of 4 train clips are missing" in splits.notes[0]
    assert (folder / "missing_train_split1.txt").read_text() == f"{listed}\n"
    gone.write_bytes(clip_bytes(".avi", 0))
    assert benchmark_splits(offline(name), tmp_path).notes == ()
    assert not (folder / "missing_train_split1.txt").exists()


@pytest.mark.parametrize("name", ["ucf101", "hmdb51", "ssv2"])
def test_lists_of_other_lengths_are_refused(name, tmp_path):
    local_copy(name, tmp_path, train=3, val=2)
    with pytest.raises(
        DataError, match="its train list names 6 clips instead of 4; its val list names 4 clips instead"
    ):
        prepare(offline(name), tmp_path)
    note = benchmark_splits(offline(name), tmp_path, verify=False).notes[0]
    assert "names 6 clips instead of 4" in note


@pytest.mark.parametrize("name", NAMES)
def test_the_true_benchmarks_refuse_a_toy_copy(name, tmp_path):
    local_copy(name, tmp_path)
    with pytest.raises(DataError, match=f"2 classes instead of {BENCHMARKS[name].num_classes}"):
        prepare(name, tmp_path)
    splits = benchmark_splits(name, tmp_path, verify=False)
    assert len(splits.train) == 4
    assert len(splits.notes) == 1


@pytest.mark.parametrize("name", ["k400", "ssv2"])
def test_clips_that_are_gone_are_listed(name, tmp_path):
    folder = local_copy(name, tmp_path)
    gone = min(folder.rglob("*.mp4" if name == "k400" else "*.webm"))
    gone.unlink()
    splits = benchmark_splits(offline(name), tmp_path)
    assert [len(splits.train), len(splits.val)] == [3, 2]
    assert len(splits.missing["train"]) == 1
    assert gone.stem in splits.missing["train"][0]
    assert splits.notes == (
        f"{folder}: 3 of 4 train clips and 2 of 2 val clips are there; missing_*.txt list the others",
    )
    assert (folder / "missing_train.txt").read_text().splitlines() == list(splits.missing["train"])
    assert json.loads((folder / "manifest.json").read_text())["splits"]["1"]["train"]["missing"] == 1


def test_a_read_only_copy_is_used(tmp_path, monkeypatch):
    folder = local_copy("hmdb51", tmp_path)
    # As root, permissions forbid nothing.
    monkeypatch.setattr("vidprism_hf.data.benchmarks._write_text", _refuse)
    splits = benchmark_splits(offline("hmdb51"), tmp_path)
    assert len(splits.train) == 4
    assert splits.notes == (f"{folder}: manifest.json was not written (Read-only file system)",)


def _refuse(*_):
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize(
    ("name", "file"),
    [("ucf101", "classInd.txt"), ("hmdb51", "*_test_split1.txt"), ("k400", "train.csv"), ("ssv2", "labels.json")],
)
def test_what_cannot_be_fetched_is_one_line(name, file, tmp_path):
    with pytest.raises(DataError) as error:
        prepare(offline(name), tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / name}: has no {file}: ")
    assert "cannot be fetched" in message
    assert message.endswith(f"; by hand: {BENCHMARKS[name].home}")
    assert "\n" not in message


def test_clips_that_the_lists_do_not_name_are_refused(tmp_path):
    folder = local_copy("ucf101", tmp_path)
    (folder / "UCF-101").rename(folder / "frames")
    for path in list((folder / "frames").iterdir()):
        path.rename(path.with_name(f"other_{path.name}"))
    with pytest.raises(DataError, match="none of its 4 clips is below"):
        prepare(offline("ucf101"), tmp_path)


def test_offline_mode_is_heeded(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        prepare("ucf101", tmp_path)


def test_a_full_disk_is_noticed_before_anything_is_fetched(tmp_path, hub, monkeypatch):
    hub.add_dataset(REPOSITORIES["ucf101"], published("ucf101", tmp_path / "hub"))
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: free)
    with pytest.raises(DataError, match=r"needs .* MB and the disk has 0.0 MB free; make room or set data.root"):
        prepare(toy("ucf101", address=hub.url), tmp_path)
    assert hub.count("resolve") == 0


def test_a_repository_without_the_files_is_refused(tmp_path, hub):
    other = tmp_path / "hub"
    other.mkdir()
    (other / "README.md").write_text("moved")
    hub.add_dataset(REPOSITORIES["ucf101"], other)
    with pytest.raises(DataError, match="has no file UCF101TrainTestSplits"):
        prepare(toy("ucf101", address=hub.url), tmp_path)


def test_a_list_of_archives_that_is_none_is_refused(tmp_path):
    published("k400", tmp_path / "web")
    (tmp_path / "web/kinetics/400/val/k400_val_path.txt").write_text("<html> ../../../etc/passwd </html>")
    with serve_folder(tmp_path / "web") as site, pytest.raises(DataError, match="is no list of archives"):
        prepare(toy("k400", address=site.url), tmp_path)


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such benchmark; there are ucf101, hmdb51, k400, ssv2"):
        prepare("ucf102", tmp_path)


def test_a_broken_manifest_is_written_anew(tmp_path):
    folder = local_copy("ssv2", tmp_path)
    (folder / "manifest.json").write_text("{")
    prepare(offline("ssv2"), tmp_path)
    assert json.loads((folder / "manifest.json").read_text())["splits"]["1"]["classes"] == 2


def test_no_token_is_shown(tmp_path, hub, monkeypatch, capfd):
    token = hub.user("somebody")
    monkeypatch.setenv("HF_TOKEN", token)
    hub.add_dataset(REPOSITORIES["ucf101"], published("ucf101", tmp_path / "hub"), gated=True)
    with pytest.raises(DataError) as error:
        prepare(toy("ucf101", address=hub.url), tmp_path)
    shown = capfd.readouterr()
    assert token not in str(error.value) + shown.out + shown.err
    assert "the Hub does not give it" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_manifest_reads_well(tmp_path):
    local_copy("ucf101", tmp_path)
    assert str(prepare(offline("ucf101"), tmp_path)).splitlines() == [
        "ucf101: lists from local copy; clips from local copy",
        "  split 1: 2 classes, 4 of 4 train clips, 2 of 2 val clips",
    ]


def test_the_official_numbers():
    counts = {name: benchmark.counts for name, benchmark in BENCHMARKS.items()}
    assert counts["ucf101"] == ((9537, 3783), (9586, 3734), (9624, 3696))
    assert all(sum(split) == 13320 for split in counts["ucf101"])
    assert counts["hmdb51"] == ((51 * 70, 51 * 30),) * 3
    assert counts["ssv2"] == ((168913, 24777),)
    assert counts["k400"] == (None,)
    assert [BENCHMARKS[name].num_classes for name in NAMES] == [101, 51, 400, 174]
    assert benchmark_parts.DOWNLOADS == "downloads"
