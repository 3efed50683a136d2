"""A Hub on loopback for tests: it speaks the Hub's HTTP API to the real clients.

It follows what the public documentation and the client's source say of the real Hub, is strict about all it
receives, and fails on request. `storage` keeps repositories and accounts; `reading`, `repos`, `uploads` and
`commits` are the endpoints; `cards` judges metadata, `xet` takes uploads by Xet, `wire` speaks HTTP, `faults`
says what breaks.
"""

import os
import secrets
import tempfile
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from . import commits, reading, repos, uploads
from .faults import Entry, Faults, new_fault
from .storage import Account, Repository, Token, folder_contents, new_secret
from .wire import Refused, Server

__all__ = ["Hub", "serve"]


class Hub:
    """A Hub that serves while its `with` block runs.

    Attributes:
        url: Its endpoint.
        store_url: Where large files lie: another origin, as on the real Hub.
        page_size: Entries on one page of a listing.
        part_size: Bytes from which large files come in parts, and the size of a part.
        repositories: By (kind, "org/name"), kind being "model", "dataset" or "space".
        requests: Every request answered so far, in the order of the answers.
        errors: What went wrong inside the server; leaving the block raises the first.
    """

    page_size = 1000
    part_size = 5 << 30

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.accounts: dict[str, Account] = {}
        self.tokens: dict[str, Token] = {}
        self.uploads: dict[str, uploads.Upload] = {}
        self.requests: list[Entry] = []
        self.errors: list[BaseException] = []
        self.faults = Faults()
        self.lock = threading.RLock()
        self.asked = threading.Condition()
        self.closed = threading.Event()

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        store_routes = reading.STORE_ROUTES + uploads.STORE_ROUTES
        routes = reading.ROUTES + repos.ROUTES + uploads.ROUTES + commits.ROUTES
        self.servers = (Server(self, routes), Server(self, store_routes, store=True))
        self.url, self.store_url = (server.url for server in self.servers)
        return self

    def __exit__(self, kind, *_):
        self.closed.set()
        for server in self.servers:
            server.close()
        self._folder.cleanup()
        if self.errors and kind is None:
            raise AssertionError("the test Hub failed inside") from self.errors[0]

    def add_model(self, name: str, folder: Path, **options) -> Repository:
        """Publish a folder as it stands as model `org/name`; options are those of `Repository`."""
        return self.add("model", name, folder, **options)

    def add_dataset(self, name: str, folder: Path, **options) -> Repository:
        """Publish a folder as it stands as dataset `org/name`; options are those of `Repository`."""
        return self.add("dataset", name, folder, **options)

    def add(self, kind: str, name: str, folder: Path, revision: str = "main", **options) -> Repository:
        """Publish a folder; a second call adds a commit with that folder's files and no others.

        Args:
            kind: "model", "dataset" or "space".
            name: "org/name".
            folder: Its files stay where they are and must not change.
            revision: The branch; a new one starts with this commit.
            options: For a new repository, `private` and `gated`.
        """
        repo = self.repositories.setdefault((kind, name), Repository(kind, name, **options))
        parent = repo.commit(revision) or repo.commit("main")
        repo.add(f"refs/heads/{revision}", parent, folder_contents(folder), "Add files", "", repo.namespace)
        return repo

    def user(self, name: str, role: str = "write", orgs: dict[str, str] | None = None) -> str:
        """A token of role "read" or "write" for a user, made if new, with these roles in organisations."""
        account = self.accounts.setdefault(name, Account(name, dict(orgs or {})))
        account.orgs.update(orgs or {})
        token = Token(new_secret(), account, role)
        self.tokens[token.secret] = token
        return token.secret

    def ticket(self, upload: uploads.Upload) -> str:
        """A name for an upload that nobody guesses."""
        name = secrets.token_hex(16)
        self.uploads[name] = upload
        return name

    def authenticate(self, header: str | None) -> Token | None:
        if header is None:
            return None
        token = self.tokens.get(header.removeprefix("Bearer "))
        if token is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return token

    def fault(self, step: str, **what):
        """Let requests of a step go wrong.

        Args:
            step: One of `faults.STEPS`, such as "create", "preupload", "batch", "upload", "verify", "commit"; or "any".
            what: One of `status=500` (with `message`, `code` for X-Error-Code, and `retry_after` in seconds),
                `reset=True` (the connection, as a dead network does), `cut=True` (the connection is closed in order,
                as a proxy does), `hang=True` (no answer until the Hub closes), `drip=0.05` (a little, then a pause of
                so many seconds, and so on), `body=b"[]"` (answered with status 200 and the type `kind`),
                `redirect=True` (to the same address) and `delay=0.5` (seconds, then as usual). `when`: "before"
                anything was done, "during" (half of the body came in; for requests without a body half of the answer
                went out) or "after" all was done and stored. What drips is, "before", the request's body, which is read
                in small pieces; "during" the answer's body, and "after" all of the answer, a byte at a time. `times`:
                1, or None for ever. `skip`: requests of the step that pass first. Faults of one step strike in the
                order given.
        """
        self.faults.waiting.append(new_fault(step, **what))

    def heal(self):
        """Forget all faults."""
        self.faults.waiting.clear()

    def log(self, entry: Entry):
        with self.asked:
            self.requests.append(entry)
            self.asked.notify_all()

    def wait_for(self, step: str, times: int = 1, timeout: float = 60):
        """Wait until so many requests of a step were answered, reset or left hanging.

        Raises:
            TimeoutError: If they do not come.
        """
        with self.asked:
            if not self.asked.wait_for(lambda: self.count(step) >= times, timeout):
                raise TimeoutError(f"{step} was asked for {self.count(step)} times instead of {times}")

    def count(self, step: str | None = None) -> int | Counter:
        """How many requests of a step came, or a count of every step."""
        steps = Counter(entry.step for entry in list(self.requests))
        return steps if step is None else steps[step]

    def environment(self, home: Path, token: str | None = None, xet: bool = False) -> dict[str, str]:
        """Environment variables for a process that uses this Hub, with caches of its own in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        own |= {"HF_TOKEN": token} if token else {}
        return kept | own | ({} if xet else {"HF_HUB_DISABLE_XET": "1"})


@contextmanager
def serve(models: dict[str, Path] | None = None, datasets: dict[str, Path] | None = None):
    """Serves {"org/name": folder} for reading until the block ends; gives the endpoint's URL."""
    with Hub() as hub:
        for name, folder in (models or {}).items():
            hub.add_model(name, folder)
        for name, folder in (datasets or {}).items():
            hub.add_dataset(name, folder)
        yield hub.url
