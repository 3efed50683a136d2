"""A dataset repository of the Hub at one commit: its files, fetching them, and what may go wrong with either."""

import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import httpx2
from huggingface_hub import (
    get_cached_repo_tree,
    is_offline_mode,
    resolve_revision,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from ..safe_yaml import card_metadata
from .archives import archive_groups
from .download import fetch_hub
from .folder import VIDEO_EXTENSIONS
from .tables import DataError


@dataclass(frozen=True)
class Repository:
    """A dataset repository at one commit.

    Attributes:
        source: Its id, org/name.
        commit: The commit.
        files: Names and sizes in bytes of its files.
        has_configs: Whether its card says which files are which split.
    """

    source: str
    commit: str
    files: dict[str, int]
    has_configs: bool

    @classmethod
    def find(cls, source: str, revision: str | None = None) -> "Repository":
        """Looks a repository up; offline in the cache.

        Raises:
            DataError: If there is none, or it may not be read.
        """
        with hub_errors(source, revision, hint="; there is no folder of that name either"):
            found = resolve_revision(source, repo_type="dataset", revision=revision)
            # Also keeps the list of all files at that commit, for the next time.
            names = ["README.md", ".gitattributes"]  # the second one is there always: the client warns of no match
            folder = snapshot_download(source, repo_type="dataset", revision=found, allow_patterns=names)
            tree = get_cached_repo_tree(source, repo_type="dataset", revision=found)
        configs = card_metadata(Path(folder, "README.md")).get("configs")
        return cls(source, found.resolved, {file.path: file.size for file in tree}, bool(configs))

    def named(self, *extensions: str) -> list[str]:
        """The files with one of these extensions, hidden ones left out."""
        return sorted(
            name
            for name in self.files
            if posixpath.splitext(name)[1].lower() in extensions and not re.search(r"(^|/)[.]", name)
        )

    @property
    def videos(self) -> list[str]:
        """The videos in it. A picture of the card may be a .gif, code a .ts: neither makes a set of clips."""
        return self.named(*(VIDEO_EXTENSIONS - {".gif", ".ts"}))

    @property
    def archives(self) -> dict[str, list[str]]:
        """The archives in it, by name without suffix."""
        return archive_groups(name for name in self.files if not name.startswith("."))

    @property
    def is_table(self) -> bool:
        """Whether its clips are the rows of tables."""
        tables = self.named(".parquet", ".arrow")
        tables += [name for name in self.files if posixpath.basename(name) in ("metadata.csv", "metadata.jsonl")]
        return bool(tables) or self.has_configs or not (self.videos or self.archives)

    def folder(self, root: str | os.PathLike) -> Path:
        """Where below `root` its files are put."""
        return Path(root) / f"{self.source.replace('/', '--')}-{self.commit[:12]}"

    def fetch(self, names: Sequence[str], root: str | os.PathLike) -> Path:
        """Fetches files into its folder below `root`, unless they are there; returns the folder."""
        folder = self.folder(root)
        missing = {name: self.files[name] for name in names if not _has_size(folder / name, self.files[name])}
        if missing and is_offline_mode():
            raise DataError(
                f"{self.source}: {len(missing)} of {len(names)} files are not in {folder} and the Hub may not be asked "
                "(HF_HUB_OFFLINE); fetch them once with a network"
            )
        if missing:
            patterns = {posixpath.join(_top_folder(name), f"*{posixpath.splitext(name)[1]}") for name in names}
            wanted = {name: self.files[name] for name in names}
            fetch_hub(self.source, self.commit, wanted, tuple(sorted(map(_escape, patterns))), folder)
        return folder


def stated_license(source: str, revision: str | None = None) -> str | None:
    """The licence that a repository's card states, by the copy that `Repository.find` has fetched: nobody is asked.

    Returns:
        Its id on the Hub, or its own name where that is `other`; None where none is stated.
    """
    card = try_to_load_from_cache(source, "README.md", repo_type="dataset", revision=revision)
    metadata = card_metadata(Path(card)) if isinstance(card, str) else {}
    stated = metadata.get("license")
    names = [name for name in (stated if isinstance(stated, list) else [stated]) if isinstance(name, str)]
    names = [str(metadata.get("license_name") or name) if name == "other" else name for name in names]
    return ", ".join(name for name in names if name != "unknown") or None


@contextmanager
def hub_errors(source: str, revision: str | None = None, hint: str = "") -> Iterator[None]:
    """Turns what the Hub's libraries raise into one line. Their chain of causes tells more than the last of them."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # builders raise whatever the files lead them to
        raise DataError(f"{source}: {_explain(error, revision)}{hint}") from error


def _explain(error: BaseException, revision: str | None) -> str:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__

    def raised(*kinds: type) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    status = next((link.response.status_code for link in chain if isinstance(link, HfHubHTTPError)), None)
    # `datasets` cuts the chain here and leaves only its words.
    if raised(GatedRepoError) or status == 403 or "gated dataset" in str(chain[0]):
        return "is gated or closed to this account; ask for access on its page and log in with `hf auth login`"
    if raised(RevisionNotFoundError):
        return f"has no revision {revision!r}; give a branch, tag or commit of it as data.hub_revision"
    if raised(RepositoryNotFoundError) or status == 401:
        return "no such dataset on the Hub, or a private one; mend data.source, or log in with `hf auth login`"
    if raised(HFValidationError):
        return "is no dataset id; give org/name as data.source, or a folder that exists"
    if raised(OfflineModeIsEnabled):
        return "is not in the cache, and the Hub may not be asked (HF_HUB_OFFLINE); fetch it once with a network"
    if raised(RevisionResolutionError, LocalEntryNotFoundError, httpx2.TransportError) or (status or 0) >= 500:
        return "is not in the cache, and the Hub cannot be reached; try again with a network"
    if raised(datasets.exceptions.DataFilesNotFoundError):
        return "has no files that can be loaded; choose a dataset of clips"
    # A builder's own error only says that there was one.
    general = isinstance(chain[0], datasets.exceptions.DatasetGenerationError) and len(chain) > 1
    cause = str(chain[1] if general else chain[0]) or type(chain[0]).__name__
    cause = " ".join(re.sub(r"\?\S+", "", cause).split())[:300]  # addresses of files may carry a signature
    return f"cannot be loaded ({cause}); mend data.source or data.hub_config"


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _top_folder(name: str) -> str:
    return name.split("/", 1)[0] if "/" in name else ""


def _escape(pattern: str) -> str:
    return re.sub(r"[\[?]", lambda match: f"[{match[0]}]", pattern)
