"""Reads the files of an export without following links that leave it.

A folder from somebody else may have links to this machine's secrets, and files read from an export are published. A
file is read only if its target is in the folder itself or among the same repository's blobs in the Hub's cache. The
file that was checked is the one that is opened. Hard links cannot be detected.
"""

import os
import re
import stat
from collections.abc import Collection
from pathlib import Path

from ..errors import UserError, printable

BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # names in the Hub's cache
CACHED = "models--"
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class NotOwn(UserError):
    """An entry of an export is not a file or folder of its own."""


def open_own(folder: Path, name: str) -> int:
    """Opens a file of an export for reading and returns its descriptor.

    Args:
        folder: The export; may be a link itself.
        name: Path in it.

    Raises:
        NotOwn: If its target is elsewhere, or not a regular file.
        OSError: If it cannot be read.
    """
    base, path = located(folder, name)
    # Part by part and without following links: a folder may be replaced by one meanwhile.
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
    """Returns the content of an export's file; raises like `open_own`."""
    with open(open_own(folder, name), "rb") as file:
        return file.read()


def list_own(folder: Path, folders: Collection[str]) -> tuple[list[str], list[str]]:
    """Lists the files of an export, sorted, and its other folders.

    Args:
        folder: The export.
        folders: Names of folders whose files are listed too.

    Raises:
        NotOwn: If there is a link that leaves the folder, or an entry that is not a file or folder.
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
    """Returns the real folder of an export's file, the export or its repository's blobs, and the path in it.

    Raises:
        NotOwn: If it is elsewhere.
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
    """Rejects devices, pipes etc., which may block forever when read."""
    if not stat.S_ISREG(found.st_mode):
        raise NotOwn(f"{folder / printable(name)}: is neither a file nor a folder; remove it")
