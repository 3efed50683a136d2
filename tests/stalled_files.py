"""Files whose opening waits, as on a file server that does not answer."""

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def stalled(path: Path, content: bytes = b"") -> Iterator[int]:
    """A regular file that nobody else can open for the time of the block, or 45 s: this process has a lease on it.

    Yields:
        The lease, for `wait_for_reader`.
    """
    path.write_bytes(content)
    handler = signal.signal(signal.SIGIO, signal.SIG_IGN)  # which says that somebody waits
    lease = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield lease
    finally:
        os.close(lease)
        signal.signal(signal.SIGIO, handler)


def wait_for_reader(lease: int, seconds: float = 300) -> None:
    """Returns when a process waits for the file."""
    deadline = time.monotonic() + seconds
    while fcntl.fcntl(lease, fcntl.F_GETLEASE) == fcntl.F_WRLCK:
        assert time.monotonic() < deadline, "nobody has opened the file"
        time.sleep(0.1)
