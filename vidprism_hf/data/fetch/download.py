"""Fetching files: from the Hub through its own client, from elsewhere by plain https. Both resume and are checked.

A file takes its name when it is whole: until then it is `<name>.part` here, and lies in the client's cache folder
there. What fails for a moment (a lost connection, a busy server) is tried again, with growing pauses, until several
tries in a row have brought nothing new.
"""

import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ...errors import first_line
from ..tables import DataError

TRIES = 5  # in a row without anything new
FIRST_PAUSE = 1.0  # seconds; doubled with each try
TIMEOUT = 60.0  # seconds without a byte
CHUNK = 1 << 20
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
console = Console(stderr=True)


def say(text: str) -> None:
    """Tells the user what is being done."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Patience:
    """Waits before a next try; gives up when too many in a row have brought nothing new."""

    def __init__(self, what: str):
        self.what, self.failures, self.reached = what, 0, -1

    def wait(self, reached: int, cause: str) -> None:
        """Waits.

        Args:
            reached: How far this try came, in any unit that grows.
            cause: Why it ended.

        Raises:
            DataError: If it is time to give up.
        """
        self.failures = 1 if reached > self.reached else self.failures + 1
        self.reached = max(reached, self.reached)
        if self.failures >= TRIES:
            raise DataError(f"{self.what}: cannot be fetched ({cause}); run again to go on from here")
        pause = FIRST_PAUSE * 2 ** (self.failures - 1)
        say(f"{self.what}: {cause}; next try in {pause:g} s")
        time.sleep(pause)


def gigabytes(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def require_space(folder: str | os.PathLike, needed: int, what: str) -> None:
    """Says how much room a download takes and makes sure that it is there.

    Args:
        folder: Where it will lie; it need not exist.
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
    say(f"{what}: needs {gigabytes(needed)} of the {gigabytes(free)} that are free below {folder}")


def remote_size(url: str) -> int:
    """The size of a file on a web server in bytes, by a HEAD request; 0 if the server does not tell.

    Raises:
        DataError: If it cannot be asked.
    """
    patience = _Patience(url)
    while True:
        try:
            with _open(url, method="HEAD") as response:
                return int(response.headers.get("Content-Length") or 0)
        except (OSError, http.client.HTTPException) as error:
            patience.wait(0, _passing(url, error))


def fetch_file(url: str, target: str | os.PathLike, show_progress: bool = True) -> Path:
    """Fetches one file by http(s), going on where an earlier try ended; a file that is there is left alone.

    Args:
        url: Address.
        target: The file to write; `<target>.part` beside it holds what there is so far.
        show_progress: Whether to draw a bar.

    Raises:
        DataError: If it cannot be fetched or written.
    """
    target = Path(target)
    if target.exists():
        return target
    part = target.with_name(target.name + ".part")
    patience = _Patience(url)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _bar(show_progress) as progress:
            task = progress.add_task(target.name, total=None)
            while True:
                try:
                    if _go_on(url, part, lambda **state: progress.update(task, **state)):
                        break
                    cause = "the connection ended early"
                except (OSError, http.client.HTTPException) as error:
                    cause = _passing(url, error)
                patience.wait(_size(part), cause)
        os.replace(part, target)
    except OSError as error:
        raise _unwritable(part, error) from error
    return target


def _go_on(url: str, part: Path, report) -> bool:
    """Appends to `part` what the server has beyond it; returns whether the file is whole."""
    have = _size(part)
    try:
        response = _open(url, headers={"Range": f"bytes={have}-"} if have else {})
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        # Nothing lies beyond: the file is whole, or it is another one by now.
        if error.headers.get("Content-Range", "").endswith(f"/{have}"):
            return True
        part.unlink()
        return False
    with response:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        resumes = response.status == http.HTTPStatus.PARTIAL_CONTENT and span is not None and int(span[1]) == have
        if response.status == http.HTTPStatus.PARTIAL_CONTENT and not resumes:
            part.unlink()  # not the bytes asked for: start again
            return False
        total = int(span[2]) if resumes else int(response.headers.get("Content-Length") or -1)
        report(completed=have if resumes else 0, total=None if total < 0 else total)
        with _opened(part, "ab" if resumes else "wb") as file:
            while chunk := response.read(CHUNK):
                _write(file, chunk)
                report(advance=len(chunk))
    if total < 0:
        return True
    if _size(part) > total:
        part.unlink()
        return False
    return _size(part) == total


# A full disk must not be taken for a bad connection: both are OSErrors.


def _opened(path: Path, mode: str) -> BinaryIO:
    try:
        return open(path, mode)
    except OSError as error:
        raise _unwritable(path, error) from error


def _write(file: BinaryIO, chunk: bytes) -> None:
    try:
        file.write(chunk)
        file.flush()
    except OSError as error:
        raise _unwritable(Path(file.name), error) from error


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{error.filename or path}: cannot be written ({error.strerror})")


def _open(url: str, method: str = "GET", headers: dict[str, str] | None = None):
    headers = {"User-Agent": "vidprism_hf", "Accept-Encoding": "identity"} | (headers or {})
    return urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=TIMEOUT)


def _passing(url: str, error: Exception) -> str:
    """What went wrong, if it may be right the next time.

    Raises:
        DataError: If it will not be.
    """
    if isinstance(error, urllib.error.HTTPError) and error.code not in PASSING_STATUS:
        raise DataError(f"{url}: cannot be fetched (HTTP status {error.code})") from error
    return first_line(error)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown)


def hub_files(
    repo: str, revision: str, patterns: tuple[str, ...], endpoint: str | None = None
) -> tuple[str, dict[str, int]]:
    """The commit of a Hub dataset and the sizes in bytes of those of its files that match a pattern.

    Args:
        repo: Dataset id.
        revision: Branch, tag or commit.
        patterns: File name patterns; `*` also matches `/`.
        endpoint: Address of the Hub, if it is not the usual one.

    Raises:
        DataError: If the Hub cannot be asked, or a pattern matches nothing.
    """
    api, patience = HfApi(endpoint=endpoint), _Patience(repo)
    while True:
        try:
            commit = api.dataset_info(repo, revision=revision).sha
            tree = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")
            sizes = {file.path: file.size for file in tree if isinstance(file, RepoFile)}
            break
        except (httpx2.HTTPError, OSError) as error:
            patience.wait(0, _passing_on_hub(repo, error))
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
        endpoint: Address of the Hub, if it is not the usual one.

    Raises:
        DataError: If a file cannot be fetched.
    """
    patience = _Patience(repo)
    settings = {"revision": commit, "allow_patterns": list(patterns), "local_dir": folder, "endpoint": endpoint}
    while True:
        try:
            snapshot_download(repo, repo_type="dataset", **settings)
            cause = "files are missing or cut off"
        except (httpx2.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: xet's for all that goes wrong
            cause = _passing_on_hub(repo, error)
        # The client gives a folder back without a complaint when it has not reached the Hub.
        whole = sum(_size(folder / name) == size for name, size in sizes.items())
        if whole == len(sizes):
            return
        patience.wait(whole, cause)


def _passing_on_hub(repo: str, error: Exception) -> str:
    """What went wrong, if it may be right the next time.

    Raises:
        DataError: If it will not be.
    """
    if isinstance(error, OfflineModeIsEnabled):
        raise DataError(f"{repo}: not on this machine, and HF_HUB_OFFLINE forbids to fetch it") from error
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OSError) and error.errno is not None:
        raise DataError(f"{error.filename or repo}: cannot be written ({error.strerror})") from error
    if status is not None and status not in PASSING_STATUS:
        raise DataError(f"{repo}: the Hub does not give it ({first_line(error)})") from error
    return first_line(error)
