"""A folder of tensors by key, in write-once safetensors files ("shards").

A shard has one tensor `features`, (rows, ...), and its row keys in the metadata. Its name is the SHA-256 of its bytes,
which verifies it and avoids name clashes. Shards are written atomically: a process that dies loses only the one that it
was writing.
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

from ...util import atomic_write
from ..fetch.contents import file_hash
from ..tables import DataError

SUFFIX = ".safetensors"
ABANDONED = 3600  # seconds after which a temporary file is assumed to be left by a dead process


class ShardFolder:
    """Rows by key in one folder.

    Args:
        folder: Created with the first shard.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._shards: list[torch.Tensor] = []

    def names(self) -> list[str]:
        """Returns the names of the existing shards."""
        return sorted(path.name for path in self.folder.glob(f"[!.]*{SUFFIX}"))

    def check(self, name: str, needed: Set[str]) -> bool | None:
        """Checks whether a shard with needed rows is intact; None if it has none or no longer exists.

        Reads only the header of a shard without needed rows.

        Raises:
            DataError: If it cannot be read, so that it may or may not be damaged.
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
                f"data.feature_cache {path}: cannot be read ({error.strerror or error}); check the disk and the file's "
                "permissions, or remove it to have its rows recomputed"
            ) from error

    def open(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Memory-maps shards; rows are read from disk when used.

        Args:
            names: Intact shards.

        Returns:
            Shard number and row of each key, for `row`.

        Raises:
            OSError: If one does not exist.
        """
        places = {}
        for name in names:
            with safe_open(self.folder / name, framework="pt") as file:
                keys = file.metadata()["keys"].split()
                places |= {key: (len(self._shards), row) for row, key in enumerate(keys)}
                self._shards.append(file.get_tensor("features"))
        return places

    def row(self, shard: int, row: int) -> torch.Tensor:
        """Returns the row at a place that `open` returned."""
        return self._shards[shard][row]

    def write(self, rows: dict[str, torch.Tensor]) -> str:
        """Writes a shard and returns its name; all rows have the same shape and dtype.

        Raises:
            OSError: If the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        content = save({"features": torch.stack(list(rows.values()))}, {"keys": " ".join(rows)})
        name = hashlib.sha256(content).hexdigest() + SUFFIX
        atomic_write(self.folder / name, content)
        return name

    def remove(self, names: Iterable[str]) -> None:
        """Removes shards by name."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes temporary files of dead processes."""
        for path in self.folder.glob(".*.tmp"):
            with suppress(FileNotFoundError):  # its process has just renamed it
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()


def _keys(path: Path) -> list[str] | None:
    """Returns the keys in a shard's header; None if it is damaged."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > os.fstat(file.fileno()).st_size:
            return None
        header = file.read(size)
    try:
        return json.loads(header)["__metadata__"]["keys"].split()
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
