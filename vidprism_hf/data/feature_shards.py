"""A folder of tensors by key, in safetensors files ("shards") that are written once and never changed.

A shard holds one tensor `features`, (rows, ...), and the keys of its rows in its metadata. Its name is the SHA-256
of its bytes: that is what it is checked against, and what keeps writers apart. A shard is written beside and
renamed, so that a process that dies loses the one that it was writing, and two processes never meet in a file.
"""

import hashlib
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from .clip_contents import file_hash, write_whole

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

    def is_whole(self, name: str) -> bool:
        """Whether a shard is as it was written; one that another process has removed is not."""
        try:
            return file_hash(self.folder / name) == name.removesuffix(SUFFIX)
        except OSError:
            return False

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
        write_whole(self.folder / name, content)
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
