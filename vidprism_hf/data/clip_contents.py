"""What clips hold, as SHA-256 of the file's or the row's bytes, so that nothing computed of a clip outlives a change.

The hash of a file is remembered with its size, inode, modification time and change time, and taken without reading
the file as long as all four are the same. Programs may set the modification time; the change time is the kernel's
own, and every change of a file moves it. A file changed in the last seconds is not remembered: the next change might
fall into the same tick of the clock. What this trusts is a file system that keeps change times, which all usual ones
do, and a clock that nobody sets back to that very nanosecond.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..util import atomic_write, check_regular
from .tables import DataError
from .time_limit import TimeLimit

SETTLED_NS = 3 * 10**9  # a file whose last change is younger is not remembered
BLOCK = 2**20

# Size, modification time, change time and inode of a file.
Signature = tuple[int, int, int, int]


def signature(path: str) -> Signature | None:
    """What changes when a file does; None where there is no file."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def file_hash(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


class ContentHashes:
    """The hashes of clips, remembered in a file.

    Args:
        memo: The file (JSON); one that cannot be read is written anew.
        time_limit: Seconds that reading one clip may take; None is no limit.
    """

    def __init__(self, memo: Path, time_limit: float | None = None):
        self.memo = memo
        self._within = TimeLimit(time_limit)
        self._known = self._read()
        self._new: dict[str, list] = {}

    def __call__(self, video: str | bytes) -> tuple[str | None, Signature | None]:
        """The hash of a clip and, if it is a file, its signature; no hash where it cannot be read, or not in time.

        Raises:
            DataError: If it is at an address, whose content may change unseen.
        """
        if isinstance(video, bytes):
            return hashlib.sha256(video).hexdigest(), None
        if "://" in video:
            raise DataError(f"data.feature_cache: {video} may change unseen; fetch the clips first, or remove it")
        path, found = os.path.abspath(video), signature(video)
        entry = self._known.get(path)
        if found is not None and isinstance(entry, list) and entry[:-1] == list(found):
            return entry[-1], found
        now = time.time_ns()
        if not os.path.isfile(path):  # a pipe would be waited for
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
        """Writes what is new, beside what others have written; a folder that may not be written loses only time."""
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
