"""Tables of videos: the videos of a split and the class index of each.

A table is stored in Arrow buffers and NumPy arrays, never in Python lists: loader processes would copy those objects
as they touch their reference counts, and memory would grow with each epoch.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa

from ..errors import DataError as DataError

# fmt: off
VIDEO_EXTENSIONS = frozenset({
    ".3gp", ".asf", ".avi", ".divx", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv",
})
# fmt: on


def is_video(name: str) -> bool:
    """Checks whether a file name has a video's extension."""
    return os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS


def stable_hash(*parts: object) -> int:
    """Hashes the parts to a number in [0, 2**63) that is the same in every process and Python version."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1


def rows_by_label(labels: np.ndarray) -> dict[int, list[int]]:
    """Returns the rows of each label, in order, in one pass over the rows."""
    order = np.argsort(labels, kind="stable")
    known, starts = np.unique(labels[order], return_index=True)
    return {int(label): rows.tolist() for label, rows in zip(known, np.split(order, starts)[1:], strict=True)}


class ClipTable(Protocol):
    """The videos of one split.

    Attributes:
        origin: Where the videos come from, for messages: a folder, or a dataset's id and split.
        labels: Class indices, (N,), int64.
    """

    origin: str
    labels: np.ndarray

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Returns the name of a video in messages, annotations and seeds; it is unique within the table."""

    def video(self, index: int) -> str | bytes:
        """Returns a video as `decode_video` takes it: a path, a URL or the bytes of the file."""

    def select(self, indices: Sequence[int]) -> "ClipTable":
        """Returns a table of the given rows, in the order given."""


@dataclass(frozen=True, eq=False)
class FileTable:
    """A `ClipTable` of files below one folder.

    Attributes:
        origin: The folder that the names are relative to.
        names: File names below it, (N,), as file-system bytes, since they may not be valid text.
        labels: Class indices, (N,), int64.
    """

    origin: str
    names: pa.Array
    labels: np.ndarray

    @classmethod
    def from_lists(cls, origin: str | os.PathLike, names: Sequence[str], labels: Sequence[int]) -> "FileTable":
        """Builds a table from file names relative to `origin` and their class indices."""
        encoded = pa.array([os.fsencode(name) for name in names], type=pa.large_binary())
        return cls(str(origin), encoded, np.array(labels, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index].as_py())

    def video(self, index: int) -> str:
        return os.path.join(self.origin, self.name(index))

    def select(self, indices: Sequence[int]) -> "FileTable":
        chosen = np.asarray(indices, dtype=np.int64)
        return FileTable(self.origin, self.names.take(pa.array(chosen)), self.labels[chosen])


@dataclass(frozen=True, eq=False)
class ClipSplits:
    """The training and validation splits of a source.

    Attributes:
        train: The training videos.
        val: The validation videos.
        id2label: Class index to label name.
        ignored: Files below the source that are not videos, sorted; hidden files are not listed.
        notes: Sentences about the source to show the user once.
        missing: Split ("train" or "val") to its annotated videos that are not on disk.
        description: One phrase on what was read that the settings do not say, such as a commit or a detected split.
    """

    train: ClipTable
    val: ClipTable
    id2label: dict[int, str]
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    description: str = ""
