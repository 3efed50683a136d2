"""The HTTP side of the test Hub: connections, bodies, ranges, and faults on the wire."""

import contextlib
import io
import json
import os
import re
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

from .faults import Entry, Fault
from .storage import Content, Token

BLOCK = 1 << 16


class Refused(Exception):
    """An answer that says no.

    Args:
        status: HTTP status.
        message: As the real Hub words it where that is known.
        code: `X-Error-Code`.
        more: Further fields of the JSON body.
    """

    def __init__(self, status: int, message: str, code: str | None = None, **more):
        super().__init__(message)
        headers = {"X-Error-Message": message.replace("\n", " ")} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, {"error": message, **more}, headers)


@dataclass
class Answer:
    """An answer: JSON for a dict or list, and a `Content` is sent in the range asked for."""

    status: int = 200
    body: dict | list | bytes | Content = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Call:
    """A request as the endpoints see it. `body` lies in a file of its own, which they may move away."""

    hub: object
    method: str
    path: str
    query: dict[str, list[str]]
    headers: object
    body: Path
    token: Token | None = None

    def json(self) -> dict:
        try:
            return json.loads(self.body.read_bytes() or b"{}")
        except ValueError as error:
            raise Refused(400, "Invalid JSON") from error

    def form(self) -> dict[str, list[str]]:
        """The fields of a form, which the client sends for paths-info."""
        return parse_qs(self.body.read_text())


@dataclass(frozen=True)
class Route:
    """One endpoint; groups of `pattern` are unquoted and passed to `answer` after the call."""

    method: str
    pattern: str
    step: str
    answer: Callable[..., Answer]


class Reset(Exception):
    """The connection is to be reset now, not closed in order."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub, routes, store = None, (), False  # set by `Server`

    def setup(self):
        super().setup()
        self.server.opened.add(self.connection)

    def finish(self):
        self.server.opened.discard(self.connection)
        super().finish()

    def serve(self):
        path, _, query = self.path.partition("?")
        method = "GET" if self.command == "HEAD" else self.command
        found = ((route, re.fullmatch(route.pattern, path)) for route in self.routes if route.method == method)
        route, match = next(((route, match) for route, match in found if match), (None, None))
        self.step, self.received, self.user, self.noted = (route.step if route else "unknown"), 0, None, False
        fault = self.hub.faults.take(self.step)
        try:
            with tempfile.TemporaryDirectory(dir=self.hub.folder) as folder:
                call = Call(self.hub, method, path, parse_qs(query), self.headers, Path(folder) / "body")
                self.respond(call, route, match, fault)
        except Reset:
            self.reset()
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        finally:
            self.note(0)

    def note(self, status: int):
        """Log the request, once, and before its answer leaves: a test may look as soon as it has the answer."""
        if not self.noted:
            path = self.path.partition("?")[0]
            self.hub.log(Entry(self.step, self.command, path, status, self.user, self.received))
        self.noted = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def respond(self, call: Call, route: Route | None, match, fault: Fault | None):
        when = fault.when if fault else None
        length = int(self.headers.get("Content-Length") or 0)
        drips = fault is not None and fault.drip > 0
        answers = fault is not None and (fault.status is not None or fault.body is not None or fault.redirect)
        if when == "before" and not answers and not drips:
            self.strike(fault)
        halfway = when == "during" and length > 0 and not drips
        self.receive(call, length // 2 if halfway else length, fault.drip if when == "before" else 0)
        if halfway:
            self.strike(fault)
        answer = None if answers and when == "before" else self.ask(call, route, match)
        if answers:
            answer = self.wrong(fault)
        elif when == "after" and not drips:
            self.strike(fault)
        self.send(answer, fault if when == "during" or (drips and when == "after") else None)

    def ask(self, call: Call, route: Route | None, match) -> Answer:
        try:
            if route is None:
                raise Refused(404, "Not Found")
            if self.headers.get("Transfer-Encoding") is not None:
                self.close_connection = True  # as the body stays unread
                raise Refused(411, "Length Required")
            if not self.store:
                call.token = self.hub.authenticate(self.headers.get("Authorization"))
                self.user = call.token.account.name if call.token else None
            elif self.headers.get("Authorization") is not None:
                raise Refused(400, "Only one auth mechanism allowed")  # a Hub token has leaked to the store
            groups = (unquote(group) if group else group for group in match.groups())
            with contextlib.nullcontext() if route.method == "GET" else self.hub.lock:
                return route.answer(call, *groups)
        except Refused as refused:
            return refused.answer
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return Refused(400, f"Malformed request: {error!r}").answer

    def wrong(self, fault: Fault) -> Answer:
        """What a fault answers."""
        if fault.redirect:
            return Answer(307, b"", {"Location": self.path})
        if fault.body is not None:
            return Answer(200, fault.body, {"Content-Type": fault.kind})
        answer = Refused(fault.status, fault.message, fault.code).answer
        answer.headers |= fault.headers
        return answer

    def receive(self, call: Call, length: int, pause: float):
        if pause:  # nothing is to lie in the system's buffers and look as if it were read
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BLOCK)
        size = BLOCK // 4 if pause else BLOCK
        with open(call.body, "wb") as file:
            while self.received < length and (block := self.rfile.read(min(size, length - self.received))):
                file.write(block)
                self.received += len(block)
                self.hub.closed.wait(pause)
        if self.received < length:
            raise ConnectionError("the client went away")

    def strike(self, fault: Fault):
        """Reset or close the connection, never answer, or only be slow."""
        if fault.delay:
            time.sleep(fault.delay)
            return
        self.note(0)
        if fault.hang:
            self.hub.closed.wait()
        raise ConnectionError if fault.hang or fault.cut else Reset

    def reset(self):
        """Close at once, so that the client's next call on this connection fails as on a dead network."""
        self.close_connection = True
        self.server.opened.discard(self.connection)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def send(self, answer: Answer, fault: Fault | None):
        status, headers, body = answer.status, dict(answer.headers), answer.body
        start, end = 0, None
        if isinstance(body, dict | list):
            body = Content(json.dumps(body).encode(), large=False)
            headers |= {"Content-Type": "application/json; charset=utf-8"}
        elif isinstance(body, bytes):
            body = Content(body, large=False)
        else:
            headers |= {"ETag": f'"{body.etag}"', "Accept-Ranges": "bytes"} | headers
            status, start, end, more = ranged(self.headers.get("Range"), body.size)
            headers |= more
        end = body.size if end is None else end
        self.note(status)
        drip = fault.drip if fault else 0
        if drip and fault.when == "after":
            self.wfile = Dripping(self.wfile, drip, self.hub.closed)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value.encode("ascii", "replace").decode())
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if drip and fault.when == "during":
            self.wfile = Dripping(self.wfile, drip, self.hub.closed)
        cut = start + (end - start) // 2 if fault and not drip else end
        while start < cut:
            block = body.read(start, min(start + BLOCK, cut))
            self.wfile.write(block)
            start += len(block)
        if drip:
            self.wfile = self.wfile.file
        elif fault:
            self.strike(fault)

    def log_message(self, *_):
        """Quiet."""


class Dripping(io.BufferedIOBase):
    """Writes a byte now and then until the Hub closes."""

    def __init__(self, file, pause: float, closed: threading.Event):
        self.file, self.pause, self.hub_closed = file, pause, closed

    def write(self, data) -> int:
        for byte in bytes(data):
            self.file.write(bytes([byte]))
            if self.hub_closed.wait(self.pause):
                raise ConnectionError("the Hub closes")
        return len(data)


def ranged(header: str | None, size: int) -> tuple[int, int, int, dict[str, str]]:
    """Status, first byte, end and headers for a Range header (or none) on `size` bytes."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if not match or not (match[1] or match[2]):
        return 200, 0, size, {}
    if match[1]:
        start, end = int(match[1]), min(int(match[2]) + 1, size) if match[2] else size
    else:
        start, end = max(size - int(match[2]), 0), size
    if start >= end:
        return 416, 0, 0, {"Content-Range": f"bytes */{size}"}
    return 206, start, end, {"Content-Range": f"bytes {start}-{end - 1}/{size}"}


class Server(ThreadingHTTPServer):
    """A server on a free port of loopback; `store` says that signed addresses stand in for tokens."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub, routes: tuple[Route, ...], store: bool = False):
        self.opened: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub, "routes": routes, "store": store}))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def handle_error(self, request, client_address):
        """A client that goes away is no error; all else is raised when the Hub closes."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            self.RequestHandlerClass.hub.errors.append(error)

    def close(self):
        self.shutdown()
        self.server_close()
        self.thread.join()
        for connection in list(self.opened):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
