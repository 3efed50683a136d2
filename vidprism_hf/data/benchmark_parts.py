"""The parts that a benchmark is fetched in, its clips and its official lists, and how each gets to its place.

A part that is being fetched has a folder `downloads/<part>`; it goes when the part is whole and in its place. So a
folder there means that a download was begun and must be finished. Archives that were fetched are removed when they are
unpacked; archives that a person put below the benchmark's folder are unpacked and kept.
"""

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from ..util import preview
from .archives import unpack
from .download import fetch_file, fetch_hub, hub_files, remote_size, require_space, say
from .tables import DataError

DOWNLOADS = "downloads"


@dataclass(frozen=True)
class HubPart:
    """Files of a dataset on the Hub.

    Attributes:
        repo: Dataset id.
        patterns: Which of its files; `*` also matches `/`.
        target: The folder below the benchmark's that they come to.
        archive: Whether they are one archive, whole or in pieces, to be unpacked.
        convert: Makes from the folder of fetched files one of other files.
        revision: Branch, tag or commit.
        endpoint: Address of the Hub, if it is not the usual one.
    """

    repo: str
    patterns: tuple[str, ...]
    target: str
    archive: bool = False
    convert: Callable[[Path], Path] | None = None
    revision: str = "main"
    endpoint: str | None = None

    def fetch(self, folder: Path, key: str) -> str:
        """Fetches the part, see `fetch_part`."""
        work = folder / DOWNLOADS / key
        if self.archive and not work.exists() and (there := self._local_archives(folder)):
            origin, archives = "local archives", there
        elif not self.archive and work.is_dir() and not any(work.iterdir()) and (folder / self.target).is_dir():
            return f"hf://datasets/{self.repo}"  # an earlier try ended when all was in its place
        else:
            origin, archives = self._download(work, f"{folder.name} ({key})")
        if self.archive:
            unpack(archives if len(archives) > 1 else archives[0], folder / self.target, strip=True)
        else:
            shutil.rmtree(work / ".cache", ignore_errors=True)  # the client's notes on what it has fetched
            _publish(self.convert(work) if self.convert else work, folder / self.target)
        return origin

    def _download(self, work: Path, what: str) -> tuple[str, list[Path]]:
        commit, sizes = hub_files(self.repo, self.revision, self.patterns, self.endpoint)
        needed = sum(sizes.values()) * (2 if self.archive else 1)
        require_space(work, max(0, needed - _bytes_below(work)), what)
        work.mkdir(parents=True, exist_ok=True)
        fetch_hub(self.repo, commit, sizes, self.patterns, work, self.endpoint)
        return f"hf://datasets/{self.repo}@{commit}", [work / name for name in sorted(sizes)]

    def _local_archives(self, folder: Path) -> list[Path]:
        names = [pattern.rsplit("/", 1)[-1] for pattern in self.patterns]
        found = [path for name in names for depth in ("", "*/") for path in folder.glob(depth + name)]
        return sorted(path for path in found if path.is_file())


@dataclass(frozen=True)
class WebFiles:
    """Files of a web server.

    Attributes:
        base: Address that they lie below, with a slash at its end.
        files: Their names there.
        target: The folder below the benchmark's that they come to.
    """

    base: str
    files: tuple[str, ...]
    target: str

    def fetch(self, folder: Path, key: str) -> str:
        """Fetches the part, see `fetch_part`."""
        for name in self.files:
            fetch_file(self.base + name, folder / self.target / name)
        return self.base


@dataclass(frozen=True)
class WebArchives:
    """Archives of a web server, named by a list there; each is fetched, unpacked and removed in turn.

    Attributes:
        base: Address that they lie below, with a slash at its end.
        index: Name of the list there: an address a line, of which the last piece counts.
        target: The folder below the benchmark's that they come to, each into a folder of its name.
        replacements: Address of an archive of clips that take the place of those of their names.
    """

    base: str
    index: str
    target: str
    replacements: str | None = None

    def fetch(self, folder: Path, key: str) -> str:
        """Fetches the part, see `fetch_part`."""
        work, target = folder / DOWNLOADS / key, folder / self.target
        work.mkdir(parents=True, exist_ok=True)
        index = fetch_file(self.base + self.index, work / self.index, show_progress=False)
        names = [line.strip().rsplit("/", 1)[-1] for line in index.read_text(errors="replace").split()]
        if not names or not all(re.fullmatch(r"\w[\w.-]*\.(tar|tar\.gz|tgz)", name) for name in names):
            index.unlink()
            raise DataError(f"{self.base}{self.index}: is no list of archives; try again, or unpack them by hand")
        missing = {name: target / re.sub(r"\.(tar|tar\.gz|tgz)$", "", name) for name in names}
        missing = {name: place for name, place in missing.items() if not place.is_dir()}
        self._check_space(folder, key, [name for name in missing if not (target / name).exists()])
        for number, (name, place) in enumerate(missing.items(), start=len(names) - len(missing) + 1):
            say(f"{folder.name} ({key}): archive {number} of {len(names)}")
            own = (target / name).exists()
            archive = target / name if own else fetch_file(self.base + name, work / name)
            unpack(archive, place)
            if not own:
                archive.unlink()
        if self.replacements:
            self._replace(work, target)
        return self.base

    def _check_space(self, folder: Path, key: str, names: list[str]) -> None:
        with ThreadPoolExecutor(8) as pool:
            sizes = list(pool.map(lambda name: remote_size(self.base + name), names))
        # Videos hardly pack, and one archive at a time lies beside what it holds.
        needed = sum(sizes) + max(sizes, default=0)
        require_space(folder, max(0, needed - _bytes_below(folder / DOWNLOADS / key)), f"{folder.name} ({key})")

    def _replace(self, work: Path, target: Path) -> None:
        unpacked = work / "replacements"
        if not unpacked.is_dir():
            unpack(fetch_file(self.replacements, work / self.replacements.rsplit("/", 1)[-1]), unpacked)
        clips = {path.name: path for path in target.glob("*/*")}
        for path in unpacked.rglob("*"):
            if path.name in clips and path.is_file():
                os.replace(path, clips[path.name])


Part = HubPart | WebFiles | WebArchives


def unfinished(folder: Path, key: str) -> bool:
    """Whether a part's download was begun and not finished."""
    return (folder / DOWNLOADS / key).is_dir()


def fetch_part(part: Part, folder: Path, key: str) -> str:
    """Fetches a part into a benchmark's folder; an earlier try is gone on with.

    Args:
        part: The part.
        folder: The benchmark's folder.
        key: The part's name.

    Returns:
        Where it came from.

    Raises:
        DataError: If it cannot be fetched, unpacked or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        origin = part.fetch(folder, key)
        work, done = folder / DOWNLOADS / key, folder / DOWNLOADS / f".{key}"
        if work.is_dir():
            shutil.rmtree(done, ignore_errors=True)
            work.rename(done)  # at once: half of a folder would count as an unfinished download
            shutil.rmtree(done, ignore_errors=True)
            if not any(work.parent.iterdir()):
                work.parent.rmdir()
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be written ({error.strerror})") from error
    return origin


def _publish(made: Path, target: Path) -> None:
    """Moves a folder, or the one folder that is all it holds, to its place; files into a folder that is there."""
    entries = [entry for entry in made.iterdir() if not entry.name.startswith(".")]
    if len(entries) == 1 and entries[0].is_dir():
        made = entries[0]
    elif all(entry.is_file() for entry in entries):
        target.mkdir(parents=True, exist_ok=True)
        for entry in entries:
            if not (target / entry.name).exists():
                os.replace(entry, target / entry.name)
        return
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if target.exists():
        raise DataError(f"{target}: is in the way of what was fetched; move it away")
    made.rename(target)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def hmdb51_lists(work: Path) -> Path:
    """Turns the Hub's tables of HMDB51 into the official lists, `<class>_test_split<n>.txt`.

    Args:
        work: Folder with `data/split<n>-*.parquet`: columns video_path, label and subset (1 train, 2 test, 0 neither).

    Raises:
        DataError: If a table has other columns.
    """
    folder = work / "lists"
    folder.mkdir(exist_ok=True)
    for split in (1, 2, 3):
        lines: dict[str, list[str]] = {}
        for path in sorted((work / "data").glob(f"split{split}-*.parquet")):
            table = pq.read_table(path)
            if not {"video_path", "label", "subset"} <= set(table.column_names):
                raise DataError(f"{path}: has columns {preview(table.column_names)}, not video_path, label, subset")
            for row in table.to_pylist():
                lines.setdefault(row["label"], []).append(f"{row['video_path'].rsplit('/', 1)[-1]} {row['subset']}")
        for label, rows in lines.items():
            (folder / f"{label}_test_split{split}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
