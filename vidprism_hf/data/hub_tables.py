"""Tables of a Hub dataset: which column has the videos, which the labels, which rows are held out; rows as clips."""

import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..util import preview
from .hub_repository import Repository, hub_errors
from .lists import read_label_names
from .tables import ClipSplits, ClipTable, DataError, FileTable, rows_by_label, stable_hash

HELD_OUT_SPLITS = ("validation", "val", "test")
VIDEO_COLUMNS = (
    *("video", "video_path", "video_file", "video_bytes", "file_name", "filename", "file_path", "filepath"),
    *("path", "clip", "clip_path", "mp4"),
)
LABEL_COLUMNS = ("label", "labels", "class", "action", "category", "target", "label_name", "class_name", "action_name")
NAME_COLUMNS = ("label_name", "label_text", "label_str", "class_name", "action_name", "class", "action", "category")
SUBSET_COLUMNS = ("subset", "split")
# The numbers are those of HMDB51's official lists, in which 0 is for clips that a split does not use.
SUBSETS = {"train": ("train", "training", 1), "held out": ("validation", "valid", "val", "test", "testing", 2)}


@dataclass(frozen=True, eq=False)
class HubTable:
    """Clips that are rows of a Hub dataset, with their videos in them: a `ClipTable`.

    Attributes:
        origin: The dataset's id and split.
        split: The split's name.
        videos: The split's only needed column, `video`, of type Video(decode=False).
        rows: Row in the split of each clip, (N,), int64.
        labels: Class indices, (N,), int64.
    """

    origin: str
    split: str
    videos: datasets.Dataset
    rows: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """The row, and the file name that it gives: `train[12] v_run_g01.mp4`."""
        row = int(self.rows[index])
        path = self.videos.data.column("video")[row]["path"].as_py()
        return f"{self.split}[{row}]" + (f" {posixpath.basename(path)}" if path else "")

    def video(self, index: int) -> str | bytes:
        """The bytes of the file, or its path. A row without a video gives no bytes, which no decoder takes."""
        video = self.videos[int(self.rows[index])]["video"] or {}
        return video.get("bytes") or video.get("path") or b""

    def select(self, indices: Sequence[int]) -> "HubTable":
        chosen = np.asarray(indices, dtype=np.int64)
        return HubTable(self.origin, self.split, self.videos, self.rows[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Labels:
    """The label column of a dataset.

    Attributes:
        column: Its name.
        names: Label names in the order of their indices.
        index: Class index of each value in the column.
    """

    column: str
    names: tuple[str, ...]
    index: dict[Any, int]

    def encode(self, values: Sequence[Any], where: str) -> np.ndarray:
        """Class indices of some values, (N,), int64.

        Raises:
            DataError: If a value is no label; -1 and none stand for a label that is kept secret.
        """
        unknown = next((row for row, value in enumerate(values) if value not in self.index), None)
        if unknown is not None:
            value = values[unknown]
            if value in (None, -1):
                raise DataError(f"{where}: row {unknown} has no label; choose another split as data.val_split")
            raise DataError(f"{where}: row {unknown} has label {value!r}, which no training clip has; mend the dataset")
        return np.array([self.index[value] for value in values], dtype=np.int64)


def load_splits(repository: Repository, config: str | None) -> dict[str, datasets.Dataset]:
    """Fetches all splits of a configuration, without decoding any video.

    Raises:
        DataError: If it cannot be loaded.
    """
    with hub_errors(repository.source):
        builder = datasets.load_dataset_builder(repository.source, name=config, revision=repository.commit)
        if builder.hash != repository.commit:  # offline `datasets` takes what it has
            raise DataError(f"{repository.source}: offline, and commit {repository.commit[:12]} is not in the cache")
        builder.download_and_prepare()
        return dict(builder.as_dataset())


def choose_split(source: str, splits: Sequence[str], asked: str, field: str) -> str:
    """The split that is asked for.

    Raises:
        DataError: If there is none of that name.
    """
    if asked not in splits:
        raise DataError(f"{source}: has no split {asked!r} but {preview(splits, 9)}; name one as data.{field}")
    return asked


def find_video_column(source: str, features: datasets.Features, asked: str | None) -> str:
    """The column with the videos.

    Raises:
        DataError: If there is none.
    """
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Video)]
    usual = [name for name in VIDEO_COLUMNS if name in features and _may_hold_videos(features[name])]
    column = asked or next(iter(typed or usual), None)
    if column is None or column not in features or not _may_hold_videos(features[column]):
        what = "has no column of videos or their paths" if asked is None else f"column {asked!r} holds no videos"
        raise DataError(f"{source}: {what}; its columns are {preview([*features], 20)}: name one as data.video_column")
    return column


def _may_hold_videos(feature: Any) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("string", "large_string", "binary", "large_binary")
    return isinstance(feature, datasets.Video) or (isinstance(feature, dict) and bool({"bytes", "path"} & set(feature)))


def find_labels(
    source: str,
    features: datasets.Features,
    asked: str | None,
    read: Callable[[Sequence[str]], list[tuple]],
    label_names: str | None = None,
) -> Labels:
    """The label column and its names.

    Names are those of a ClassLabel, in its order; else the texts of the training split, sorted. Numbers get their
    names from `label_names`, or from a column that gives each number a text of its own: numbers alone would make
    a model that cannot say what it has seen.

    Args:
        source: The dataset's id, for messages.
        features: Its columns.
        asked: The column, if the user names one.
        read: Gives the values of some columns in all rows of the training split.
        label_names: File of label names.

    Raises:
        DataError: If there is no label column, or its labels have no names.
    """
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = sorted((name for name in LABEL_COLUMNS if name in features), key=lambda name: name not in typed)
    column = asked or (typed[0] if len(typed) == 1 else next(iter(usual), None))
    if column is None or column not in features:
        what = f"has no column {asked!r}" if asked else "has no column of labels"
        raise DataError(f"{source}: {what}; its columns are {preview([*features], 20)}: name one as data.label_column")
    feature = features[column]
    if isinstance(feature, datasets.ClassLabel):
        return Labels(column, tuple(feature.names), {index: index for index in range(feature.num_classes)})
    kind = feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
    if kind in ("string", "large_string"):
        names = sorted({value for (value,) in read([column]) if value is not None})
        return Labels(column, tuple(names), {name: index for index, name in enumerate(names)})
    if not re.fullmatch(r"u?int\d+", kind):
        raise DataError(
            f"{source}: column {column!r} of type {kind} holds no labels; name another as data.label_column"
        )
    if label_names is not None:
        names, index = read_label_names(label_names)
        return Labels(column, tuple(names), index)
    texts = [name for name in NAME_COLUMNS if name != column and _is_text(features.get(name))]
    pairs = sorted(set(read([column, texts[0]]))) if texts else []
    if (
        not pairs
        or len(pairs) != len({number for number, _ in pairs})
        or len(pairs) != len({text for _, text in pairs})
    ):
        raise DataError(
            f"{source}: labels in {column!r} are numbers without names; give their names as data.label_names, or a "
            "column of texts as data.label_column"
        )
    return Labels(column, tuple(text for _, text in pairs), {number: index for index, (number, _) in enumerate(pairs)})


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def subset_column(features: datasets.Features) -> str | None:
    """The column that may tell training from held-out rows within a split."""
    return next((name for name in SUBSET_COLUMNS if isinstance(features.get(name), datasets.Value)), None)


def subset_values(values: set) -> tuple[Any, Any] | None:
    """The values that stand for training and held-out rows; None if they do not look like that."""
    spelled = {value.lower() if isinstance(value, str) else value: value for value in values if value is not None}
    found = [next((spelled[name] for name in names if name in spelled), None) for names in SUBSETS.values()]
    return None if None in found else tuple(found)


@dataclass
class HubTables:
    """The splits of a dataset, on the way to clips."""

    repository: Repository
    root: str | os.PathLike
    data: dict[str, datasets.Dataset]
    allow_missing: bool = False
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        return self.repository.source

    def splits(self, train_split, val_split, video_column, label_column, label_names, val_fraction, seed) -> ClipSplits:
        train = choose_split(self.source, list(self.data), train_split, "train_split")
        features = self.data[train].features
        video = find_video_column(self.source, features, video_column)
        labels = find_labels(self.source, features, label_column, self._reader(train), label_names)
        rows = self._split_rows(train, val_split, val_fraction)
        tables = [
            self._table(role, split, chosen, video, labels)
            for role, (split, chosen) in zip(("train", "val"), rows, strict=False)
        ]
        if len(tables) == 1:
            tables = _hold_out(tables[0], val_fraction, seed)
        notes = (*self.notes, *_missing_notes(*tables, labels))
        return ClipSplits(*tables, id2label=dict(enumerate(labels.names)), notes=notes, missing=self.missing)

    def _reader(self, split: str) -> Callable[[Sequence[str]], list[tuple]]:
        table = self.data[split].data
        return lambda columns: list(zip(*(table.column(name).to_pylist() for name in columns), strict=True))

    def _split_rows(self, train: str, val: str | None, fraction: float | None):
        """Which rows of which splits are for training and held out; only training where a fraction decides."""
        every = {split: np.arange(len(data)) for split, data in self.data.items()}
        if val is not None and fraction is not None:
            raise DataError("data.val_fraction: data.val_split says already what is held out; remove one of them")
        if fraction is not None:
            return [(train, every[train])]
        held_out = val or next((name for name in HELD_OUT_SPLITS if name in self.data and name != train), None)
        if held_out is not None:
            choose_split(self.source, list(self.data), held_out, "val_split")
            if held_out == train:
                raise DataError(f"data.val_split={val}: is the training split; choose another, or data.val_fraction")
            if val is None:
                self.notes.append(f"{self.source}: split {held_out!r} is held out; data.val_split chooses another")
            return [(train, every[train]), (held_out, every[held_out])]
        column = subset_column(self.data[train].features)
        values = self.data[train].data.column(column).to_pylist() if column else []
        chosen = subset_values(set(values))
        if chosen is None:
            raise DataError(
                f"{self.source}: has no held-out split but {preview([*self.data], 9)}; name one as data.val_split or "
                "hold out a share with data.val_fraction"
            )
        rows = [np.array([row for row, value in enumerate(values) if value == wanted]) for wanted in chosen]
        unused = len(values) - sum(map(len, rows))
        unused = f"; {unused} others are not used" if unused else ""
        self.notes.append(
            f"{self.source}: rows with {column} {chosen[0]!r} are for training, with {chosen[1]!r} held out{unused}"
        )
        return [(train, rows[0]), (train, rows[1])]

    def _table(self, role: str, split: str, rows: np.ndarray, video: str, labels: Labels) -> ClipTable:
        data = self.data[split]
        origin = f"{self.source}, split {split}"
        values = data.data.column(labels.column).take(pa.array(rows)).to_pylist()
        classes = labels.encode(values, origin)
        videos = data.select_columns([video])
        videos = videos if video == "video" else videos.rename_column(video, "video")
        videos = videos.cast_column("video", datasets.Video(decode=False))
        column = videos.data.column("video")
        if pc.any(pc.is_valid(pc.struct_field(column, "bytes"))).as_py():
            return HubTable(origin, split, videos, rows, classes)
        paths = pc.struct_field(column, "path").take(pa.array(rows)).to_pylist()
        if None in paths:
            raise DataError(f"{origin}: row {rows[paths.index(None)]} has no video; mend the dataset")
        cached = re.compile(rf"(.*/snapshots/{self.repository.commit})/(.+)")
        matches = [cached.fullmatch(path) for path in paths]
        if all(matches) and matches:
            return _unique(FileTable.from_lists(matches[0][1], [match[2] for match in matches], classes), origin)
        if all(os.path.isabs(path) for path in paths):
            return HubTable(origin, split, videos, rows, classes)
        return self._files(role, origin, paths, classes)

    def _files(self, role: str, origin: str, paths: list[str], classes: np.ndarray) -> FileTable:
        """The table of rows that name files in the repository, which are fetched."""
        names = repository_names(self.repository, paths)
        kept = [row for row, name in enumerate(names) if name in self.repository.files]
        missing = tuple(name for name in names if name not in self.repository.files)
        if missing and not (self.allow_missing and kept):
            hint = "allow it with data.allow_missing"
            if self.repository.archives:
                hint = "if its clips are in its archives, give its lists as data.train_list and data.val_list"
            raise DataError(f"{origin}: {len(missing)} clips are not in the repository, like {missing[0]}; {hint}")
        if missing:
            self.missing[role] = missing
            what = f"{len(missing)} of {len(names)} clips are not in the repository and are left out"
            self.notes.append(f"{origin}: {what}, like {missing[0]}")
        folder = self.repository.fetch(sorted({names[row] for row in kept}), self.root)
        return _unique(FileTable.from_lists(folder, [names[row] for row in kept], classes[kept]), origin)


def repository_names(repository: Repository, paths: Sequence[str]) -> list[str]:
    """The files of a repository that the paths in a column name: as they are, or below one folder of it."""
    names = [posixpath.normpath(path) for path in paths]
    if names[0] not in repository.files:
        found = [name for name in repository.files if name.endswith(f"/{names[0]}")]
        if len(found) == 1:
            names = [found[0].removesuffix(names[0]) + name for name in names]
    return names


def _unique(table: FileTable, origin: str) -> FileTable:
    counts = pc.value_counts(table.names)
    twice = pc.filter(counts.field("values"), pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise DataError(f"{origin}: {os.fsdecode(twice[0].as_py())} is in more than one row; mend the dataset")
    return table


def _hold_out(table: ClipTable, fraction: float, seed: int) -> list[ClipTable]:
    """Divides a table class by class, as scan_folder does with clips in folders."""
    if not 0 < fraction < 1:
        raise DataError(f"data.val_fraction={fraction}: must lie between 0 and 1, like 0.2")
    held_out = np.zeros(len(table), dtype=bool)
    for rows in rows_by_label(table.labels).values():
        count = min(max(int(len(rows) * fraction + 0.5), 1), len(rows) - 1)
        held_out[sorted(rows, key=lambda row: stable_hash(seed, table.name(row)))[:count]] = True
    if not held_out.any():
        raise DataError(f"{table.origin}: no class has a second clip to hold out; give data.val_split")
    return [table.select(np.flatnonzero(~held_out)), table.select(np.flatnonzero(held_out))]


def _missing_notes(train: ClipTable, val: ClipTable, labels: Labels) -> Iterator[str]:
    for table, what in ((train, "training"), (val, "held-out")):
        if not len(table):
            raise DataError(f"{table.origin}: has no {what} clips; choose another split")
        missing = len(labels.names) - len(np.unique(table.labels))
        if missing:
            yield f"{table.origin}: {missing} of {len(labels.names)} labels have no {what} clip"
