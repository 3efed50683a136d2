"""Faults that a test asks the Hub for, and the log of what it was asked."""

import threading
from dataclasses import dataclass, field

STEPS = (
    *("whoami", "auth", "create", "delete", "validate", "preupload", "batch", "upload", "complete", "verify"),
    *("xet-token", "commit", "branch", "tag", "discussion"),
    *("info", "tree", "paths", "refs", "commits", "resolve", "content"),
)
ANY = "any"


@dataclass
class Fault:
    """What goes wrong, how often, and when; see `Hub.fault`."""

    step: str
    status: int | None
    headers: dict[str, str]
    message: str
    code: str | None
    cut: bool
    hang: bool
    drip: float
    when: str
    times: int | None
    skip: int
    delay: float
    body: bytes | None = None
    kind: str = "application/json"
    redirect: bool = False


@dataclass(frozen=True)
class Entry:
    """One request as it was answered; `status` is 0 where no answer was sent. Holds no token."""

    step: str
    method: str
    path: str
    status: int
    user: str | None
    received: int


@dataclass
class Faults:
    """The faults still to come, in the order in which they were asked for."""

    waiting: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, step: str) -> Fault | None:
        """The fault for this request, if one is due; counts it."""
        with self.lock:
            for fault in self.waiting:
                if fault.step not in (step, ANY) or fault.times == 0:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    return None
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None


def new_fault(
    step: str,
    *,
    status: int | None = None,
    reset: bool = False,
    cut: bool = False,
    hang: bool = False,
    drip: float = 0.0,
    delay: float = 0.0,
    when: str = "before",
    retry_after: int | None = None,
    code: str | None = None,
    message: str | None = None,
    times: int | None = 1,
    skip: int = 0,
    body: bytes | None = None,
    kind: str = "application/json",
    redirect: bool = False,
) -> Fault:
    if step not in STEPS and step != ANY:
        raise ValueError(f"no step is called {step!r}; there are {', '.join(STEPS)}")
    answers = (status is not None) + (body is not None) + redirect
    if answers + reset + cut + hang + (drip > 0) + (delay > 0) != 1:
        raise ValueError("a fault has one of status, body, redirect, reset, cut, hang, drip and delay")
    if when not in ("before", "during", "after") or (when == "during" and (answers or delay)):
        raise ValueError("when is before, during (reset, cut, hang and drip only) or after")
    headers = {"Retry-After": str(retry_after)} if retry_after is not None else {}
    message = message or f"made for a test: {status}"
    return Fault(step, status, headers, message, code, cut, hang, drip, when, times, skip, delay, body, kind, redirect)
