"""Clips that cannot be decoded: replaced in training, counted as wrong in evaluation, and never in the way."""

import csv
import threading
import time

import pytest
import torch
from clips import greys, render
from stalled_files import stalled

from vidprism_hf.data import ClipAugmentation, ClipDataset, ClipReader, FileTable, load_processor
from vidprism_hf.data.bad_clips import BadClip, BadClipLog, TooManyBadClips, check_bad_clips, write_bad_clips
from vidprism_hf.data.dataset import collate
from vidprism_hf.data.time_limit import TimeLimit

NAMES = ["a0.mp4", "a1.mp4", "a2.mp4", "b0.mp4", "b1.mp4"]
LABELS = [0, 0, 0, 1, 1]


@pytest.fixture(scope="module")
def processor():
    return load_processor("tiny", num_frames=4)


@pytest.fixture
def table(tmp_path):
    """Three clips of one class and two of another; the first is no video."""
    for number, name in enumerate(NAMES):
        render(tmp_path / name, greys(8 + number))
    (tmp_path / "a0.mp4").write_text("not a video")
    return FileTable.from_lists(tmp_path, NAMES, LABELS)


def dataset(table, processor, training=True, **settings):
    augmentation = ClipAugmentation((32, 32)) if training else None
    return ClipDataset(table, ClipReader(processor, augmentation, **settings))


# --- training


def test_a_bad_clip_gives_way_to_another_of_its_class(table, processor):
    item = dataset(table, processor)[(0, 0)]
    assert item["labels"] == 0
    assert item["clip_index"] in (1, 2)
    assert item["readable"]
    ((name, label, cause),) = item["bad_clips"]
    assert (name, label) == ("a0.mp4", 0)
    assert "is a text file, not a video" in cause or "is not a video" in cause


def test_the_replacement_is_that_clips_own_view(table, processor):
    clips = dataset(table, processor)
    item = clips[(3, 0)]
    assert torch.equal(item["pixel_values_videos"], clips[(3, item["clip_index"])]["pixel_values_videos"])


def test_the_replacement_follows_from_seed_epoch_and_index(table, processor):
    def chosen(seed):
        return [dataset(table, processor, seed=seed)[(epoch, 0)]["clip_index"] for epoch in range(12)]

    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)
    assert set(chosen(0)) == {1, 2}  # not always the same neighbour


def test_good_clips_are_left_alone(table, processor):
    for index in range(1, 5):
        item = dataset(table, processor)[(0, index)]
        assert (item["clip_index"], item["bad_clips"], item["readable"]) == (index, [], True)


def test_a_class_without_a_clip_that_decodes(table, processor, tmp_path):
    for name in ("b0.mp4", "b1.mp4"):
        (tmp_path / name).write_bytes(b"")
    item = dataset(table, processor)[(0, 3)]
    assert not item["readable"]
    assert sorted(name for name, *_ in item["bad_clips"]) == ["b0.mp4", "b1.mp4"]
    assert item["pixel_values_videos"].shape == (4, 3, 32, 32)
    assert not item["pixel_values_videos"].any()


def test_a_bad_clip_is_opened_once_by_a_process(table, processor, tmp_path):
    clips = dataset(table, processor)
    first = clips[(0, 0)]["bad_clips"]
    render(tmp_path / "a0.mp4", greys(8))  # it decodes now, but this process has given it up
    assert clips[(1, 0)]["bad_clips"] == first


def test_without_augmentation_it_gives_way_as_well(table, processor):
    clips = ClipDataset(table, ClipReader(processor), training=True)
    item = clips[(2, 0)]
    assert (item["labels"], item["readable"], [name for name, *_ in item["bad_clips"]]) == (0, True, ["a0.mp4"])
    assert item["clip_index"] in (1, 2)
    seen = dataset(table, processor, training=False)[item["clip_index"]]
    assert torch.equal(item["pixel_values_videos"], seen["pixel_values_videos"])


# --- evaluation


@pytest.mark.parametrize("views", [{}, {"num_clips": 2, "num_crops": 3}])
def test_in_evaluation_nothing_takes_its_place(table, processor, views):
    items = [dataset(table, processor, training=False, **views)[index] for index in range(5)]
    assert [item["readable"] for item in items] == [False, True, True, True, True]
    assert [item["clip_index"] for item in items] == list(range(5))
    batch = collate(items)
    assert batch["pixel_values_videos"].shape == ((5, 6, 4, 3, 32, 32) if views else (5, 4, 3, 32, 32))
    assert [name for name, *_ in batch["bad_clips"]] == ["a0.mp4"]
    assert batch["num_unreadable"] == 1


# --- clips that hang


@pytest.fixture
def hanging(tmp_path):
    """A clip that does not open for the time of the test; then the thread that waits for it goes."""
    with stalled(tmp_path / "hang.mp4", b"clip"):
        yield tmp_path / "hang.mp4"


def test_a_clip_that_hangs_is_given_up(hanging, tmp_path, processor):
    render(tmp_path / "good.mp4", greys(8))
    table = FileTable.from_lists(tmp_path, ["hang.mp4", "good.mp4"], [0, 0])
    clips = dataset(table, processor, time_limit=0.2)
    started = time.monotonic()
    item = clips[(0, 0)]
    assert time.monotonic() - started < 20
    assert item["clip_index"] == 1
    assert "took longer than" in item["bad_clips"][0][2]


def test_time_limit_gives_results_and_errors_as_they_are():
    within = TimeLimit(5)
    assert within(max, 2, 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(lambda: 1 / 0)
    assert within(threading.current_thread) is within(threading.current_thread)  # one thread for all calls
    assert TimeLimit(None)(threading.current_thread) is threading.current_thread()


def test_time_limit_answers_belong_to_their_calls():
    within, release = TimeLimit(0.1), threading.Event()
    with pytest.raises(TimeoutError, match=r"took longer than 0\.1 s"):
        within(release.wait, 30)
    release.set()  # the late answer of the first call
    assert within(sum, (1, 2)) == 3


def test_time_limit_in_a_worker(processor, table):
    """Which is given clips of a process that has decoded before."""
    from vidprism_hf.workers import clip_loader

    clips = dataset(table, processor, time_limit=30)
    alone = [clips[index]["clip_index"] for index in range(5)]
    (batch,) = clip_loader(clips, 1, collate, batch_size=5)
    assert batch["clip_index"].tolist() == alone


# --- the account


def test_the_log_counts_each_clip_once():
    log = BadClipLog()
    assert log.add("train", [("a", 0, "broken"), ("a", 0, "broken")]) == [("a", 0, "broken")]
    assert log.add("train", [("a", 0, "broken"), ("c", 1, "empty")]) == [("c", 1, "empty")]
    log.merge({"train": {"a": (0, "other words"), "b": (1, "cut")}, "val": {"a": (0, "cut")}})
    train = [
        BadClip("train", "a", "run", "broken"),
        BadClip("train", "b", "walk", "cut"),
        BadClip("train", "c", "walk", "empty"),
    ]
    names = {0: "run", 1: "walk"}
    assert log.clips(names) == [*train, BadClip("val", "a", "run", "cut")]
    assert log.clips(names, "train") == train
    assert len(log) == 4


def test_the_list_is_a_csv_file(tmp_path):
    clips = [BadClip("train", 'odd, "name"\udce9.mp4', "a", "is cut off"), BadClip("val", "b.mp4", "b", "is empty")]
    write_bad_clips(clips, tmp_path / "bad_clips.csv")
    with open(tmp_path / "bad_clips.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["split", "name", "label", "cause"]
    assert rows[1] == ["train", 'odd, "name"\udce9.mp4', "a", "is cut off"]
    assert [path.name for path in tmp_path.iterdir()] == ["bad_clips.csv"]


@pytest.mark.parametrize(
    ("bad", "total", "fraction", "stops"),
    [(0, 10, 0.0, False), (1, 100, 0.01, False), (2, 100, 0.01, True), (1, 99, 0.01, True), (5, 5, 1.0, False)],
)
def test_too_many_bad_clips(bad, total, fraction, stops):
    clips = [BadClip("train", f"{number}.mp4", "a", "is empty") for number in range(bad)]
    if not stops:
        check_bad_clips(clips, total, fraction)
        return
    with pytest.raises(TooManyBadClips, match=rf"{bad} of {total} .*data\.max_bad_fraction=0\.01 .*0\.mp4: is empty"):
        check_bad_clips(clips, total, fraction)


def test_a_class_that_is_lost_stops_whatever_the_fraction():
    with pytest.raises(TooManyBadClips, match="2 training examples have no clip of their class"):
        check_bad_clips([BadClip("train", "a.mp4", "a", "is empty")], 10, 1.0, num_unreadable=2)
