"""Limits the time of calls that may never return, such as a hanging decoder or a read from a dead network mount."""

import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any


class TimeLimit:
    """Runs calls in a separate thread, and abandons the thread if one takes too long.

    A signal would not work: Python handles it only after the call returns. libav and file reads release the GIL, so
    the waiting thread wakes up in time. Each call that hangs leaks its thread until the process ends.

    Args:
        seconds: Limit for one call; None is unlimited and uses no thread.
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
            self._calls = None  # a late result must not go to a later call
            if isinstance(interrupt, Empty):
                raise TimeoutError(f"took longer than {self.seconds:g} s") from None
            raise
        if error is not None:
            raise error
        return result

    def _start(self) -> None:
        self._calls, self._results, self._pid = SimpleQueue(), SimpleQueue(), os.getpid()
        # A daemon, so that a hanging call does not keep the process from exiting.
        threading.Thread(target=_serve, args=(self._calls, self._results), daemon=True).start()

    def __getstate__(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "_calls": None, "_results": None, "_pid": None}


def _serve(calls: SimpleQueue, results: SimpleQueue) -> None:
    while True:
        function, args = calls.get()
        try:
            answer = function(*args), None
        except BaseException as error:  # re-raised in the caller
            answer = None, error
        results.put(answer)
        del function, args, answer  # the waiting thread would keep the last clip in memory
