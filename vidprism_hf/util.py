"""Shared helpers: atomic writes, checks for regular files, and names shortened for messages."""

import errno
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MOST_NAMES = 5  # in a message
MOST_LETTERS = 160  # per name in a message
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def preview(names: Sequence[object], most: int = MOST_NAMES, separator: str = ", ") -> str:
    """Lists the first names on one line: "a, b, c and 197 more"."""
    shown = separator.join(shorten(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def shorten(name: object, most: int = MOST_LETTERS) -> str:
    """Returns a name as one line of bounded length: escapes unprintable characters and cuts out a long middle."""
    text = str(name)
    return cut(text if text.isprintable() else repr(text), most)


def cut(text: str, most: int) -> str:
    """Shortens a text to at most `most` characters, keeping its beginning and end."""
    if len(text) <= most:
        return text
    head = (most - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (most - 5 - head) :]}"


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary file beside `path` that is renamed to it if the block succeeds, and removed if not.

    Readers see the complete file or none, even with concurrent writers. Its mode is the default for new files (0666
    minus the umask), even if a library makes its files private.
    """
    path = Path(path)
    beside = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield beside
        if stat.S_IMODE(beside.stat().st_mode) != mode:
            beside.chmod(mode)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file atomically."""
    with atomic_path(path) as beside:
        beside.write_bytes(content)


def special_kind(path: str | os.PathLike) -> str | None:
    """Returns "a FIFO", "a socket" or "a device" if that is what the path is, else None.

    Opening one may block forever or have side effects.
    """
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):  # ValueError: an impossible file name
        return None


def check_regular(path: str | os.PathLike) -> None:
    """Checks that a path can be opened without blocking.

    Raises:
        OSError: If it is a FIFO, a socket or a device. Its `strerror` completes "cannot be read (...)".
    """
    if kind := special_kind(path):
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", os.fspath(path))
