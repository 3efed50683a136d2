"""A folder of tensors by key, in safetensors files ("shards") that are written once and never changed.

A shard holds one tensor `features`, (rows, ...), and the keys of its rows in its metadata. Its name is the SHA-256
of its bytes: that is what it is checked against, and what keeps writers apart. A shard is written beside and
renamed, so that a process that dies loses the one that it was writing, and two processes never meet in a file.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Set
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from ..util import atomic_write
from .clip_contents import file_hash
from .tables import DataError

SUFFIX = ".safetensors"
ABANDONED = 3600  # seconds after which a file that was never renamed is taken for a dead process's


class ShardFolder:
    """Rows by key in one folder.

    Args:
        folder: It is made with the first shard.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._shards: list[torch.Tensor] = []

    def names(self) -> list[str]:
        """The shards that are there."""
        return sorted(path.name for path in self.folder.glob(f"[!.]*{SUFFIX}"))

    def check(self, name: str, needed: Set[str]) -> bool | None:
        """Whether a shard with rows that are needed is as it was written; None where it has none, or is gone.

        Of a shard without such rows only the header is read.

        Raises:
            DataError: If it cannot be read, which does not tell whether it is damaged.
        """
        path = self.folder / name
        try:
            keys = _keys(path)
            if keys is not None and needed.isdisjoint(keys):
                return None
            return file_hash(path) == name.removesuffix(SUFFIX)
        except FileNotFoundError:  # another process has removed it
            return None
        except OSError as error:
            raise DataError(
                f"data.feature_cache {path}: cannot be read ({error.strerror or error}); look at the disk and the "
                "file's permissions, or remove it, and what it holds is computed anew"
            ) from error

    def open(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Maps shards into memory; what is read of them is read from the disk when it is used.

        Args:
            names: Whole shards.

        Returns:
            For each key the number of its shard and its row in it, for `row`.

        Raises:
            OSError: If one is not there.
        """
        places = {}
        for name in names:
            with safe_open(self.folder / name, framework="pt") as file:
                keys = file.metadata()["keys"].split()
                places |= {key: (len(self._shards), row) for row, key in enumerate(keys)}
                self._shards.append(file.get_tensor("features"))
        return places

    def row(self, shard: int, row: int) -> torch.Tensor:
        """The row at a place that `open` has told."""
        return self._shards[shard][row]

    def write(self, rows: dict[str, torch.Tensor]) -> str:
        """Writes a shard and returns its name; rows have one shape and type.

        Raises:
            OSError: If the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        content = save({"features": torch.stack(list(rows.values()))}, {"keys": " ".join(rows)})
        name = hashlib.sha256(content).hexdigest() + SUFFIX
        atomic_write(self.folder / name, content)
        return name

    def remove(self, names: Iterable[str]) -> None:
        """Removes shards."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes what dead processes have left."""
        for path in self.folder.glob(".*.tmp"):
            with suppress(FileNotFoundError):  # its process renames it just now
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()


def _keys(path: Path) -> list[str] | None:
    """The keys in a shard's header; None where that is damaged."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > os.fstat(file.fileno()).st_size:
            return None
        header = file.read(size)
    try:
        return json.loads(header)["__metadata__"]["keys"].split()
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
