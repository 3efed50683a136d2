"""Opening a Hub dataset that is read as it comes, without fetching it first (`data.streaming=true`).

Labels are read, and checked, before the first video is: of parquet files no other column is fetched for that.
"""

import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

import datasets
import numpy as np

from ..util import preview
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
from .streamed_rows import StreamedRows
from .tables import DataError

ROWS_PER_SHARD = 64  # of class folders, whose rows are paths: enough shards to mix, few enough to open


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
        description: As in `ClipSplits`.
    """

    train: StreamedRows
    val: StreamedRows
    id2label: dict[int, str]
    num_train: int
    num_val: int
    notes: tuple[str, ...] = ()
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    description: str = ""


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
    splits, names, notes = opened
    for split, _, classes in splits:
        if not sum(map(len, classes)):
            raise DataError(f"{source}, split {split}: has no rows; choose another")
    train, val = (
        StreamedRows(*split, training, batch_size, seed, buffer_size)
        for split, training in zip(splits, (True, False), strict=True)
    )
    return ClipStreams(
        train,
        val,
        dict(enumerate(names)),
        train.num_rows,
        val.num_rows,
        notes=tuple(notes),
        description=f"commit {repository.commit[:12]}, split {train.split}, held out {val.split}, streamed",
    )


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
            f"{preview(sorted(clips)) or 'none'}; set data.streaming=false, or name others as data.train_split"
        )
    if val_split is None:
        notes.append(f"{source}: folder {held_out} is held out; data.val_split chooses another")
    names = sorted({label for _, label in clips[train_split]})
    labels = Labels("label", tuple(names), {name: index for index, name in enumerate(names)})
    opened = []
    for split in (train_split, held_out):
        address = f"hf://datasets/{source}@{repository.commit}/"
        classes = labels.encode([label for _, label in clips[split]], f"{source}, {split}")
        rows = [{"video": address + name} for name, _ in clips[split]]
        starts = range(0, len(rows), ROWS_PER_SHARD)
        shards = [rows[start : start + ROWS_PER_SHARD] for start in starts]
        data = datasets.IterableDataset.from_generator(_flatten, gen_kwargs={"shards": shards})
        opened.append((split, data, np.split(classes, starts[1:])))
    return opened, names, notes


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

    @cache
    def read(split: str, *names: str) -> list[list[tuple]]:
        return _columns(builder, data, split, names)

    labels = find_labels(source, features, label_column, lambda names: list(chain(*read(train, *names))), label_names)
    held_out = val_split or next((name for name in HELD_OUT_SPLITS if name in data and name != train), None)
    if held_out is not None:
        choose_split(source, list(data), held_out, "val_split")
        opened = [
            (split, data[split], shard_classes(read(split, labels.column), labels, f"{source}, split {split}"))
            for split in (train, held_out)
        ]
        if val_split is None:
            notes.append(f"{source}: split {held_out!r} is held out; data.val_split chooses another")
    else:
        opened, note = _by_subset(source, data, train, labels, read)
        notes.append(note)
    return [(split, _prepare(rows, repository, video), classes) for split, rows, classes in opened], labels.names, notes


def _columns(builder, data, split: str, names: Sequence[str]) -> list[list[tuple]]:
    """The values of some columns in each shard; of parquet files no others are read."""
    with hub_errors(builder.repo_id):
        if hasattr(builder.config, "columns"):
            settings = {"name": builder.config.name, "revision": builder.hash, "columns": list(names)}
            rows = datasets.load_dataset_builder(builder.repo_id, **settings).as_streaming_dataset(split)
        else:
            rows = data[split].decode(False).select_columns(list(names))
        shards = (rows.shard(rows.num_shards, index, contiguous=False) for index in range(rows.num_shards))
        return [[tuple(row[name] for name in names) for row in shard] for shard in shards]


def shard_classes(shards: list[list[tuple]], labels: Labels, where: str) -> list[np.ndarray]:
    """Class indices of the rows of each shard, which begin with their labels.

    Raises:
        DataError: If a row has no label or an unknown one.
    """
    classes = labels.encode([row[0] for row in chain(*shards)], where)
    return np.split(classes, np.cumsum([len(shard) for shard in shards])[:-1])


def _by_subset(source: str, data, train: str, labels: Labels, read: Callable[..., list[list[tuple]]]):
    column = subset_column(data[train].features)
    shards = read(train, labels.column, column) if column else []
    chosen = subset_values({value for _, value in chain(*shards)})
    if chosen is None:
        raise DataError(f"{source}: has no held-out split but {preview([*data], 9)}; name one as data.val_split")
    opened = []
    for value in chosen:
        rows = data[train].decode(False).filter(_Is(value), input_columns=[column])
        kept = [[row for row in shard if row[1] == value] for shard in shards]
        opened.append((train, rows, shard_classes(kept, labels, f"{source}, {column} {value}")))
    return opened, f"{source}: rows with {column} {chosen[0]!r} are for training, with {chosen[1]!r} held out"


@dataclass(frozen=True)
class _Is:
    value: Any

    def __call__(self, value: Any) -> bool:
        return value == self.value


def _prepare(rows: datasets.IterableDataset, repository: Repository, video: str) -> datasets.IterableDataset:
    """Rows of nothing but `video`, undecoded; a path becomes an address."""
    rows = rows.decode(False).select_columns([video])
    rows = rows if video == "video" else rows.rename_column(video, "video")
    with hub_errors(repository.source):
        first = next(iter(rows.take(1)), {}).get("video")
    path = first.get("path") if isinstance(first, dict) and first.get("bytes") is None else first
    if not isinstance(path, str) or "://" in path:
        return rows
    (name,) = repository_names(repository, [path])
    folder = f"hf://datasets/{repository.source}@{repository.commit}/{name.removesuffix(posixpath.normpath(path))}"
    return rows.map(_Locate(folder))


@dataclass(frozen=True)
class _Locate:
    """Makes the path of a row an address."""

    folder: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        value = row["video"]
        path = value.get("path") if isinstance(value, dict) else value
        return row | {"video": self.folder + posixpath.normpath(path) if path else None}
