"""Where the official lists of a benchmark lie below its folder, in the layouts that people have them in."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..util import check_regular
from .benchmark_parts import DOWNLOADS
from .folder import VIDEO_EXTENSIONS
from .list_files import read_label_names


class Absent(Exception):
    """An official list is not there."""


@dataclass(frozen=True)
class Lists:
    """What `scan_lists` is given, and the official files that it comes from."""

    source: Path
    train: Path
    val: Path
    label_names: Path | None
    official: tuple[Path, ...]


def find_ucf101(folder: Path, split: int, scratch: Path) -> Lists:
    """Finds the lists of UCF101.

    Args:
        folder: The benchmark's folder.
        split: Number of the official split, from 1.
        scratch: A folder for lists that are made from the official ones.

    Raises:
        Absent: If an official list is not there.
    """
    names = _find(folder, "classInd.txt")
    train, val = (_find(folder, f"{name}list{split:02d}.txt") for name in ("train", "test"))
    return Lists(_with_classes(folder, read_label_names(names).names), train, val, names, (names, train, val))


def find_hmdb51(folder: Path, split: int, scratch: Path) -> Lists:
    """Finds the lists of HMDB51 and makes two of them, see `find_ucf101`."""
    suffix = f"_test_split{split}.txt"
    folder_of_lists = _find(folder, f"*{suffix}").parent
    official = {path.name.removesuffix(suffix): path for path in folder_of_lists.glob(f"*{suffix}")}
    rows: dict[str, list[str]] = {"1": [], "2": []}  # a clip's number: 1 training, 2 test, 0 neither
    for label in sorted(official):
        check_regular(official[label])
        for line in official[label].read_text("utf-8", "surrogateescape").split("\n"):
            clip, _, use = line.strip().rpartition(" ")
            if use in rows:
                rows[use].append(f"{label}/{clip.strip()}\t{label}\n")
    train, val = scratch / f"hmdb51_train_split{split}.txt", scratch / f"hmdb51_test_split{split}.txt"
    train.write_text("".join(rows["1"]), "utf-8", "surrogateescape")
    val.write_text("".join(rows["2"]), "utf-8", "surrogateescape")
    return Lists(_with_classes(folder, sorted(official)), train, val, None, tuple(sorted(official.values())))


def find_k400(folder: Path, split: int, scratch: Path) -> Lists:
    """Finds the lists of Kinetics-400, see `find_ucf101`."""
    train, val = _find(folder, "train.csv"), _find(folder, "val.csv", "validate.csv", "validation.csv")
    return Lists(folder, train, val, None, (train, val))


def find_ssv2(folder: Path, split: int, scratch: Path) -> Lists:
    """Finds the lists of Something-Something v2, see `find_ucf101`."""
    names, train, val = (
        _find(folder, f"{name}.json", f"something-something-v2-{name}.json")
        for name in ("labels", "train", "validation")
    )
    clips = [
        path
        for path in _folders(folder)
        if any(os.path.splitext(entry.name)[1].lower() in VIDEO_EXTENSIONS for entry in _entries(path))
    ]
    return Lists(clips[0] if len(clips) == 1 else folder, train, val, names, (names, train, val))


def _find(folder: Path, *names: str) -> Path:
    """The file of one of these names in a folder or at most two levels below it."""
    for name in names:
        for parent in _folders(folder):
            for path in sorted(parent.glob(name)):
                check_regular(path)
                return path
    raise Absent(names[0])


def _folders(folder: Path) -> Iterator[Path]:
    """A folder and those at most two levels below it, hidden ones and downloads aside."""
    level = [folder] if folder.is_dir() else []
    for depth in range(3):
        yield from level
        if depth < 2:
            level = [Path(entry.path) for parent in level for entry in _entries(parent) if entry.is_dir()]
            level = [path for path in level if path != folder / DOWNLOADS and not path.name.startswith(".")]


def _entries(folder: Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:  # asks the disk for no file of its own, of which there may be 220,000
        return sorted(entries, key=lambda entry: entry.name)


def _with_classes(folder: Path, labels: list[str]) -> Path:
    """The folder that holds the class folders."""
    return next((path for path in _folders(folder) if any((path / label).is_dir() for label in labels)), folder)
