"""Talking to a Hub that may fail: bounded repeats with pauses and time-outs, and what a failure means.

huggingface_hub repeats some requests (preupload, LFS batch, upload, verify) and not others (create, commit, tag,
listings), knows no time-outs, and waits as long as a server asks for. Here is what it lacks.
"""

import json
import logging
import math
import random
import re
import reprlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import _http as client

from ..errors import first_line, printable

T = TypeVar("T")
logger = logging.getLogger(__name__)
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# The commit endpoint's answers to a parent that is no longer the head, and to an upload that it does not see yet.
MOVED_STATUS = frozenset({409, 412})
NOT_YET_STORED = "LFS pointer pointed to a file that does not exist"
# create_repo of the client repeats for ever, and without a pause, on an answer with these words.
BUSY = "another conflicting operation is in progress"
# Pauses differ between processes whatever a run has seeded, and leave the seeded state alone.
jitter = random.SystemRandom()
LONGEST = 1000  # characters of a message: an answer may be a whole page
MOST_BYTES = 64 << 20  # of an answer; the longest, a listing, comes in pages
lock = threading.RLock()
# `until`: when the answer that a thread waits for must be there; `bytes`: that have come of it.
answer = threading.local()


class HubError(Exception):
    """A failure that the client must not repeat itself."""


class LongWait(HubError):
    """The server asks for a pause longer than we wait."""


class Busy(HubError):
    """The server is at work on the same repository."""


class GaveUp(HubError):
    """The client's own tries have failed for long enough."""


class OddAnswer(HubError):
    """An answer that cannot be one of the Hub's, such as the page of a proxy that wants a log-in."""


# What the client tells of a failure by; all else that it raises comes of answers that it does not understand.
TOLD = (
    *(HfHubHTTPError, OfflineModeIsEnabled, httpx2.TransportError, HubError),
    *(OSError, ValueError, RuntimeError, ImportError),
)
UNREADABLE = (json.JSONDecodeError, UnicodeError, RecursionError, NotImplementedError)


@dataclass(frozen=True)
class Patience:
    """How often and how long.

    Args:
        tries: Of a step, the first one counted.
        first_pause: Seconds before the second try; doubled with each try, and up to half of it is left off at random.
        longest_pause: Seconds.
        longest_wait: Seconds that a server may ask for (Retry-After); if it asks for more, we give up at once.
            The Hub counts its rate limits over 300 s.
        connect_timeout: Seconds until a connection stands.
        timeout: Seconds without a byte.
        answer_limit: Seconds from the end of a request to the end of its answer. Sending takes as long as bytes flow.
        step_limit: Seconds after the first failure of a step in which another try begins. The client's own tries,
            of which each of ours may hold six, make it more than `tries` alone tells.
    """

    tries: int = 5
    first_pause: float = 1.0
    longest_pause: float = 30.0
    longest_wait: float = 300.0
    connect_timeout: float = 15.0
    timeout: float = 90.0
    answer_limit: float = 180.0
    step_limit: float = 600.0

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return min(self.first_pause * 2 ** (failures - 1), self.longest_pause) * jitter.uniform(0.5, 1.0)


@dataclass(frozen=True)
class Failure:
    """What an exception of the client says.

    Args:
        cause: One line.
        status: HTTP status, if an answer came.
        passing: Whether it may be right the next time.
        wait: Seconds that the server asks to wait.
    """

    cause: str
    status: int | None = None
    passing: bool = False
    wait: float = 0.0


def root(error: BaseException) -> BaseException:
    """The cause of what the client raises for a failed upload, a bare RuntimeError; else the error itself."""
    while isinstance(error, RuntimeError) and not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def read_failure(error: BaseException) -> Failure:
    """What went wrong, and whether to try again."""
    error = root(error)
    if isinstance(error, HfHubHTTPError):
        return read_answer(error)
    if isinstance(error, OfflineModeIsEnabled):
        return Failure("HF_HUB_OFFLINE is set")
    if isinstance(error, httpx2.TimeoutException):
        return Failure(f"no answer in time ({type(error).__name__})", passing=True)
    if isinstance(error, Busy | OddAnswer | httpx2.TransportError):
        return Failure(first_line(error), passing=True)
    # hf_xet raises ConnectionError for all, with the status in its words; it has tried for two minutes by then.
    if isinstance(error, ConnectionError | TimeoutError):
        told = re.search(r"HTTP status \w+ error \((\d{3})", str(error))
        status = int(told[1]) if told else None
        return Failure(first_line(error), status, status is None or status in PASSING_STATUS)
    return Failure(first_line(error))


def understood(call: Callable[[], T]) -> T:
    """Calls the client, and reads its answer.

    Raises:
        OddAnswer: If the client, or who reads the answer, stumbles over it: no JSON, other fields, redirects without
            an end. What the client says of a failure itself comes through.
    """
    try:
        return call()
    except Exception as error:
        cause = root(error)
        if isinstance(cause, TOLD) and not isinstance(cause, UNREADABLE):
            raise
        raise OddAnswer(f"{type(cause).__name__}: {first_line(cause)}") from error


def expect(value: Any, *kinds: type) -> Any:
    """A value of an answer, if it is of one of these kinds.

    Raises:
        OddAnswer: If it is not.
    """
    if type(value) not in kinds:
        raise OddAnswer(f"{reprlib.repr(value)} where a {kinds[0].__name__} belongs")
    return value


def read_answer(error: HfHubHTTPError) -> Failure:
    """What an answer with an error status says."""
    status = error.response.status_code
    told = " ".join((error.server_message or "").split()) or f"HTTP status {status}"
    return Failure(told, status, status in PASSING_STATUS or NOT_YET_STORED in told, asked_pause(error.response))


def safe(text: str, token: str | None) -> str:
    """One printable line without the token, nor what looks like one: a server may send it back."""
    text = text.replace(token, "<token>") if token else text
    line = printable(" ".join(re.sub(r"\bhf_\w{8,}", "<token>", text).split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def asked_pause(response: httpx2.Response) -> float:
    """Seconds that an answer asks to wait: Retry-After as a number, or the end of the Hub's rate-limit window."""
    if response.status_code not in PASSING_STATUS:
        return 0.0
    told = response.headers.get("Retry-After", "").strip()
    if told.isdigit():
        return float(told)
    window = re.search(r"\br=0\b.*?\bt=(\d+)", response.headers.get("RateLimit", "")) if not told else None
    return float(window[1]) if window and response.status_code == 429 else 0.0


class Tries:
    """The failures of one step, in a row.

    Args:
        what: The step, for the log.
        patience: How often, and how long.
        token: Which the log does not show.
    """

    def __init__(self, what: str, patience: Patience, token: str | None = None):
        self.what, self.patience, self.token = what, patience, token
        self.failures, self.since = 0, math.inf

    def pause(self, error: Exception, passing: bool = False) -> None:
        """Waits before the next try.

        Args:
            error: Why there is to be one.
            passing: That the error is one that passes, whatever it says.

        Raises:
            Exception: The error, if there is to be none.
        """
        self.failures += 1
        self.since = min(self.since, time.monotonic())
        failure, patience = read_failure(error), self.patience
        pause = max(patience.pause(self.failures), failure.wait)
        is_late = time.monotonic() + pause - self.since > patience.step_limit
        if not (failure.passing or passing) or self.failures >= patience.tries or is_late:
            raise error
        told = f"{failure.cause}; next try in {pause:.1f} s ({self.failures + 1} of {patience.tries})"
        logger.warning("%s", safe(f"{self.what}: {told}", self.token))
        time.sleep(pause)


def repeat(call: Callable[[], T], tries: Tries) -> T:
    """Calls until it works.

    Args:
        call: Does no harm when it is done twice.
        tries: How often; none of them is used up.

    Raises:
        Exception: Of the call, when it will not be right the next time or was not often enough.
    """
    while True:
        try:
            return call()
        except Exception as error:
            tries.pause(error)


@contextmanager
def bounded_client(patience: Patience) -> Iterator[None]:
    """Gives the client time-outs, ends of answers, and bounds on what a server may ask for, while the block runs.

    The client knows one factory for the whole process, so that one push at a time is under way in it; the factory
    that was there before comes back.
    """
    with lock:
        before = getattr(client, "_GLOBAL_CLIENT_FACTORY", client.default_client_factory)
        bounds = Bounds(patience)

        def factory() -> httpx2.Client:
            made = before()
            hooks = made.event_hooks
            asking, answered = hooks.get("request", []), hooks.get("response", [])
            made.event_hooks = {"request": [*asking, bounds.ask], "response": [*answered, bounds.answered]}
            return made

        set_client_factory(factory)
        try:
            yield
        finally:
            set_client_factory(before)


class Bounds:
    """What becomes of the client's requests while its own tries go on; several threads may send at once."""

    def __init__(self, patience: Patience):
        self.patience = patience
        self.timeouts = httpx2.Timeout(patience.timeout, connect=patience.connect_timeout).as_dict()
        # By host: since when every request to it fails, and why the last one did.
        self.failing: dict[str, tuple[float, str]] = {}

    def ask(self, request: httpx2.Request) -> None:
        """Called before each request, those of the client's own tries too.

        Raises:
            GaveUp: If requests to this host have failed for too long.
        """
        since, cause = self.failing.get(request.url.host, (math.inf, ""))
        if time.monotonic() - since > self.patience.step_limit:
            raise GaveUp(cause)
        # For each request: some of the client's calls set aside its time-outs with `timeout=None`.
        asked = {name: value for name, value in request.extensions.get("timeout", {}).items() if value is not None}
        request.extensions["timeout"] = self.timeouts | asked
        request.extensions["trace"] = partial(self.trace, request.url.host)

    def answered(self, response: httpx2.Response) -> None:
        """Called when an answer begins.

        Raises:
            LongWait: If the server asks for too long a pause.
            Busy: If the client would go on asking for ever.
        """
        asked = asked_pause(response)
        if asked > self.patience.longest_wait:
            raise LongWait(f"the Hub asks for a pause of {asked:.0f} s")
        if response.status_code == 409:
            response.read()
            if BUSY in response.text:
                raise Busy(BUSY)
        if response.status_code in PASSING_STATUS:
            self.failed(response.url.host, f"status {response.status_code}")
        else:
            self.failing.pop(response.url.host, None)

    def failed(self, host: str, cause: str) -> None:
        """Takes note of a request that may work the next time."""
        since, _ = self.failing.get(host, (time.monotonic(), ""))
        self.failing[host] = since, cause

    def trace(self, host: str, event: str, info: dict[str, Any]) -> None:
        """Gives each answer an end: time-outs are those of single reads, and a server may drip.

        Args:
            host: That the request is for.
            event: What is done for a request, as httpx2's extension "trace" tells.
            info: More of it.
        """
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            stream = info["return_value"]
            stream.read = partial(read_in_time, stream.read)
        elif event.endswith(".send_request_headers.started"):
            answer.until, answer.bytes = math.inf, 0
        elif event.endswith(".receive_response_headers.started"):
            answer.until = time.monotonic() + self.patience.answer_limit
        elif event.endswith(".failed"):
            self.failed(host, first_line(info["exception"]))


def read_in_time(read: Callable[..., bytes], size: int, timeout: float | None = None) -> bytes:
    """Reads from a connection while there is time for the answer, and room."""
    left = getattr(answer, "until", math.inf) - time.monotonic()
    if left <= 0:
        raise httpx2.ReadTimeout("the answer does not end")
    content = read(size, min(left, math.inf if timeout is None else timeout))
    answer.bytes = getattr(answer, "bytes", 0) + len(content)
    if answer.bytes > MOST_BYTES:
        raise OddAnswer(f"the answer is larger than {MOST_BYTES >> 20} MiB")
    return content
