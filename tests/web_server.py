"""A plain web server on loopback that serves a folder with ranges, and fails on request."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Site:
    """What a server does and has done.

    Attributes:
        url: Its address.
        cuts: Path to the numbers of bytes after which the next answers for it end.
        failures: Path to the status codes of the next answers for it.
        ranges: Whether ranges are served; if not, files come whole.
        requests: (method, path, first byte asked for) of each request.
    """

    url: str = ""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    failures: dict[str, list[int]] = field(default_factory=dict)
    ranges: bool = True
    requests: list[tuple[str, str, int]] = field(default_factory=list)

    def fetched(self, path: str) -> list[int]:
        """The first bytes asked for in the GET requests for a path."""
        return [start for method, asked, start in self.requests if (method, asked) == ("GET", path)]


@contextmanager
def serve_folder(folder: Path) -> Iterator[Site]:
    """Serves a folder until the block ends."""
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(with_body=True)

        def do_HEAD(self):
            self.answer(with_body=False)

        def answer(self, with_body: bool):
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(asked[1]) if asked and site.ranges else 0
            site.requests.append((self.command, self.path, int(asked[1]) if asked else 0))
            file = folder / self.path.lstrip("/")
            if site.failures.get(self.path):
                return self.head(site.failures[self.path].pop(0), 0)
            if not file.is_file():
                return self.head(404, 0)
            body = file.read_bytes()
            if asked and site.ranges and start >= len(body):
                return self.head(416, 0, f"bytes */{len(body)}")
            span = f"bytes {start}-{len(body) - 1}/{len(body)}" if asked and site.ranges else None
            self.head(206 if span else 200, len(body) - start, span)
            if with_body:
                cut = site.cuts[self.path].pop(0) if site.cuts.get(self.path) else None
                self.wfile.write(body[start:] if cut is None else body[start : start + cut])

        def head(self, status: int, length: int, span: str | None = None):
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            if span:
                self.send_header("Content-Range", span)
            self.end_headers()

        def log_message(self, *_):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
