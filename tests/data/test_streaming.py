"""Reading rows as they come: who reads which, how many, and what becomes of those that cannot be read."""

import collections
from itertools import chain, zip_longest
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from vidprism_hf.data import streamed_clips, streamed_rows
from vidprism_hf.data.hub_tables import Labels
from vidprism_hf.data.streamed_clips import StreamedClips
from vidprism_hf.data.streamed_rows import StreamedRow, StreamedRows
from vidprism_hf.data.streaming import shard_classes
from vidprism_hf.data.tables import DataError
from vidprism_hf.model import VideoDecodeError
from vidprism_hf.workers import CONTEXT

SIZES = [5, 1, 7, 4, 2]


def streamed(folder: Path, sizes: list[int], **settings) -> StreamedRows:
    """Streamed rows of one parquet file, so one shard, of each size; a video's bytes tell its row."""
    start, classes = 0, []
    for shard, size in enumerate(sizes):
        rows = [{"video": b"%d" % row} for row in range(start, start + size)]
        table = pa.Table.from_pylist(rows, schema=pa.schema({"video": pa.binary()}))
        pq.write_table(table, folder / f"train-{shard}.parquet")
        classes.append(np.arange(start, start + size) % 2)
        start += size
    files = sorted(map(str, folder.glob("*.parquet")))
    data = datasets.load_dataset(
        "parquet", data_files={"train": files}, split="train", streaming=True, cache_dir=str(folder / "cache")
    )
    return StreamedRows("train", data, classes, **settings)


def read(monkeypatch, rows: StreamedRows, rank: int, world: int, workers: int, batch_size: int = 3) -> list[list[int]]:
    """The batches of one process, as row numbers."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    loader = DataLoader(
        rows,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=list,
        multiprocessing_context=CONTEXT if workers else None,
    )
    batches = [[int(row.video) for row in batch] for batch in loader]
    if rows.training:
        assert len(batches) == len(loader)
        assert sum(map(len, batches)) == len(rows)
    return batches


readers = pytest.mark.parametrize(
    ("world", "workers", "shards"),
    [(world, workers, shards) for world in (1, 2, 3) for workers in (0, 1, 2) for shards in (1, 2, 3, 4, 5)],
)


@readers
def test_evaluation_reads_each_row_once_in_equal_shares(tmp_path, monkeypatch, world, workers, shards):
    rows = streamed(tmp_path, SIZES[:shards], training=False, batch_size=3)
    batches = [read(monkeypatch, rows, rank, world, workers) for rank in range(world)]
    assert sorted(chain(*chain(*batches))) == list(range(sum(SIZES[:shards])))
    shares = [sum(map(len, process)) for process in batches]
    assert max(shares) - min(shares) <= 1


@readers
def test_an_epoch_of_training_shows_every_row(tmp_path, monkeypatch, world, workers, shards):
    sizes = SIZES[:shards]
    rows = streamed(tmp_path, sizes, training=True, batch_size=3, buffer_size=2)
    share = -(-sum(sizes) // world)
    whole, rest = divmod(share, 3)
    for epoch in (0, 3):
        rows.set_epoch(epoch)
        counts = collections.Counter()
        for rank in range(world):
            batches = read(monkeypatch, rows, rank, world, workers)
            assert [len(batch) for batch in batches] == [3] * whole + [rest] * (rest > 0)
            counts.update(chain(*batches))
        assert set(counts) == set(range(sum(sizes)))
        assert counts.total() - len(counts) < world, "only what fills the last share comes again"


def test_order_follows_from_seed_and_epoch(tmp_path, monkeypatch):
    rows = streamed(tmp_path, [6, 6, 6, 6], training=True, batch_size=3)
    orders, together = [], set()
    for epoch in (0, 0, 1, 2, 3):
        rows.set_epoch(epoch)
        orders.append([list(chain(*read(monkeypatch, rows, rank, 2, 2))) for rank in (0, 1)])
        assert sorted(orders[-1][0] + orders[-1][1]) == list(range(24))
        together.add(frozenset(row // 6 for row in orders[-1][0]))
    assert orders[0] == orders[1] != orders[2]
    assert all(len(shards) == 2 for shards in together), "shards that divide evenly are read by one process"
    assert len(together) > 1, "other shards go together in each epoch"
    other = streamed(tmp_path, [6, 6, 6, 6], training=True, batch_size=3, seed=1)
    assert [list(chain(*read(monkeypatch, other, rank, 2, 2))) for rank in (0, 1)] != orders[0]


def test_fewer_rows_than_readers(tmp_path, monkeypatch):
    rows = streamed(tmp_path, [0, 1], training=True)
    assert [read(monkeypatch, rows, rank, 3, 2) for rank in range(3)] == [[[0]]] * 3


def test_each_process_evaluates_a_row_if_there_are_enough(tmp_path, monkeypatch):
    rows = streamed(tmp_path, [3], training=False, batch_size=2)
    assert sorted(chain(*(read(monkeypatch, rows, rank, 3, 2, 2) for rank in range(3)))) == [[0], [1], [2]]


def test_workers_that_stay_learn_of_the_epoch(tmp_path):
    rows = streamed(tmp_path, [20], training=True)
    loader = DataLoader(rows, batch_size=None, num_workers=1, persistent_workers=True, multiprocessing_context=CONTEXT)
    orders = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        orders.append([row.video for row in loader])
    assert orders[0] == orders[2] != orders[1]


def test_an_iterator_keeps_its_epoch(tmp_path):
    rows = streamed(tmp_path, [20], training=True)
    expected = list(rows)
    iterator = iter(rows)
    rows.set_epoch(1)
    assert list(iterator) == expected != list(rows)


def test_rows_have_names_and_labels(tmp_path):
    rows = list(streamed(tmp_path, [3, 3], training=False))
    assert [(row.name, row.label) for row in rows] == [(f"train {number}", number % 2) for number in range(6)]


@pytest.mark.slow
def test_workers_that_are_spawned_know_their_process(tmp_path, monkeypatch):
    rows = streamed(tmp_path, [6, 6], training=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    loader = DataLoader(rows, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert sorted(int(row.video) for row in loader) == list(range(6, 12))


@pytest.mark.parametrize("training", [False, True])
def test_rows_that_cannot_be_read_come_without_video(tmp_path, training):
    rows = streamed(tmp_path, [4, 4, 4], training=training)
    (tmp_path / "train-0.parquet").write_bytes(b"no parquet")
    pq.write_table(pq.read_table(tmp_path / "train-2.parquet").slice(0, 3), tmp_path / "train-2.parquet")
    found = sorted(rows, key=lambda row: int(row.name.split()[1]))
    assert [row.name for row in found] == [f"train {number}" for number in range(12)]
    assert [row.label for row in found] == [0, 1] * 6
    assert [row.video for row in found] == [b""] * 4 + [b"%d" % number for number in range(4, 11)] + [b""]
    assert all(row.cause.startswith("cannot be read (") for row in found[:4])
    assert [row.cause for row in found[4:]] == [""] * 7 + ["the dataset ends before it"]


def test_files_that_cannot_be_fetched_come_without_video(tmp_path):
    (tmp_path / "0.mp4").write_bytes(b"here")
    (tmp_path / "2.mp4").mkdir()
    values = [{"video": f"{tmp_path}/{number}.mp4"} for number in range(3)]
    data = datasets.IterableDataset.from_generator(lambda shards: iter(shards), gen_kwargs={"shards": values})
    rows = list(StreamedRows("train", data, [np.zeros(1, int)] * 3, training=False))
    assert [row.video for row in rows] == [b"here", b"", b""]
    assert [row.cause for row in rows] == [
        "",
        "no such file in the dataset",
        "cannot be read from the Hub (IsADirectoryError)",
    ]


class Rows:
    """Rows that are given; the first letter of a name is the class, capitals cannot be decoded."""

    epoch = 0

    def __init__(self, *names: str, size: int = 10):
        self.rows = [StreamedRow(name, name.encode() * size, "abc".index(name[0].lower())) for name in names]

    def read(self, epoch):
        return iter(self.rows)


class Reader:
    """A reader that keeps what it was asked for."""

    augmentation = True
    shape = (1,)

    def __call__(self, video, key):
        if video[:1].isupper():
            raise VideoDecodeError("no video", "", "is no video")
        return torch.ones(1)


def shown(*names: str, training: bool = True, size: int = 10) -> list[tuple[int, bool]]:
    reader = Reader()
    reader.augmentation = training
    items = list(StreamedClips(Rows(*names, size=size), reader))
    notes = [name for item in items for name, _, _ in item["bad_clips"]]
    assert notes == [name for name in names if name.isupper()]
    assert len(items) == len(names)
    return [(item["labels"], item["readable"]) for item in items]


def test_a_bad_row_is_replaced_by_one_of_its_class():
    good = [(0, True), (1, True)]
    assert shown("a", "b", "A") == [*good, (0, True)]
    assert shown("A", "b", "a") == [(1, True), (0, True), (0, True)], "by the next, where none came before"
    assert shown("a", "b", "C") == [*good, (1, True)], "by any, where there is no other"
    assert shown("A", "B") == [(0, False), (1, False)]
    assert shown("a", "B", training=False) == [(0, True), (1, False)]


def test_a_row_without_video_says_why():
    rows = Rows("a", "a")
    rows.rows[1] = StreamedRow("lost", b"", 0, "cannot be read")
    items = list(StreamedClips(rows, Reader()))
    assert [item["bad_clips"] for item in items] == [[], [("lost", 0, "cannot be read")]]
    assert all(item["readable"] for item in items)


def test_videos_are_kept_within_a_limit(monkeypatch):
    monkeypatch.setattr(streamed_clips, "HELD_BYTES", 25)
    assert shown("a", "b", "A")[-1] == (0, True)
    assert shown("a", "b", "c", "A")[-1] == (2, True), "the oldest is no longer held"
    assert shown("a", "b", "B", size=100)[-1] == (1, True), "the last one is held whatever its size"


def test_labels_are_checked_before_a_video_is_read():
    shards = [[("a",), ("b",)], [], [("b",), (None,)]]
    labels = Labels("label", ("a", "b"), {"a": 0, "b": 1})
    with pytest.raises(DataError, match=r"org/set, split train: row 3 has no label"):
        shard_classes(shards, labels, "org/set, split train")
    classes = shard_classes([*shards[:2], [("b",)]], labels, "org/set, split train")
    assert [part.tolist() for part in classes] == [[0, 1], [], [1]]


class Numbers:
    """A reader that gives what it was asked for, in numbers; some rows cannot be decoded."""

    augmentation = True
    shape = (3,)

    def __init__(self, bad=()):
        self.bad = {b"%d" % number for number in bad}

    def __call__(self, video, key):
        if video in self.bad:
            raise VideoDecodeError("no video", "", "is no video")
        epoch, _, view = key
        return torch.tensor([int(video), epoch, view])


def items_in_turn(clips: StreamedClips, workers: int, size: int, monkeypatch) -> list[list[dict]]:
    """The batches of a loader, which asks its workers in turn, without the loader."""
    iterators = []
    for worker in range(workers):
        info = SimpleNamespace(id=worker, num_workers=workers)
        monkeypatch.setattr(streamed_rows, "get_worker_info", lambda info=info: info)
        items = list(clips)
        iterators.append(iter([items[start : start + size] for start in range(0, len(items), size)]))
    rounds = zip_longest(*iterators)
    return [batch for batches in rounds for batch in batches if batch]


@pytest.mark.parametrize("bad", [(), (4,), (0, 1, 9, 10, 17)], ids=["good", "one bad", "many bad"])
@pytest.mark.parametrize(("workers", "sizes"), [(1, SIZES), (2, [19]), (3, SIZES)])
def test_a_stream_begins_within_an_epoch(tmp_path, monkeypatch, workers, sizes, bad):
    """After each batch of an epoch: the others come as they would have, and what was had is not read again."""
    rows = streamed(tmp_path, sizes, training=True, batch_size=3, buffer_size=2)
    clips, resumed = (StreamedClips(rows, Numbers(bad)) for _ in range(2))
    monkeypatch.setattr(streamed_rows, "MIXED_SHARDS", 2)
    clips.set_epoch(2)
    whole = items_in_turn(clips, workers, 3, monkeypatch)
    opened, ends = [], np.cumsum(sizes)
    shard = datasets.IterableDataset.shard

    def watched(*args, **settings):
        opened.append(args)
        return shard(*args, **settings)

    monkeypatch.setattr(datasets.IterableDataset, "shard", watched)
    for had in range(len(whole) + 1):
        met = [note for batch in whole[:had] for item in batch for note in item["bad_clips"]]
        resumed.begin(2, had, again=bool(met))
        opened.clear()
        rest = items_in_turn(resumed, workers, 3, monkeypatch)
        assert str(rest) == str(whole[had:]), had
        if not bad:
            numbers = [int(item["pixel_values_videos"][0]) for batch in rest for item in batch]
            assert {index for _, _, index in opened} == {int(np.searchsorted(ends, row, "right")) for row in numbers}
    resumed.set_epoch(3)
    clips.set_epoch(3)
    assert str(items_in_turn(resumed, workers, 3, monkeypatch)) == str(items_in_turn(clips, workers, 3, monkeypatch))


def test_a_loader_begins_within_an_epoch(tmp_path):
    """With two real workers, which stay for the epochs that follow."""
    rows = streamed(tmp_path, SIZES, training=True, batch_size=3, buffer_size=2)
    clips, resumed = (StreamedClips(rows, Numbers()) for _ in range(2))
    loaders = [
        DataLoader(
            c, batch_size=3, num_workers=2, collate_fn=str, persistent_workers=True, multiprocessing_context=CONTEXT
        )
        for c in (clips, resumed)
    ]
    clips.set_epoch(1)
    resumed.begin(1, 3)
    assert list(loaders[1]) == list(loaders[0])[3:]
    clips.set_epoch(2)
    assert list(loaders[1]) == list(loaders[0])
