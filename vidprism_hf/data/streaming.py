"""Clips of a Hub dataset read as they come, without fetching it first (`data.streaming=true`).

Each loader worker of each process reads its own shards, the files of the dataset. Where there are fewer shards than
workers, several read the same one and each gives every n-th of its rows. What an epoch holds follows from the seed,
the epoch, and the numbers of processes and workers: unlike for a table, order is bound to who reads what.
"""

import hashlib
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import datasets
import fsspec
import httpx2
import numpy as np
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from .folder import HELD_OUT_FOLDERS, TRAIN_FOLDER
from .hub_repository import Repository, hub_errors
from .hub_tables import (
    HELD_OUT_SPLITS,
    Labels,
    choose_split,
    find_labels,
    find_video_column,
    repository_names,
    subset_column,
    subset_values,
)
from .tables import DataError, stable_hash

MIXED_SHARDS = 4  # read in turn by a worker in training: many datasets are sorted by class
ROWS_PER_SHARD = 64  # of class folders, whose rows are paths: enough shards to share out, few enough to shuffle


class StreamedRow(NamedTuple):
    """One clip.

    Attributes:
        name: What it is called in messages, lists and seeds.
        video: The bytes of the file; none if the dataset has none, which no decoder takes.
        label: Its class index.
    """

    name: str
    video: bytes
    label: int


class StreamedRows(IterableDataset):
    """The rows of a split as they come.

    In evaluation each row comes exactly once over all processes and workers. In training each process gets
    exactly ceil(rows / processes), so that none waits for another: who has fewer of its own begins again, who has
    more leaves some out, and in each epoch other shards go together. Rank and number of processes are read when
    the rows are.

    Args:
        split: The split's name.
        rows: Rows with `video` (bytes, path, or a dict of both) and `label`, undecoded.
        labels: What stands in `label`.
        num_rows: How many there are.
        training: Whether to shuffle and to give the same number to each process.
        batch_size: Rows that the loader makes a batch of: in training all batches of a process but its last are whole.
        seed: Seed of the order.
        buffer_size: Rows that a worker holds to shuffle them.
    """

    def __init__(
        self,
        split: str,
        rows: datasets.IterableDataset,
        labels: Labels,
        num_rows: int,
        training: bool,
        batch_size: int = 1,
        seed: int = 0,
        buffer_size: int = 128,
    ):
        super().__init__()
        self.split = split
        self.rows = rows
        self.labels = labels
        self.num_rows = num_rows
        self.training = training
        self.batch_size = batch_size
        self.seed = seed
        self.buffer_size = buffer_size
        # Shared memory: workers that outlive an epoch have a copy of everything else.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._place = (0, 1)

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is not forked knows nothing of its parent's process group.
        return self.__dict__ | {"_place": self._rank_and_world()}

    def __len__(self) -> int:
        """Rows of this process in an epoch of training; in evaluation that depends on the shards."""
        if not self.training:
            raise TypeError("the rows of one process are not known before they are read")
        return -(-self.num_rows // self._rank_and_world()[1])

    @property
    def epoch(self) -> int:
        """The epoch that is read, or read next."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the order, before the rows of it are read."""
        self._epoch[0] = epoch

    def __iter__(self) -> Iterator[StreamedRow]:
        rank, world = self._rank_and_world()
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        unit, units = rank * workers + worker, world * workers
        if not self.training:
            for shard in _share(self.rows, unit, units):
                yield from map(self._row, shard)
            return
        # Other shards go together in each epoch; all processes draw the same permutation.
        generator = np.random.default_rng(stable_hash("shards", self.seed, self.epoch))
        unit = int(generator.permutation(units)[unit])
        generator = np.random.default_rng(stable_hash("rows", self.seed, self.epoch, unit))
        yield from map(self._row, islice(self._endless(generator, unit, units), self._quota(worker, workers)))

    def _rank_and_world(self) -> tuple[int, int]:
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return self._place

    def _quota(self, worker: int, workers: int) -> int:
        """Rows of a worker in training: the loader takes its batches from the workers in turn."""
        total, size = len(self), self.batch_size
        return sum(min(size, total - start) for start in range(worker * size, total, workers * size))

    def _endless(self, generator: np.random.Generator, unit: int, units: int) -> Iterator[dict[str, Any]]:
        shards = _share(self.rows, unit, units)
        while True:
            count = 0
            for row in _shuffled(shards, generator, self.buffer_size):
                count += 1
                yield row
            if not count:
                # A shard shorter than the number of those who share it: take any rows rather than none.
                if units == 1:
                    raise DataError(f"split {self.split}: has no rows; choose another as data.train_split")
                units, shards = 1, _share(self.rows, 0, 1)

    def _row(self, row: dict[str, Any]) -> StreamedRow:
        value = row["video"]
        value = value if isinstance(value, dict) else {"bytes" if isinstance(value, bytes) else "path": value}
        content, path = value.get("bytes"), value.get("path") or ""
        if content is None and path:
            # A path in the repository is a name of its own.
            name = re.sub(r"^hf://datasets/[^@]+@[^/]+/", "", path)
            content = _fetch(path, name)
        else:
            # Rows have no numbers here, and datasets keep only the last part of a path.
            digest = hashlib.blake2b(content or b"", digest_size=4).hexdigest()
            name = " ".join(filter(None, (self.split, posixpath.basename(path), digest)))
        (label,) = self.labels.encode([row["label"]], f"{self.split}, clip {name}")
        return StreamedRow(name, content or b"", int(label))


@dataclass(frozen=True)
class _Shard:
    """One shard, or every n-th row of it: can be read again and again."""

    rows: datasets.IterableDataset
    first: int = 0
    step: int = 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = self.rows
        if self.step > 1:
            rows = split_dataset_by_node(rows, self.first, self.step, strategy="examples")
        # Not iter(rows), which would divide them once more among the loader's workers.
        for batch in rows.iter(batch_size=1):
            yield {name: values[0] for name, values in batch.items()}


def _share(rows: datasets.IterableDataset, unit: int, units: int) -> list[_Shard]:
    """What one of `units` readers has to read."""
    total = rows.num_shards
    if total >= units:
        return [_Shard(rows.shard(total, index, contiguous=False)) for index in range(unit, total, units)]
    index = unit % total
    return [_Shard(rows.shard(total, index, contiguous=False), unit // total, len(range(index, units, total)))]


def _shuffled(shards: list[_Shard], generator: np.random.Generator, buffer_size: int) -> Iterator[dict[str, Any]]:
    """Mixes rows: some shards are read in turn, and rows wait in a buffer from which any may come next.

    `datasets` shuffles too, but with threads in each worker, whose end it awaits by sleeping for seconds.
    """
    waiting = [shards[index] for index in generator.permutation(len(shards))]
    opened = [iter(shard) for shard in waiting[:MIXED_SHARDS]]
    waiting = waiting[MIXED_SHARDS:]
    buffer: list[dict[str, Any]] = []
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


def _fetch(path: str, name: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""
    except (OSError, httpx2.HTTPError) as error:  # the client has tried again by itself
        raise DataError(f"{name}: cannot be read from the Hub ({type(error).__name__}); resume when it can") from error


@dataclass(frozen=True, eq=False)
class ClipStreams:
    """What a streamed dataset comes to.

    Attributes:
        train: The rows to train on.
        val: The held-out rows.
        id2label: Class index to label name.
        num_train: How many rows `train` has.
        num_val: How many rows `val` has.
        notes: Sentences about the source that its user should see once.
        missing: As in `ClipSplits`; rows that a dataset has are there.
    """

    train: StreamedRows
    val: StreamedRows
    id2label: dict[int, str]
    num_train: int
    num_val: int
    notes: tuple[str, ...] = ()
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)


def hub_streams(
    source: str,
    config: str | None = None,
    revision: str | None = None,
    train_split: str = "train",
    val_split: str | None = None,
    video_column: str | None = None,
    label_column: str | None = None,
    label_names: str | None = None,
    batch_size: int = 1,
    seed: int = 0,
    buffer_size: int = 128,
) -> ClipStreams:
    """Opens a dataset of the Hub for reading as it comes: tables, and videos in folders by split and class.

    Args:
        source: Its id, org/name.
        config: Its configuration, if it has several.
        revision: Branch, tag or commit.
        train_split: Split, or folder, to train on.
        val_split: The held-out one; None as in `hub_splits`.
        video_column: Column with the video or its path; None as in `hub_splits`.
        label_column: Column with the label; None as in `hub_splits`.
        label_names: Local file with names for labels that are numbers.
        batch_size: See StreamedRows.
        seed: See StreamedRows.
        buffer_size: See StreamedRows.

    Raises:
        DataError: If the dataset, or what is asked of it, cannot be used, or it cannot be streamed.
    """
    repository = Repository.find(source, revision)
    if config is not None or repository.is_table:
        opened = _open_tables(repository, config, train_split, val_split, video_column, label_column, label_names)
    else:
        opened = _open_folders(repository, train_split, val_split)
    (train, val), labels, counts, notes = opened
    splits = [
        StreamedRows(split, rows, labels, count, training, batch_size, seed, buffer_size)
        for (split, rows), count, training in zip((train, val), counts, (True, False), strict=True)
    ]
    return ClipStreams(*splits, dict(enumerate(labels.names)), *counts, notes=tuple(notes))


def _open_folders(repository: Repository, train_split: str, val_split: str | None):
    """Videos as `.../<split>/<class>/...`: all that is needed is in their names."""
    source, notes = repository.source, []
    if len(repository.videos) <= len(repository.archives):
        raise DataError(f"{source}: consists of archives, which cannot be streamed; set data.streaming=false")
    top = posixpath.commonpath([posixpath.dirname(name) for name in repository.videos])
    clips: dict[str, list[tuple[str, str]]] = {}
    for name in repository.videos:
        parts = PurePosixPath(name).relative_to(top).parts
        if len(parts) > 2:
            clips.setdefault(parts[0], []).append((name, parts[1]))
    held_out = val_split or next((name for name in HELD_OUT_FOLDERS if name in clips and name != train_split), None)
    if train_split not in clips or held_out not in clips:
        raise DataError(
            f"{source}: only class folders below {TRAIN_FOLDER}/ and val/ can be streamed, and it has "
            f"{', '.join(sorted(clips)) or 'none'}; set data.streaming=false, or name others as data.train_split"
        )
    if val_split is None:
        notes.append(f"{source}: folder {held_out} is held out; data.val_split chooses another")
    names = sorted({label for _, label in clips[train_split]})
    labels = Labels("label", tuple(names), {name: index for index, name in enumerate(names)})
    labels.encode([label for _, label in clips[held_out]], f"{source}, {held_out}")
    opened = []
    for split in (train_split, held_out):
        address = f"hf://datasets/{source}@{repository.commit}/"
        rows = [{"video": address + name, "label": label} for name, label in clips[split]]
        shards = [rows[start : start + ROWS_PER_SHARD] for start in range(0, len(rows), ROWS_PER_SHARD)]
        opened.append((split, datasets.IterableDataset.from_generator(_flatten, gen_kwargs={"shards": shards})))
    return opened, labels, [len(clips[train_split]), len(clips[held_out])], notes


def _flatten(shards: list[list[dict[str, str]]]) -> Iterator[dict[str, str]]:
    for shard in shards:
        yield from shard


def _open_tables(repository, config, train_split, val_split, video_column, label_column, label_names):
    source, notes = repository.source, []
    with hub_errors(source):
        builder = datasets.load_dataset_builder(source, name=config, revision=repository.commit)
        data = builder.as_streaming_dataset()
    train = choose_split(source, list(data), train_split, "train_split")
    features = data[train].features
    if features is None:
        raise DataError(f"{source}: its columns are not known before it is read; set data.streaming=false")
    video = find_video_column(source, features, video_column)
    labels = find_labels(
        source, features, label_column, lambda names: _columns(builder, data, train, names), label_names
    )
    held_out = val_split or next((name for name in HELD_OUT_SPLITS if name in data and name != train), None)
    if held_out is not None:
        choose_split(source, list(data), held_out, "val_split")
        rows = [(train, data[train]), (held_out, data[held_out])]
        counts = [_count(builder, data, split, labels.column) for split, _ in rows]
        if val_split is None:
            notes.append(f"{source}: split {held_out!r} is held out; data.val_split chooses another")
    else:
        rows, counts, note = _by_subset(source, builder, data, train)
        notes.append(note)
    prepare = _preparation(repository, video, labels.column)
    opened = [(split, prepare(part)) for split, part in rows]
    for (split, _), count in zip(opened, counts, strict=True):
        if not count:
            raise DataError(f"{source}, split {split}: has no rows; choose another")
    return opened, labels, counts, notes


def _columns(builder, data, split: str, names: Sequence[str]) -> list[tuple]:
    """The values of some columns; of parquet files no others are read."""
    with hub_errors(builder.repo_id):
        if hasattr(builder.config, "columns"):
            settings = {"name": builder.config.name, "revision": builder.hash, "columns": list(names)}
            rows = datasets.load_dataset_builder(builder.repo_id, **settings).as_streaming_dataset(split)
        else:
            rows = data[split].decode(False).select_columns(list(names))
        return [tuple(row[name] for name in names) for row in rows]


def _count(builder, data, split: str, column: str) -> int:
    info = (builder.info.splits or {}).get(split)
    return info.num_examples if info and info.num_examples else len(_columns(builder, data, split, [column]))


def _by_subset(source: str, builder, data, train: str):
    column = subset_column(data[train].features)
    values = [value for (value,) in _columns(builder, data, train, [column])] if column else []
    chosen = subset_values(set(values))
    if chosen is None:
        raise DataError(f"{source}: has no held-out split but {', '.join(data)}; name one as data.val_split")
    rows = [(train, data[train].decode(False).filter(_Is(value), input_columns=[column])) for value in chosen]
    note = f"{source}: rows with {column} {chosen[0]!r} are for training, with {chosen[1]!r} held out"
    return rows, [values.count(value) for value in chosen], note


@dataclass(frozen=True)
class _Is:
    value: Any

    def __call__(self, value: Any) -> bool:
        return value == self.value


def _preparation(repository: Repository, video: str, label: str) -> Callable:
    def prepare(rows: datasets.IterableDataset) -> datasets.IterableDataset:
        rows = rows.decode(False).select_columns([video, label])
        rows = rows.rename_columns({old: new for old, new in ((video, "video"), (label, "label")) if old != new})
        first = next(iter(rows.take(1)), {}).get("video")
        path = first.get("path") if isinstance(first, dict) and first.get("bytes") is None else first
        if not isinstance(path, str) or "://" in path:
            return rows
        (name,) = repository_names(repository, [path])
        folder = f"hf://datasets/{repository.source}@{repository.commit}/{name.removesuffix(posixpath.normpath(path))}"
        return rows.map(_Locate(folder))

    return prepare


@dataclass(frozen=True)
class _Locate:
    """Makes the path of a row an address."""

    folder: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        value = row["video"]
        path = value.get("path") if isinstance(value, dict) else value
        return row | {"video": self.folder + posixpath.normpath(path) if path else None}
