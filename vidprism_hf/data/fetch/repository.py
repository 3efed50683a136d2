"""Dataset repositories of the Hub at one commit: lists and fetches their files, and explains what fails."""

import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
from huggingface_hub import (
    get_cached_repo_tree,
    is_offline_mode,
    resolve_revision,
    snapshot_download,
    try_to_load_from_cache,
)

from ...errors import DataError, causes, describe_hub_error
from ...safe_yaml import card_metadata
from ..tables import VIDEO_EXTENSIONS
from .archives import archive_groups
from .download import fetch_hub


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
        """Looks a repository up on the Hub; offline in the cache.

        Raises:
            DataError: If there is no such repository, or it may not be read.
        """
        with hub_errors(source, revision):
            found = resolve_revision(source, repo_type="dataset", revision=revision)
            # Also keeps the list of all files at that commit, for the next time.
            names = ["README.md", ".gitattributes"]  # the second always exists: the client warns where nothing matches
            folder = snapshot_download(source, repo_type="dataset", revision=found, allow_patterns=names)
            tree = get_cached_repo_tree(source, repo_type="dataset", revision=found)
        configs = card_metadata(Path(folder, "README.md")).get("configs")
        return cls(source, found.resolved, {file.path: file.size for file in tree}, bool(configs))

    def named(self, *extensions: str) -> list[str]:
        """Returns the files with one of these extensions, without hidden ones."""
        return sorted(
            name
            for name in self.files
            if posixpath.splitext(name)[1].lower() in extensions and not re.search(r"(^|/)[.]", name)
        )

    @property
    def videos(self) -> list[str]:
        """Its videos. A .gif may be a picture of the card and a .ts code, so neither counts."""
        return self.named(*(VIDEO_EXTENSIONS - {".gif", ".ts"}))

    @property
    def archives(self) -> dict[str, list[str]]:
        """Its archives, by name without suffix."""
        return archive_groups(name for name in self.files if not name.startswith("."))

    @property
    def is_table(self) -> bool:
        """Whether its clips are the rows of tables."""
        tables = self.named(".parquet", ".arrow")
        tables += [name for name in self.files if posixpath.basename(name) in ("metadata.csv", "metadata.jsonl")]
        return bool(tables) or self.has_configs or not (self.videos or self.archives)

    def folder(self, root: str | os.PathLike) -> Path:
        """Returns the folder below `root` for its files."""
        return Path(root) / f"{self.source.replace('/', '--')}-{self.commit[:12]}"

    def fetch(self, names: Sequence[str], root: str | os.PathLike) -> Path:
        """Fetches files into its folder below `root`, unless they are there; returns the folder."""
        folder = self.folder(root)
        missing = {name: self.files[name] for name in names if not _has_size(folder / name, self.files[name])}
        if missing and is_offline_mode():
            raise DataError(
                f"{self.source}: {len(missing)} of {len(names)} files are not in {folder}, and HF_HUB_OFFLINE "
                "forbids to ask the Hub; fetch them once with a network"
            )
        if missing:
            patterns = {posixpath.join(_top_folder(name), f"*{posixpath.splitext(name)[1]}") for name in names}
            wanted = {name: self.files[name] for name in names}
            fetch_hub(self.source, self.commit, wanted, tuple(sorted(map(_escape, patterns))), folder)
        return folder


def stated_license(source: str, revision: str | None = None) -> str | None:
    """Returns the licence in a repository's card, read from the copy that `Repository.find` fetched: no request.

    Returns:
        Its id on the Hub, or its own name where that is `other`; None if there is none.
    """
    card = try_to_load_from_cache(source, "README.md", repo_type="dataset", revision=revision)
    metadata = card_metadata(Path(card)) if isinstance(card, str) else {}
    stated = metadata.get("license")
    names = [name for name in (stated if isinstance(stated, list) else [stated]) if isinstance(name, str)]
    names = [str(metadata.get("license_name") or name) if name == "other" else name for name in names]
    return ", ".join(name for name in names if name != "unknown") or None


@contextmanager
def hub_errors(source: str, revision: str | None = None, hint: str = "") -> Iterator[None]:
    """Turns what the Hub's libraries raise into one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # builders raise whatever the files lead them to
        raise DataError(f"{source}: {describe_hub_error(error, revision=revision) or _explain(error)}{hint}") from error


def _explain(error: Exception) -> str:
    """Describes what the files led `datasets` to."""
    if any(isinstance(link, datasets.exceptions.DataFilesNotFoundError) for link in causes(error)):
        return "has no files that can be loaded; choose a dataset of clips"
    # A builder's own error only says that there was one.
    behind = causes(error)[1:] if isinstance(error, datasets.exceptions.DatasetGenerationError) else []
    cause = next(iter(behind), error)
    text = " ".join(re.sub(r"\?\S+", "", str(cause) or type(cause).__name__).split())[:300]  # addresses may be signed
    return f"cannot be loaded ({text}); check data.source and data.hub_config"


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _top_folder(name: str) -> str:
    return name.split("/", 1)[0] if "/" in name else ""


def _escape(pattern: str) -> str:
    return re.sub(r"[\[?]", lambda match: f"[{match[0]}]", pattern)
