"""Bounded retries and time-outs for requests to the Hub, and the classification of failures.

huggingface_hub retries some requests (preupload, LFS batch, upload, verify) but not others (create, commit, tag,
listings), has no time-outs, and waits as long as a server asks. This adds what is missing.
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
# The client's create_repo retries forever, without a pause, on an answer with this text.
BUSY = "another conflicting operation is in progress"
# Independent of a run's seed: pauses must differ between processes, and must not change the seeded state.
jitter = random.SystemRandom()
LONGEST = 1000  # characters of a message; an answer may be a whole page
MOST_BYTES = 64 << 20  # of an answer; listings, the longest, are paginated
lock = threading.RLock()
# Per thread: `until`, the deadline of the current answer, and `bytes`, the number of bytes received.
answer = threading.local()


class HubError(Exception):
    """A failure that the client itself must not retry."""


class LongWait(HubError):
    """The server asks for a longer pause than allowed."""


class Busy(HubError):
    """The server is processing another operation on the same repository."""


class GaveUp(HubError):
    """The client's own retries have failed for too long."""


class OddAnswer(HubError):
    """An answer that cannot come from a Hub, such as a proxy's login page."""


# The client's regular exceptions; it raises anything else only for answers that it does not understand.
TOLD = (
    *(HfHubHTTPError, OfflineModeIsEnabled, httpx2.TransportError, HubError),
    *(OSError, ValueError, RuntimeError, ImportError),
)
UNREADABLE = (json.JSONDecodeError, UnicodeError, RecursionError, NotImplementedError)


@dataclass(frozen=True)
class Patience:
    """Limits of retries and time-outs. All times are in seconds.

    Args:
        tries: Attempts per step, including the first.
        first_pause: Pause before the second attempt; doubled for each further one, and shortened at random by up to
            half.
        longest_pause: Maximum pause.
        longest_wait: Maximum pause that a server may ask for (Retry-After); beyond it the push fails at once. The Hub
            counts its rate limits over 300 s.
        connect_timeout: Time limit for a connection.
        timeout: Time limit without receiving a byte.
        answer_limit: Time limit from the end of a request to the end of its answer. Sending is not limited as long as
            bytes flow.
        step_limit: No attempt starts later than this after a step's first failure. Each attempt may include six of the
            client's own, so `tries` alone does not limit the time.
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
        """Returns the pause after a number of consecutive failures."""
        return min(self.first_pause * 2 ** (failures - 1), self.longest_pause) * jitter.uniform(0.5, 1.0)


@dataclass(frozen=True)
class Failure:
    """A classified exception of the client.

    Args:
        cause: One line.
        status: HTTP status, if there was an answer.
        passing: Whether it is retryable.
        wait: Pause that the server asks for, in seconds.
    """

    cause: str
    status: int | None = None
    passing: bool = False
    wait: float = 0.0


def root(error: BaseException) -> BaseException:
    """Returns the cause of the client's bare RuntimeError for a failed upload; otherwise the error itself."""
    while isinstance(error, RuntimeError) and not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def read_failure(error: BaseException) -> Failure:
    """Classifies an exception: what went wrong, and whether to retry."""
    error = root(error)
    if isinstance(error, HfHubHTTPError):
        return read_answer(error)
    if isinstance(error, OfflineModeIsEnabled):
        return Failure("HF_HUB_OFFLINE is set")
    if isinstance(error, httpx2.TimeoutException):
        return Failure(f"no answer in time ({type(error).__name__})", passing=True)
    if isinstance(error, Busy | OddAnswer | httpx2.TransportError):
        return Failure(first_line(error), passing=True)
    # hf_xet raises ConnectionError for everything, with the status in its text, after two minutes of its own retries.
    if isinstance(error, ConnectionError | TimeoutError):
        told = re.search(r"HTTP status \w+ error \((\d{3})", str(error))
        status = int(told[1]) if told else None
        return Failure(first_line(error), status, status is None or status in PASSING_STATUS)
    return Failure(first_line(error))


def understood(call: Callable[[], T]) -> T:
    """Calls the client and reads its answer.

    Raises:
        OddAnswer: If the answer is invalid: not JSON, missing fields, endless redirects. The client's regular
            exceptions pass through.
    """
    try:
        return call()
    except Exception as error:
        cause = root(error)
        if isinstance(cause, TOLD) and not isinstance(cause, UNREADABLE):
            raise
        raise OddAnswer(f"{type(cause).__name__}: {first_line(cause)}") from error


def expect(value: Any, *kinds: type) -> Any:
    """Checks the type of a value in an answer.

    Raises:
        OddAnswer: If it is not.
    """
    if type(value) not in kinds:
        raise OddAnswer(f"{reprlib.repr(value)} instead of a {kinds[0].__name__}")
    return value


def read_answer(error: HfHubHTTPError) -> Failure:
    """Classifies an answer with an error status."""
    status = error.response.status_code
    told = " ".join((error.server_message or "").split()) or f"HTTP status {status}"
    return Failure(told, status, status in PASSING_STATUS or NOT_YET_STORED in told, asked_pause(error.response))


def safe(text: str, token: str | None) -> str:
    """Returns one printable line without the token or anything like one; a server may echo it."""
    text = text.replace(token, "<token>") if token else text
    line = printable(" ".join(re.sub(r"\bhf_\w{8,}", "<token>", text).split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def asked_pause(response: httpx2.Response) -> float:
    """Returns the pause an answer asks for, in seconds: from Retry-After or the end of the Hub's rate-limit window."""
    if response.status_code not in PASSING_STATUS:
        return 0.0
    told = response.headers.get("Retry-After", "").strip()
    if told.isdigit():
        return float(told)
    window = re.search(r"\br=0\b.*?\bt=(\d+)", response.headers.get("RateLimit", "")) if not told else None
    return float(window[1]) if window and response.status_code == 429 else 0.0


class Tries:
    """Retry state of one step: its consecutive failures.

    Args:
        what: The step, for the log.
        patience: Limits.
        token: Token to hide in the log.
    """

    def __init__(self, what: str, patience: Patience, token: str | None = None):
        self.what, self.patience, self.token = what, patience, token
        self.failures, self.since = 0, math.inf

    def pause(self, error: Exception, passing: bool = False) -> None:
        """Waits before the next attempt.

        Args:
            error: The last failure.
            passing: Treats the error as retryable, whatever it is.

        Raises:
            Exception: The error, if it is not retryable or the limits are reached.
        """
        self.failures += 1
        self.since = min(self.since, time.monotonic())
        failure, patience = read_failure(error), self.patience
        pause = max(patience.pause(self.failures), failure.wait)
        is_late = time.monotonic() + pause - self.since > patience.step_limit
        if not (failure.passing or passing) or self.failures >= patience.tries or is_late:
            raise error
        told = f"{failure.cause}; retrying in {pause:.1f} s ({self.failures + 1} of {patience.tries})"
        logger.warning("%s", safe(f"{self.what}: {told}", self.token))
        time.sleep(pause)


def repeat(call: Callable[[], T], tries: Tries) -> T:
    """Retries a call until it succeeds.

    Args:
        call: An idempotent call.
        tries: Fresh retry state.

    Raises:
        Exception: The call's, if it is not retryable or the limits are reached.
    """
    while True:
        try:
            return call()
        except Exception as error:
            tries.pause(error)


@contextmanager
def bounded_client(patience: Patience) -> Iterator[None]:
    """Adds time-outs, limits on answers and limits on requested pauses to the client while the block runs.

    The client has one factory per process, so only one push runs at a time; the previous factory is restored.
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
    """Watches the client's requests, including its own retries, from any number of threads."""

    def __init__(self, patience: Patience):
        self.patience = patience
        self.timeouts = httpx2.Timeout(patience.timeout, connect=patience.connect_timeout).as_dict()
        # By host: time since which all requests fail, and the last cause.
        self.failing: dict[str, tuple[float, str]] = {}

    def ask(self, request: httpx2.Request) -> None:
        """Called before each request, including the client's own retries.

        Raises:
            GaveUp: If requests to this host have failed for too long.
        """
        since, cause = self.failing.get(request.url.host, (math.inf, ""))
        if time.monotonic() - since > self.patience.step_limit:
            raise GaveUp(cause)
        # On each request, because some of the client's calls override its time-outs with `timeout=None`.
        asked = {name: value for name, value in request.extensions.get("timeout", {}).items() if value is not None}
        request.extensions["timeout"] = self.timeouts | asked
        request.extensions["trace"] = partial(self.trace, request.url.host)

    def answered(self, response: httpx2.Response) -> None:
        """Called when an answer starts.

        Raises:
            LongWait: If the server asks for too long a pause.
            Busy: If the client would retry forever.
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
        """Records a retryable failure."""
        since, _ = self.failing.get(host, (time.monotonic(), ""))
        self.failing[host] = since, cause

    def trace(self, host: str, event: str, info: dict[str, Any]) -> None:
        """Limits the total time of an answer: time-outs apply to single reads, and a server may send slowly.

        Args:
            host: Host of the request.
            event: Event of httpx2's extension "trace".
            info: Details of the event.
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
    """Reads from a connection within the answer's limits of time and size."""
    left = getattr(answer, "until", math.inf) - time.monotonic()
    if left <= 0:
        raise httpx2.ReadTimeout("the answer takes too long")
    content = read(size, min(left, math.inf if timeout is None else timeout))
    answer.bytes = getattr(answer, "bytes", 0) + len(content)
    if answer.bytes > MOST_BYTES:
        raise OddAnswer(f"the answer is larger than {MOST_BYTES >> 20} MiB")
    return content
