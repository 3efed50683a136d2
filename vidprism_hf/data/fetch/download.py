"""Fetches files with the Hub's client: datasets of the Hub, and plain http(s) addresses through its `http_get`.

A file gets its name once it is complete and has the right size: until then it is `<name>.part` here, or in the
client's cache folder. The client resumes, losing 10 MB at most, and retries lost connections and timeouts. It gives up
at once where a server answers 5xx or resets the connection halfway: only those are retried here, until several tries
in a row have brought nothing new.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects, hf_raise_for_status, http_backoff
from rich.console import Console

from ...errors import RETRYABLE_STATUS, DataError, describe_hub_error, first_line

TRIES = 5  # in a row without anything new
FIRST_PAUSE = 1.0  # seconds; doubled with each try
TIMEOUT = 60.0  # seconds without an answer to a HEAD request
HEADERS = {"Accept-Encoding": "identity"}  # sizes are those of the file, not of a packed answer
# What the client has retried before it raises.
RETRIED_BY_CLIENT = (
    *(httpx2.ConnectError, httpx2.TimeoutException, httpx2.RemoteProtocolError),
    LocalEntryNotFoundError,  # what `snapshot_download` makes of these
)

Result = TypeVar("Result")
console = Console(stderr=True)


def say(text: str) -> None:
    """Prints a line of progress."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def gigabytes(count: int) -> str:
    """Formats a number of bytes."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def require_space(folder: str | os.PathLike, needed: int, what: str) -> None:
    """Checks that the disk has room for a download, and says how much it takes.

    Args:
        folder: Where it goes; it need not exist.
        needed: Bytes, at the fullest moment.
        what: What is fetched.

    Raises:
        DataError: If the disk has less.
    """
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DataError(
            f"{folder}: {what} needs {gigabytes(needed)} and the disk has {gigabytes(free)} free; make room or "
            "set data.root to another disk"
        )
    say(f"{what}: needs {gigabytes(needed)} of the {gigabytes(free)} free below {folder}")


def remote_size(url: str) -> int:
    """Returns the size of a file on a web server in bytes, by a HEAD request; 0 if the server does not say.

    Raises:
        DataError: If the server cannot be asked.
    """
    return _retrying(url, lambda: _head_size(url))


def fetch_file(url: str, target: str | os.PathLike) -> Path:
    """Fetches one file by http(s), resuming an earlier try; an existing file is left alone.

    Args:
        url: Address.
        target: The file to write; `<target>.part` beside it is the file so far.

    Raises:
        DataError: If it cannot be fetched or written.
    """
    target = Path(target)
    if target.exists():
        return target
    part = target.with_name(target.name + ".part")

    def attempt() -> None:
        # The client does not notice that a file to be resumed is complete, or too long, unless it knows the size.
        size = _head_size(url) if _size(part) else None
        with open(part, "ab") as file:
            if size is not None and file.tell() > size:
                file.truncate(0)
                file.seek(0)
            known = {"resume_size": file.tell(), "expected_size": size or None}
            http_get(url, file, headers=HEADERS, displayed_filename=target.name, **known)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _retrying(url, attempt, lambda: _size(part), part)
        os.replace(part, target)
    except OSError as error:
        raise DataError(f"{error.filename or part}: cannot be written ({error.strerror})") from error
    return target


def _head_size(url: str) -> int:
    response = http_backoff("HEAD", url, headers=HEADERS, timeout=TIMEOUT, max_retries=0)
    hf_raise_for_status(response)
    return int(response.headers.get("Content-Length") or 0)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def hub_files(
    repo: str, revision: str, patterns: tuple[str, ...], endpoint: str | None = None
) -> tuple[str, dict[str, int]]:
    """Returns the commit of a Hub dataset, and the sizes in bytes of those of its files that match a pattern.

    Args:
        repo: Dataset id.
        revision: Branch, tag or commit.
        patterns: File name patterns; `*` also matches `/`.
        endpoint: Address of the Hub, if not the usual one.

    Raises:
        DataError: If the Hub cannot be asked, or a pattern matches nothing.
    """
    api = HfApi(endpoint=endpoint)
    commit = _retrying(repo, lambda: api.dataset_info(repo, revision=revision).sha)
    tree = _retrying(repo, lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")))
    sizes = {file.path: file.size for file in tree if isinstance(file, RepoFile)}
    chosen = {name: sizes[name] for name in filter_repo_objects(sizes, allow_patterns=list(patterns))}
    if not chosen:
        raise DataError(f"{repo}: the dataset has no file {' or '.join(patterns)} at {revision}")
    return commit, chosen


def fetch_hub(
    repo: str, commit: str, sizes: dict[str, int], patterns: tuple[str, ...], folder: Path, endpoint: str | None = None
) -> None:
    """Fetches files of a Hub dataset into a folder, under the names they have there.

    Args:
        repo: Dataset id.
        commit: Commit.
        sizes: Names and sizes in bytes of the files, from `hub_files`.
        patterns: The patterns given there.
        folder: Where to; files that are there are left alone.
        endpoint: Address of the Hub, if not the usual one.

    Raises:
        DataError: If a file cannot be fetched.
    """
    settings = {"revision": commit, "allow_patterns": list(patterns), "local_dir": folder, "endpoint": endpoint}

    def whole() -> int:
        return sum(_size(folder / name) == size for name, size in sizes.items())

    _retrying(repo, lambda: snapshot_download(repo, repo_type="dataset", **settings), whole)
    # The client returns a folder without an error when it has not reached the Hub.
    if whole() < len(sizes):
        raise DataError(f"{repo}: {len(sizes) - whole()} files are missing or cut off in {folder}; run again to resume")


def _retrying(
    what: str, attempt: Callable[[], Result], reached: Callable[[], int] = int, path: Path | None = None
) -> Result:
    """Returns the result of an attempt, retrying what may pass and the client does not retry.

    Args:
        what: What is fetched, for messages.
        attempt: Fetches it.
        reached: How far it is, in any unit that grows; by default nothing is kept between attempts.
        path: The file being written, for messages.

    Raises:
        DataError: If it failed for good, or too many attempts in a row brought nothing new.
    """
    failures, best = 0, -1
    while True:
        try:
            return attempt()
        except (httpx2.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: xet's for all that goes wrong
            cause = _retryable(what, error, path)
        failures, best = (1 if reached() > best else failures + 1), max(reached(), best)
        if failures >= TRIES:
            raise DataError(f"{what}: cannot be fetched ({cause}); run again to resume")
        pause = FIRST_PAUSE * 2 ** (failures - 1)
        say(f"{what}: {cause}; next try in {pause:g} s")
        time.sleep(pause)


def _retryable(what: str, error: Exception, path: Path | None) -> str:
    """Returns the cause of a failure that may pass.

    Raises:
        DataError: If it will not pass, or the client has retried it enough.
    """
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in RETRYABLE_STATUS:
        return f"HTTP status {status}"
    if isinstance(error, OfflineModeIsEnabled):
        raise DataError(f"{what}: not on this machine, and HF_HUB_OFFLINE forbids to fetch it") from error
    if isinstance(error, OSError) and error.errno is not None:
        raise DataError(f"{error.filename or path or what}: cannot be written ({error.strerror})") from error
    if status is None and not isinstance(error, RETRIED_BY_CLIENT):
        return first_line(error)
    cause = None if "://" in what else describe_hub_error(error)
    cause = cause or (first_line(error) if status is None else f"HTTP status {status}")
    advice = "; run again to resume" if status is None else ""
    raise DataError(f"{what}: cannot be fetched ({cause}){advice}") from error
