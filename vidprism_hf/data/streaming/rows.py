"""Streams the rows of a Hub dataset, divided among the loader workers of all ranks.

The rows of a split form one sequence, shard after shard, and each worker of each rank reads one contiguous range:
whole shards, and parts of those at its ends. Training permutes the shards and the ranges each epoch. The order depends
on the seed, the epoch and the numbers of ranks and workers, unlike that of a table.
"""

import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ...distributed import rank_and_world
from ..tables import stable_hash

MIXED_SHARDS = 4  # interleaved by a training worker, since many datasets are sorted by class


class StreamedRow(NamedTuple):
    """One video.

    Attributes:
        name: Its name in messages, annotations and seeds.
        video: The bytes of the file; empty, and so undecodable, if the dataset has none.
        label: Its class index.
        cause: Why it could not be read, or "".
    """

    name: str
    video: bytes
    label: int
    cause: str = ""


class StreamedRows(IterableDataset):
    """The streamed rows of a split.

    In evaluation each row is used exactly once across all ranks and workers, and ranks differ by at most one row. In
    training each rank gets exactly ceil(rows / world_size), so that none waits for another: each row is used at least
    once, and a few at the start of the sequence twice. Rank and world size are read on use. A row that cannot be read
    comes without its video, since the other ranks would hang if this one raised.

    Args:
        split: The split's name.
        rows: Rows with `video` (bytes, path, or a dict of both), undecoded.
        classes: Class indices of each shard's rows, int64.
        training: Whether to shuffle and to give each rank the same number of rows.
        batch_size: The loader's batch size; in training all batches of a rank but its last are full.
        seed: Seed of the order.
        buffer_size: Size of each worker's shuffle buffer, in rows.

    Raises:
        ValueError: If `classes` does not match the number of shards.
    """

    def __init__(
        self,
        split: str,
        rows: datasets.IterableDataset,
        classes: Sequence[np.ndarray],
        training: bool,
        batch_size: int = 1,
        seed: int = 0,
        buffer_size: int = 128,
    ):
        super().__init__()
        if rows.num_shards != len(classes):
            raise ValueError(f"split {split}: {rows.num_shards} shards, and classes of {len(classes)}")
        self.split = split
        self.rows = rows
        self.classes = classes
        self.num_rows = sum(map(len, classes))
        self.training = training
        self.batch_size = batch_size
        self.seed = seed
        self.buffer_size = buffer_size
        # In shared memory: persistent workers have a copy of everything else.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._place = (0, 1)

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is not forked does not know its parent's process group.
        return self.__dict__ | {"_place": self._rank_and_world()}

    def __len__(self) -> int:
        """Returns this rank's number of rows in a training epoch."""
        if not self.training:
            # Test views make batches smaller, and the loader would count them as if one worker made them all.
            raise TypeError("how many batches an evaluation takes depends on the loader")
        return self._rows_of(*self._rank_and_world())

    @property
    def epoch(self) -> int:
        """The epoch to read next."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; call it before making the epoch's iterator."""
        self._epoch[0] = epoch

    def __iter__(self) -> Iterator[StreamedRow]:
        return self.read(self.epoch)  # read here, since the epoch may have changed when the first row is drawn

    def read(self, epoch: int, batches: int = 0, again: bool = False) -> Iterator[StreamedRow]:
        """Yields one epoch's rows for this worker of this rank.

        Args:
            epoch: The epoch.
            batches: Batches that this rank has already used: their rows are skipped without reading them.
            again: Whether to yield those rows anyway.
        """
        rank, world = self._rank_and_world()
        worker, workers = self._worker(batches)
        counts = [self._quota(rank, world, worker, workers) for rank in range(world) for worker in range(workers)]
        order, pieces = np.arange(len(self.classes)), np.arange(len(counts))
        if self.training:
            # All ranks draw the same order.
            generator = np.random.default_rng(stable_hash("shards", self.seed, epoch))
            order, pieces = generator.permutation(order), generator.permutation(pieces)
        unit = rank * workers + worker
        before = pieces[: int(np.flatnonzero(pieces == unit)[0])]
        rows: Any = self._parts(order.tolist(), sum(counts[other] for other in before), counts[unit])
        if self.training:
            seed = stable_hash("rows", self.seed, epoch, unit)
            had = 0 if again else self.rows_of_batches(batches)
            numbers = _shuffled([part.numbers for part in rows], np.random.default_rng(seed), self.buffer_size)
            known = set(islice(numbers, had))
            rows = [replace(part, known=known) for part in rows]
            rows = islice(_shuffled(rows, np.random.default_rng(seed), self.buffer_size), had, None)
        else:
            rows = (row for part in rows for row in part)
        return map(self._row, rows)

    def rows_of_batches(self, batches: int) -> int:
        """Returns how many of this worker's rows are in the first `batches` batches of a training epoch."""
        worker, workers = self._worker(batches)
        quota = self._quota(*self._rank_and_world(), worker, workers)
        return min(quota, self.batch_size * len(range(worker, batches, workers)))

    def _worker(self, batches: int) -> tuple[int, int]:
        """Returns this worker's number and the number of workers, after `batches` batches.

        A resumed loader starts with worker 0, which stands in for the worker whose turn it was.
        """
        info = get_worker_info()
        return ((info.id + batches) % info.num_workers, info.num_workers) if info else (0, 1)

    def _rank_and_world(self) -> tuple[int, int]:
        found = rank_and_world()
        return self._place if found == (0, 1) else found

    def _rows_of(self, rank: int, world: int) -> int:
        if self.training:
            return -(-self.num_rows // world)
        return len(range(rank, self.num_rows, world))

    def _quota(self, rank: int, world: int, worker: int, workers: int) -> int:
        """Returns a worker's number of rows; the loader takes batches from its workers in turn."""
        total, size = self._rows_of(rank, world), self.batch_size
        return sum(min(size, total - start) for start in range(worker * size, total, workers * size))

    def _parts(self, order: list[int], start: int, count: int) -> list["_Part"]:
        """Returns the `count` rows from position `start` of the sequence of shards, wrapping around at its end."""
        parts: list[_Part] = []
        firsts = np.concatenate([[0], np.cumsum([len(classes) for classes in self.classes])]).tolist()
        start %= self.num_rows
        for index in cycle(order):
            if not count:
                return parts
            size = len(self.classes[index])
            stop = min(start + count, size)
            if start < stop:
                parts.append(_Part(self.rows, index, firsts[index], self.classes[index], start, stop))
                count -= stop - start
            start = max(start - size, 0)
        return parts

    def _row(self, found: tuple[int, int, Any, str]) -> StreamedRow:
        number, label, video, cause = found
        value = video if isinstance(video, dict) else {"bytes" if isinstance(video, bytes) else "path": video}
        content, path = value.get("bytes"), value.get("path") or ""
        # The datasets library keeps only the last part of an embedded video's path.
        name = " ".join(filter(None, (self.split, str(number), posixpath.basename(path))))
        if content is None and path:
            # A path in the repository is already a unique name.
            name = re.sub(r"^hf://datasets/[^@]+@[^/]+/", "", path)
            content, cause = _fetch(path)
        return StreamedRow(name, content or b"", label, cause)


@dataclass(frozen=True, eq=False)
class _Part:
    """Some rows of a shard, as (number in the split, class index, video, cause if it could not be read).

    Leading rows whose numbers are in `known` come without their videos and are not read.
    """

    rows: datasets.IterableDataset
    shard: int
    first: int
    classes: np.ndarray
    start: int
    stop: int
    known: Set[int] = frozenset()

    @property
    def numbers(self) -> range:
        """The numbers of the rows."""
        return range(self.first + self.start, self.first + self.stop)

    def __iter__(self) -> Iterator[tuple[int, int, Any, str]]:
        place, cause = self.start, "the dataset ends before it"
        while place < self.stop and self.first + place in self.known:
            yield self.first + place, int(self.classes[place]), None, ""
            place += 1
        if place == self.stop:
            return
        try:
            shard = self.rows.shard(self.rows.num_shards, self.shard, contiguous=False)
            # Not iter(shard), which would split it among the loader's workers a second time.
            for batch in islice(shard.iter(batch_size=1), place, self.stop):
                yield self.first + place, int(self.classes[place]), batch["video"][0], ""
                place += 1
        except Exception as error:  # from whichever library reads; the client has already retried
            cause = f"cannot be read ({type(error).__name__})"
        for lost in range(place, self.stop):
            yield self.first + lost, int(self.classes[lost]), None, cause


def _shuffled(parts: Sequence[Iterable], generator: np.random.Generator, buffer_size: int) -> Iterator:
    """Shuffles rows (or their numbers): interleaves a few shards and draws from a buffer.

    `datasets` can shuffle too, but with threads in each worker that it waits for by sleeping for seconds.
    """
    waiting = [parts[index] for index in generator.permutation(len(parts))]
    opened = [iter(part) for part in waiting[:MIXED_SHARDS]]
    waiting = waiting[MIXED_SHARDS:]
    buffer: list[Any] = []
    while opened:
        for source in list(opened):
            row = next(source, None)
            if row is None:
                opened.remove(source)
                opened += [iter(waiting.pop())] if waiting else []
            elif len(buffer) < buffer_size:
                buffer.append(row)
            else:
                place = int(generator.integers(buffer_size))
                row, buffer[place] = buffer[place], row
                yield row
    yield from (buffer[place] for place in generator.permutation(len(buffer)))


def _fetch(path: str) -> tuple[bytes, str]:
    """Returns the bytes of a file, or none and the cause."""
    try:
        with fsspec.open(path, "rb") as file:
            return file.read(), ""
    except FileNotFoundError:
        return b"", "no such file in the dataset"
    except Exception as error:  # from whichever library reads; the client has already retried
        return b"", f"cannot be read from the Hub ({type(error).__name__})"
