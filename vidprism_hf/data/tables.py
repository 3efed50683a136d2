"""Tables of clips: which clips a split has, and the class index of each.

A table lives in Arrow buffers and NumPy arrays, never in Python lists: objects would be copied into every loader
process as their reference counts are touched, and its memory would grow with each epoch.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa

from ..errors import UserError


class DataError(UserError):
    """A data source that cannot be used as it is. One line: where, what is wrong, what to do."""


def stable_hash(*parts: object) -> int:
    """A number in [0, 2**63) that depends on nothing but the parts: the same in every process and version."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1


def rows_by_label(labels: np.ndarray) -> dict[int, list[int]]:
    """The rows of each label, in their order. It looks at each row once, however many labels there are."""
    order = np.argsort(labels, kind="stable")
    known, starts = np.unique(labels[order], return_index=True)
    return {int(label): rows.tolist() for label, rows in zip(known, np.split(order, starts)[1:], strict=True)}


class ClipTable(Protocol):
    """The clips of one split.

    Attributes:
        origin: What the clips belong to, for messages: a folder, or a dataset's id and split.
        labels: Class indices, (N,), int64.
    """

    origin: str
    labels: np.ndarray

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a clip is called in messages, lists and seeds; no two clips of a table share a name."""

    def video(self, index: int) -> str | bytes:
        """A clip as `decode_video` takes it: a path, a URL or the bytes of the file."""

    def select(self, indices: Sequence[int]) -> "ClipTable":
        """The table of some clips, in the order given."""


@dataclass(frozen=True, eq=False)
class FileTable:
    """Clips that are files below one folder: a `ClipTable`.

    Attributes:
        origin: The folder that the names are relative to.
        names: File names below it, (N,), as file-system bytes: they need not be valid text.
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
    """What a source of clips comes to.

    Attributes:
        train: The clips to train on.
        val: The held-out clips.
        id2label: Class index to label name.
        ignored: Files below the source that are not clips, sorted; hidden ones are not listed.
        notes: Sentences about the source that its user should see once.
        missing: Split ("train" or "val") to the clips that its list names and the disk lacks.
        description: What was read, in a phrase, where the settings do not tell: a commit, a split that was found.
    """

    train: ClipTable
    val: ClipTable
    id2label: dict[int, str]
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    description: str = ""
