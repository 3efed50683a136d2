"""A time limit on calls that may never return, such as a decoder that hangs or a read from a dead network folder."""

import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any


class TimeLimit:
    """Runs calls in a thread of its own, and leaves a thread that takes too long to itself.

    A signal could not do this: Python handles it when the call returns, which a hanging one never does. libav and
    the file system work without Python's global lock, so the waiting thread wakes up in time. Each call that hangs
    costs its thread and what that holds until the process ends.

    Args:
        seconds: What one call may take; None is no limit, and no thread.
    """

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self._calls: SimpleQueue | None = None
        self._results: SimpleQueue | None = None
        self._pid: int | None = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls `function(*args)`.

        Raises:
            TimeoutError: If it does not return in time.
        """
        if self.seconds is None:
            return function(*args)
        if self._calls is None or self._pid != os.getpid():  # threads do not survive a fork
            self._start()
        self._calls.put((function, args))
        try:
            result, error = self._results.get(timeout=self.seconds)
        except BaseException as interrupt:
            self._calls = None  # its result, if one ever comes, belongs to no later call
            if isinstance(interrupt, Empty):
                raise TimeoutError(f"took longer than {self.seconds:g} s") from None
            raise
        if error is not None:
            raise error
        return result

    def _start(self) -> None:
        self._calls, self._results, self._pid = SimpleQueue(), SimpleQueue(), os.getpid()
        # A daemon: a hanging call must not keep the process from ending.
        threading.Thread(target=_serve, args=(self._calls, self._results), daemon=True).start()

    def __getstate__(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "_calls": None, "_results": None, "_pid": None}


def _serve(calls: SimpleQueue, results: SimpleQueue) -> None:
    while True:
        function, args = calls.get()
        try:
            answer = function(*args), None
        except BaseException as error:  # whatever it is belongs to the caller
            answer = None, error
        results.put(answer)
        del function, args, answer  # a waiting thread would keep the last clip alive
