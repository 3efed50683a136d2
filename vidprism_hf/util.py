"""Small pieces that every room uses: files that appear whole, files that are files, and messages of bounded length."""

import errno
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MOST_NAMES = 5  # in a message
MOST_LETTERS = 160  # of a name in a message
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def preview(names: Sequence[object], most: int = MOST_NAMES, separator: str = ", ") -> str:
    """The first names of a list, on one line: "a, b, c and 197 more"."""
    shown = separator.join(shorten(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def shorten(name: object, most: int = MOST_LETTERS) -> str:
    """A name as one line of bounded length: what cannot be printed is escaped, the middle of a long one left out."""
    text = str(name)
    return cut(text if text.isprintable() else repr(text), most)


def cut(text: str, most: int) -> str:
    """A text of at most `most` letters: of a longer one the beginning and the end."""
    if len(text) <= most:
        return text
    head = (most - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (most - 5 - head) :]}"


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A file beside `path` that takes its name when the block ends well, and goes when it does not.

    Others see the file whole or not at all, whoever else writes it at the same time. Its mode is that of any new file
    (0666 less the umask), also where a library makes its files private.
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
    """Writes a file that others see whole or not at all."""
    with atomic_path(path) as beside:
        beside.write_bytes(content)


def special_kind(path: str | os.PathLike) -> str | None:
    """What is there if it is neither a file nor a folder: "a FIFO", "a socket" or "a device".

    Opening such a thing may wait for ever, or do something; None where there is nothing.
    """
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):  # ValueError: no file has such a name
        return None


def check_regular(path: str | os.PathLike) -> None:
    """Lets pass what can be opened without waiting.

    Raises:
        OSError: If it is a FIFO, a socket or a device. Its `strerror` completes "cannot be read (...)".
    """
    if kind := special_kind(path):
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", os.fspath(path))
