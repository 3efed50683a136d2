"""Notes each process that forks while it has several threads, for the test that has started it to fail.

The child of such a fork has the locks of all threads and only one of them: where it waits for another's it hangs.
`conftest` arms this in the tests' own process, `fork_watch_site/sitecustomize.py` in every Python
that they start. Programs that subprocess starts are no forks of this kind.
"""

import os
import sys
import time
import traceback

VARIABLE = "VIDPRISM_FORKS"  # the file that the stacks go to


def threads() -> list[str]:
    """Names of the native threads of this process, where /proc tells them."""
    folder, names = "/proc/self/task", []
    for number in os.listdir(folder) if os.path.isdir(folder) else ():
        try:
            with open(f"{folder}/{number}/comm") as file:
                names.append(file.read().strip())
        except OSError:  # it has ended
            pass
    return names


def check() -> None:
    """Called before each fork."""
    for _ in range(20):  # a thread that was joined is there for a moment
        if len(found := threads()) <= 1:
            return
        time.sleep(0.01)
    stack = "".join(traceback.format_stack())
    text = f"process {os.getpid()} forks with {len(found)} threads ({', '.join(found)}): {sys.argv}\n{stack}\n"
    with open(os.environ[VARIABLE], "a") as file:
        file.write(text)
    os.write(2, text.encode())


def arm() -> None:
    """Looks at every fork of this process and of those that it forks."""
    if hasattr(os, "register_at_fork") and VARIABLE in os.environ:
        os.register_at_fork(before=check)
