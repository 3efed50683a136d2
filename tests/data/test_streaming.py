"""Reading rows as they come: who reads which, and how many."""

import collections
from itertools import chain
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader

from vidprism_hf.data.hub_tables import Labels
from vidprism_hf.data.streaming import StreamedRows

LABELS = Labels("label", ("a", "b"), {0: 0, 1: 1})


def parquet_rows(folder: Path, sizes: list[int]) -> datasets.IterableDataset:
    """A streamed data set of one parquet file, so one shard, of each size; a video's bytes tell its row."""
    start = 0
    for shard, size in enumerate(sizes):
        rows = [{"video": b"%d" % row, "label": row % 2} for row in range(start, start + size)]
        table = pa.Table.from_pylist(rows, schema=pa.schema({"video": pa.binary(), "label": pa.int64()}))
        pq.write_table(table, folder / f"train-{shard}.parquet")
        start += size
    files = sorted(map(str, folder.glob("*.parquet")))
    return datasets.load_dataset(
        "parquet", data_files={"train": files}, split="train", streaming=True, cache_dir=str(folder / "cache")
    )


def read(monkeypatch, rows: StreamedRows, rank: int, world: int, workers: int, batch_size: int = 3) -> list[list[int]]:
    """The batches of one process, as row numbers."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    loader = DataLoader(rows, batch_size=batch_size, num_workers=workers, collate_fn=list)
    return [[int(row.video) for row in batch] for batch in loader]


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_each_row_is_read_once(tmp_path, monkeypatch, shards, world, workers):
    sizes = [5, 1, 7, 4, 2][:shards]
    rows = StreamedRows("train", parquet_rows(tmp_path, sizes), LABELS, sum(sizes), training=False)
    batches = [read(monkeypatch, rows, rank, world, workers) for rank in range(world)]
    assert sorted(row for process in batches for batch in process for row in batch) == list(range(sum(sizes)))


@pytest.mark.parametrize("shards", [1, 3, 5])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_train_on_the_same_number_of_rows(tmp_path, monkeypatch, shards, world, workers):
    sizes = [5, 1, 7, 4, 2][:shards]
    rows = StreamedRows("train", parquet_rows(tmp_path, sizes), LABELS, sum(sizes), training=True, batch_size=3)
    share = -(-sum(sizes) // world)
    for rank in range(world):
        batches = read(monkeypatch, rows, rank, world, workers)
        whole, rest = divmod(share, 3)
        assert [len(batch) for batch in batches] == [3] * whole + [rest] * (rest > 0)
        assert len(rows) == share


def test_training_reads_all_rows_if_shards_are_even(tmp_path, monkeypatch):
    data = parquet_rows(tmp_path, [6, 6, 6, 6])
    rows = StreamedRows("train", data, LABELS, 24, training=True, batch_size=3)
    orders = []
    for epoch in (0, 0, 1):
        rows.set_epoch(epoch)
        orders.append([list(chain(*read(monkeypatch, rows, rank, 2, 2))) for rank in (0, 1)])
        assert sorted(orders[-1][0] + orders[-1][1]) == list(range(24))
    assert orders[0] == orders[1] != orders[2]
    assert {row // 6 for row in orders[0][0]} != set(range(4)), "a process reads its own shards"
    other = StreamedRows("train", data, LABELS, 24, training=True, batch_size=3, seed=1)
    assert [list(chain(*read(monkeypatch, other, rank, 2, 2))) for rank in (0, 1)] != orders[0]


def test_one_shard_for_many_readers_is_shared_without_repeats(tmp_path, monkeypatch):
    rows = StreamedRows("train", parquet_rows(tmp_path, [24]), LABELS, 24, training=True, batch_size=3)
    seen = [row for rank in (0, 1) for batch in read(monkeypatch, rows, rank, 2, 2) for row in batch]
    assert sorted(seen) == list(range(24)) != seen


def test_uneven_shards_take_turns(tmp_path, monkeypatch):
    # Two processes, shards of 2 and 10 rows: each process gets 6, so the small one comes three times.
    rows = StreamedRows("train", parquet_rows(tmp_path, [2, 10]), LABELS, 12, training=True)
    counts, small_reader = collections.Counter(), set()
    for epoch in range(12):
        rows.set_epoch(epoch)
        for rank in (0, 1):
            seen = list(chain(*read(monkeypatch, rows, rank, 2, 0)))
            assert len(seen) == 6
            counts.update(seen)
            if set(seen) <= {0, 1}:
                small_reader.add(rank)
    assert small_reader == {0, 1}
    assert set(counts) == set(range(12)), "each epoch leaves out others"


def test_fewer_rows_than_readers(tmp_path, monkeypatch):
    rows = StreamedRows("train", parquet_rows(tmp_path, [1]), LABELS, 1, training=True)
    assert [read(monkeypatch, rows, rank, 3, 2) for rank in range(3)] == [[[0]]] * 3


def test_workers_that_stay_learn_of_the_epoch(tmp_path):
    rows = StreamedRows("train", parquet_rows(tmp_path, [20]), LABELS, 20, training=True)
    loader = DataLoader(rows, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        orders.append([row.video for row in loader])
    assert orders[0] == orders[2] != orders[1]


def test_rows_have_names_and_labels(tmp_path):
    rows = list(StreamedRows("train", parquet_rows(tmp_path, [4]), LABELS, 4, training=False))
    assert [row.label for row in rows] == [0, 1, 0, 1]
    assert len({row.name for row in rows}) == 4
    assert all(row.name.startswith("train ") for row in rows)


@pytest.mark.slow
def test_workers_that_are_spawned_know_their_process(tmp_path, monkeypatch):
    rows = StreamedRows("train", parquet_rows(tmp_path, [6, 6]), LABELS, 12, training=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    loader = DataLoader(rows, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert sorted(int(row.video) for row in loader) == list(range(6, 12))
