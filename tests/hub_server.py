"""A read-only Hub on loopback: serves folders as model repositories, for tests of loading by Hub id."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 39 + "1"


@contextmanager
def serve(repositories: dict[str, Path]):
    """Serves {"org/name": folder} until the block ends; gives the endpoint's URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.answer(with_body=True)

        def do_HEAD(self):
            self.answer(with_body=False)

        def answer(self, with_body):
            path = self.path.partition("?")[0]
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
            info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)
            if info and info[1] in repositories:
                files = [{"rfilename": file.name} for file in sorted(repositories[info[1]].iterdir())]
                self.send(json.dumps({"id": info[1], "sha": COMMIT, "siblings": files}).encode(), with_body)
            elif file and file[1] in repositories and (repositories[file[1]] / file[2]).is_file():
                self.send((repositories[file[1]] / file[2]).read_bytes(), with_body)
            else:
                known = (file or info) and (file or info)[1] in repositories
                self.send(b"", with_body, 404, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

        def send(self, body, with_body, status=200, headers=None):
            self.send_response(status)
            etag = hashlib.sha256(body).hexdigest()
            for name, value in ({"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'} | (headers or {})).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
