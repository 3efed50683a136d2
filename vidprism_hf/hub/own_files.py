"""The files of an export, read without following what leads out of it.

A folder that comes from somebody else may hold links to this machine's secrets, and what is read from an export is
published. A file is read only if it lies in the folder itself, behind any number of links, or where the Hub's cache
keeps the files of the same repository. What was checked is what is opened. Hard links cannot be told from other files.
"""

import os
import re
import stat
from collections.abc import Collection
from pathlib import Path

from ..errors import UserError, printable

BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # as the Hub's cache names them
CACHED = "models--"
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class NotOwn(UserError):
    """Something in an export that is not a file or folder of its own."""


def open_own(folder: Path, name: str) -> int:
    """Opens a file of an export for reading, and returns its descriptor.

    Args:
        folder: The export; it may be a link itself.
        name: Path in it.

    Raises:
        NotOwn: If it lies elsewhere, or is not a regular file.
        OSError: If it cannot be read.
    """
    base, path = located(folder, name)
    # Part by part, and through no link: a folder may become one meanwhile.
    at = os.open(base, READ | os.O_DIRECTORY)
    try:
        for part in path.parent.parts:
            inner = os.open(part, READ | os.O_DIRECTORY, dir_fd=at)
            os.close(at)
            at = inner
        check_regular(folder, name, os.stat(path.name, dir_fd=at, follow_symlinks=False))
        opened = os.open(path.name, READ | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)
    try:
        check_regular(folder, name, os.fstat(opened))
    except NotOwn:
        os.close(opened)
        raise
    return opened


def read_own(folder: Path, name: str) -> bytes:
    """The content of a file of an export; raises as `open_own` does."""
    with open(open_own(folder, name), "rb") as file:
        return file.read()


def list_own(folder: Path, folders: Collection[str]) -> tuple[list[str], list[str]]:
    """The files of an export, sorted, and the folders there that are not listed further.

    Args:
        folder: The export.
        folders: Names of those whose files are listed, too.

    Raises:
        NotOwn: If there is a link that leaves the folder, or something that is not a file or folder.
    """
    files, others = [], []
    for place in ("", *folders):
        if place and not os.path.isdir(folder / place):
            continue
        for entry in os.scandir(folder / place):
            name = os.path.join(place, entry.name)
            if entry.is_symlink():
                located(folder, name)
            if not entry.is_dir():
                check_regular(folder, name, entry.stat())
                files.append(name)
            elif name not in folders:
                others.append(f"{name}/")
            elif entry.is_symlink():
                raise NotOwn(f"{folder / printable(name)}: is a link to a folder; put the folder itself there")
    return sorted(files), sorted(others)


def located(folder: Path, name: str) -> tuple[Path, Path]:
    """Where a file of an export lies: the folder, that one itself or the blobs of its repository, and its path in it.

    Raises:
        NotOwn: If it lies elsewhere.
    """
    root, target = (Path(os.path.realpath(path)) for path in (folder, folder / name))
    if target.is_relative_to(root):
        return root, target.relative_to(root)
    blobs = root.parent.parent / "blobs"
    is_cached = root.parent.name == "snapshots" and blobs.parent.name.startswith(CACHED)
    if is_cached and target.parent == blobs and BLOB.fullmatch(target.name):
        return blobs, Path(target.name)
    told = "is a link that leaves the folder; put the file itself there, or remove it"
    raise NotOwn(f"{folder / printable(name)}: {told}")


def check_regular(folder: Path, name: str, found: os.stat_result) -> None:
    """Refuses devices, pipes and the like, of which reading may never end."""
    if not stat.S_ISREG(found.st_mode):
        raise NotOwn(f"{folder / printable(name)}: is neither a file nor a folder; remove it")
