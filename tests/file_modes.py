"""The modes of files, which a cluster's other users depend on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """The process's umask for a while."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """The permissions of a folder, as "", and of all below it."""
    below = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: path.lstat().st_mode & 0o7777 for name, path in {"": folder, **below}.items()}
