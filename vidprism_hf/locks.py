"""One run at a time in a folder: a lock that the system takes back however the run ends."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError

PATIENCE = 10.0  # seconds: one that was told to end may be about to
INSIDE = ".lock"  # in a folder beside which nothing can be written
WITHOUT_LOCKS = {getattr(errno, name, None) for name in ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP")}


@contextmanager
def only_run(output: Path) -> Iterator[None]:
    """Keeps other runs out of a folder.

    Where the file system knows no locks, which is told, nothing is kept out.

    Raises:
        UserError: If another run has it, or nothing can be written there.
    """
    path = lock_path(output)
    lock = FileLock(path, timeout=PATIENCE, fallback_to_soft=False)  # a soft one would outlive a kill
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"output {output}: another run is writing it; wait for it, or choose another output") from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise not_writable(output, error) from error
        print(f"{path}: no locks on this file system; see that no other run writes {output}", flush=True)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                path.unlink()  # while it is held: whoever waits for it sees that it is gone, and makes a new one
            lock.release()


def lock_path(output: Path) -> Path:
    """Beside the folder, which may be renamed; in it, where that cannot be, as where another disk is mounted."""
    folder = output.resolve()
    fixed = os.path.ismount(folder) or (folder.is_dir() and not os.access(folder.parent, os.W_OK))
    return folder / INSIDE if fixed else folder.with_name(f"{folder.name}.lock")


def not_writable(output: Path, error: OSError) -> UserError:
    """What to say of a folder that cannot be made or written."""
    return UserError(f"output {output}: cannot be written ({error.strerror or error}); choose another folder")
