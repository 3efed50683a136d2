"""What the test Hub keeps: contents, commits, references, pull requests, and who may do what."""

import hashlib
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

MAIN = "main"
# What the real Hub writes into .gitattributes of a new repository, as far as these tests go.
LARGE = (
    ".7z .arrow .avi .bin .bz2 .ckpt .gz .h5 .joblib .jpeg .jpg .mkv .model .mov .mp4 .npy .npz .onnx .parquet .pickle"
    " .pkl .png .pt .pth .safetensors .tar .tgz .webm .webp .xz .zip .zst"
)
LARGE_SUFFIXES = frozenset(LARGE.split())
REGULAR_LIMIT = 10 << 20  # bytes; a larger file must be a large file, whatever its name


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass(frozen=True)
class Content:
    """The bytes of one file, in memory or on disk, kept in git or as a large file."""

    source: bytes | Path
    large: bool

    @cached_property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        return sha256(self.source)

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """The id git gives to the blob: of the pointer for a large file."""
        blob = self.pointer if self.large else self.read()
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid

    def read(self, start: int = 0, end: int | None = None) -> bytes:
        if isinstance(self.source, bytes):
            return self.source[start:end]
        with open(self.source, "rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)


def sha256(source: bytes | Path) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    digest = hashlib.sha256()
    with open(source, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether the real Hub asks for this file as a large one: by name, by size, or because it is binary."""
    return size > REGULAR_LIMIT or Path(path).suffix.lower() in LARGE_SUFFIXES or b"\0" in sample


@dataclass(frozen=True)
class Commit:
    """A commit: every file of the repository, and where it came from."""

    oid: str
    parent: str | None
    files: dict[str, Content]
    title: str
    message: str
    author: str
    date: str


@dataclass
class Discussion:
    """A discussion, or a pull request if it has a reference."""

    num: int
    title: str
    author: str
    pull: bool
    base: str = MAIN
    status: str = "open"
    date: str = field(default_factory=now)
    merged_as: str | None = None

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


class Repository:
    """One repository with its history.

    Args:
        kind: "model", "dataset" or "space".
        name: "org/name".
        private: Only members and the owner see it.
        gated: Everybody sees it; only those in `allowed` read its files.
    """

    def __init__(self, kind: str, name: str, private: bool = False, gated: bool = False):
        self.kind, self.name, self.private, self.gated = kind, name, private, gated
        self.allowed: set[str] = set()
        self.creator: str | None = None
        self.created = now()
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}  # full reference -> commit
        self.discussions: dict[int, Discussion] = {}
        self.large: dict[str, Content] = {}  # sha256 -> uploaded content
        self.xet_folders: list[Path] = []  # where clients with hf-xet put theirs

    @property
    def namespace(self) -> str:
        return self.name.split("/")[0]

    @property
    def path(self) -> str:
        """The path of its page."""
        return self.name if self.kind == "model" else f"{self.kind}s/{self.name}"

    def full_ref(self, revision: str) -> str | None:
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def commit(self, revision: str) -> Commit | None:
        """The commit that a branch, tag, full reference or full commit id names; None if there is none."""
        ref = self.full_ref(revision)
        return self.commits.get(self.refs[ref] if ref else revision)

    def add(self, ref: str, parent: Commit | None, files: dict, title: str, message: str, author: str) -> Commit:
        """Store a commit and point `ref` (in full) at it."""
        told = [str(parent and parent.oid), title, message, str(len(self.commits))]
        told += [f"{path} {content.oid}" for path, content in sorted(files.items())]
        oid = hashlib.sha1("\n".join(told).encode()).hexdigest()
        commit = Commit(oid, parent and parent.oid, dict(sorted(files.items())), title, message, author, now())
        self.commits[oid] = commit
        self.refs[ref] = oid
        self.large |= {content.sha256: content for content in files.values() if content.large}
        return commit

    def history(self, commit: Commit) -> list[Commit]:
        """The commit and its ancestors, newest first."""
        line = [commit]
        while line[-1].parent:
            line.append(self.commits[line[-1].parent])
        return line


@dataclass(frozen=True)
class Account:
    """A user; `orgs` gives the role in each organisation: "admin", "write", "contributor" or "read"."""

    name: str
    orgs: dict[str, str] = field(default_factory=dict)

    def sees(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs

    def creates(self, namespace: str) -> bool:
        return namespace == self.name or self.orgs.get(namespace) in ("admin", "write", "contributor")

    def writes(self, namespace: str) -> bool:
        return namespace == self.name or self.orgs.get(namespace) in ("admin", "write")


@dataclass(frozen=True)
class Token:
    """A token of an account: role "read" or "write"."""

    secret: str = field(repr=False)
    account: Account
    role: str


def new_secret() -> str:
    return "hf_" + secrets.token_hex(17)


def folder_contents(folder: Path) -> dict[str, Content]:
    """Every file below a folder as it stands now, by its path in the repository."""
    contents = {}
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file():
            path = file.relative_to(folder).as_posix()
            with open(file, "rb") as opened:
                sample = opened.read(512)
            contents[path] = Content(file, is_large(path, file.stat().st_size, sample))
    return contents
