"""Hashes the content of videos (SHA-256 of the file's or row's bytes), so that cached results never outlive a change.

A file's hash is cached with its size, inode, modification time and change time, and reused without reading the file
while all four are unchanged. Programs can set the modification time, but the kernel updates the change time on every
change. A file changed in the last seconds is not cached, since another change might fall into the same clock tick. This
relies on a file system with change times, as all common ones have, and on a clock that is not set back to the same
nanosecond.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...util import atomic_write, check_regular
from ..reading.time_limit import TimeLimit
from ..tables import DataError

SETTLED_NS = 3 * 10**9  # files changed more recently are not cached
BLOCK = 2**20

# Size, modification time, change time and inode of a file.
Signature = tuple[int, int, int, int]


def signature(path: str) -> Signature | None:
    """Returns a value that changes whenever the file does; None if there is no file."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def file_hash(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


class ContentHashes:
    """Hashes of videos, cached in a file.

    Args:
        memo: The cache file (JSON); an unreadable one is replaced.
        time_limit: Seconds that reading one video may take; None is unlimited.
    """

    def __init__(self, memo: Path, time_limit: float | None = None):
        self.memo = memo
        self._within = TimeLimit(time_limit)
        self._known = self._read()
        self._new: dict[str, list] = {}

    def __call__(self, video: str | bytes) -> tuple[str | None, Signature | None]:
        """Returns the hash of a video, None if it cannot be read in time, and the signature if it is a file.

        Raises:
            DataError: If it is a URL, whose content may change unnoticed.
        """
        if isinstance(video, bytes):
            return hashlib.sha256(video).hexdigest(), None
        if "://" in video:
            raise DataError(f"data.feature_cache: {video} may change unnoticed; download it, or remove the setting")
        path, found = os.path.abspath(video), signature(video)
        entry = self._known.get(path)
        if found is not None and isinstance(entry, list) and entry[:-1] == list(found):
            return entry[-1], found
        now = time.time_ns()
        if not os.path.isfile(path):  # reading a pipe would block
            return None, found
        try:
            content = self._within(file_hash, path)
        except (OSError, TimeoutError):
            return None, found
        if signature(path) != found:
            return None, found  # it is being written
        if now - found[2] > SETTLED_NS:
            self._new[path] = [*found, content]
        return content, found

    def save(self) -> None:
        """Merges new hashes into the file; without write permission they are recomputed next time."""
        if not self._new:
            return
        with suppress(OSError), FileLock(self.memo.with_name(f".{self.memo.name}.lock")):
            self._known = self._read() | self._new
            atomic_write(self.memo, json.dumps(self._known, allow_nan=False).encode())
            self._new = {}

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self.memo.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}
