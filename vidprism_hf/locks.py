"""Locks an output folder so that one run at a time writes it; the system releases the lock however the run ends."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError

PATIENCE = 10.0  # seconds, in which a stopped run may release it
INSIDE = ".lock"  # used if the parent folder is not writable
WITHOUT_LOCKS = {getattr(errno, name, None) for name in ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP")}


@contextmanager
def only_run(output: Path) -> Iterator[None]:
    """Keeps other runs out of a folder while the block runs.

    On a file system without locks it prints a warning and locks nothing.

    Raises:
        UserError: If another run has the lock, or the folder is not writable.
    """
    path = lock_path(output)
    lock = FileLock(path, timeout=PATIENCE, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"output {output}: another run is writing it; wait for it, or choose another output") from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise not_writable(output, error) from error
        print(f"{path}: no locks on this file system; make sure that no other run writes {output}", flush=True)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                path.unlink()  # before the release: a waiting run notices that the file is gone and creates a new one
            lock.release()


def lock_path(output: Path) -> Path:
    """Returns the lock file's path: beside the folder, which may be renamed, or in it where that fails (a mount)."""
    folder = output.resolve()
    fixed = os.path.ismount(folder) or (folder.is_dir() and not os.access(folder.parent, os.W_OK))
    return folder / INSIDE if fixed else folder.with_name(f"{folder.name}.lock")


def not_writable(output: Path, error: OSError) -> UserError:
    """Returns the error for a folder that cannot be created or written."""
    return UserError(f"output {output}: cannot be written ({error.strerror or error}); choose another folder")
