"""Folders of class folders: the list of clips, their labels, and which of them are held out.

Two layouts are read. Either the split is in the folders,

    source/train/<class>/...    source/val/<class>/...

or there is one level, `source/<class>/...`, and exactly one rule says which clips are held out.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..util import check_regular, preview, special_kind
from .tables import ClipSplits, DataError, FileTable, stable_hash

# fmt: off
VIDEO_EXTENSIONS = frozenset({
    ".3gp", ".asf", ".avi", ".divx", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv",
})
# fmt: on
TRAIN_FOLDER = "train"
HELD_OUT_FOLDERS = ("val", "validation", "test")


def scan_folder(
    source: str | os.PathLike,
    val_fraction: float | None = None,
    val_list: str | os.PathLike | None = None,
    val_pattern: str | None = None,
    seed: int = 0,
) -> ClipSplits:
    """Lists the clips of a folder of class folders and splits them.

    With `source/train` the held-out clips are those of `source/val`, else of `source/validation`, else of
    `source/test`, and no rule may be given. With one level of class folders one rule must be given. Class
    folders are searched to any depth, links are followed; hidden files and folders are skipped.

    Args:
        source: The folder.
        val_fraction: Share of each class to hold out, between 0 and 1. Which clips is decided by a hash of
            the seed and each clip's name: the order of listing and the other classes have no influence.
        val_list: A text file that names the held-out clips, one path relative to `source` a line, like
            `bend/daria_bend.avi`. Empty lines and lines that begin with `#` are skipped.
        val_pattern: A regular expression; clips in which it is found are held out. It is searched in the
            clip's path below its class folder: `daria_bend.avi` for `source/bend/daria_bend.avi`,
            `day1/take2.mp4` for `source/bend/day1/take2.mp4`.
        seed: Seed of `val_fraction`.

    Raises:
        DataError: If the folder, a class folder or the rule cannot be used.
    """
    root = Path(source)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "no such folder"
        raise DataError(f"{root}: {what}; give a folder of class folders as data.source, or demo")
    rules = {"val_fraction": val_fraction, "val_list": val_list, "val_pattern": val_pattern}
    rules = {f"data.{name}": value for name, value in rules.items() if value is not None}
    try:
        held_out = _held_out_folder(root)
        if held_out is None:
            return _split_one_level(root, rules, seed)
        if rules:
            raise DataError(
                f"{root}: is split into {TRAIN_FOLDER}/ and {held_out}/ already; remove {next(iter(rules))}"
            )
        return _read_split_folders(root, held_out)
    except OSError as error:
        raise DataError(
            f"{error.filename}: cannot be read ({error.strerror}); change its permissions or remove it"
        ) from error


@dataclass(frozen=True)
class _Listing:
    """Clips per class, as paths relative to the source with `/` between folders, and the files left out."""

    clips: dict[str, list[str]]
    ignored: list[str]


def _visible(names: Sequence[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))


def _folders(path: Path) -> list[str]:
    return _visible([entry.name for entry in os.scandir(path) if entry.is_dir()])


def _held_out_folder(root: Path) -> str | None:
    """The name of the held-out folder if the source is split by folders, None if it has one level."""
    # A folder of that name which holds clips and no folders is a class that happens to be called so.
    present = [
        name
        for name in (TRAIN_FOLDER, *HELD_OUT_FOLDERS)
        if (root / name).is_dir() and (_folders(root / name) or not _visible(os.listdir(root / name)))
    ]
    if not present:
        return None
    held_out = [name for name in present if name != TRAIN_FOLDER]
    if TRAIN_FOLDER not in present:
        raise DataError(f"{root}: has {held_out[0]}/ but no {TRAIN_FOLDER}/; add it")
    if not held_out:
        raise DataError(f"{root}: has {TRAIN_FOLDER}/ but none of {', '.join(HELD_OUT_FOLDERS)}; add one")
    return held_out[0]


def _walk(folder: Path) -> Iterator[tuple[str, str, str | None]]:
    """Yields every visible file, following links: its path below `folder`, its real path, and its `special_kind`."""
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        real = os.path.realpath(folder / relative)
        with os.scandir(folder / relative) as entries:
            for entry in entries:
                name = relative + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(f"{name}/")
                    continue
                # Resolving every file would dominate the scan of a large set: only links need it.
                real_path = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                # So would asking for the kind of each, which the listing tells of files and folders.
                yield name, real_path, None if entry.is_file() else special_kind(entry.path)


def _list_classes(folder: Path, root: Path, seen: dict[str, str] | None = None) -> _Listing:
    """Lists `folder/<class>/...` with paths relative to `root`; `seen` maps real paths to clips so far."""
    seen = {} if seen is None else seen
    prefix = "" if folder == root else folder.relative_to(root).as_posix() + "/"
    ignored = [prefix + name for name in _visible([e.name for e in os.scandir(folder) if not e.is_dir()])]
    clips: dict[str, list[str]] = {}
    for label in _folders(folder):
        clips[label] = []
        for name, real, kind in _walk(folder / label):
            clip = f"{prefix}{label}/{name}"
            if os.path.splitext(name)[1].lower() not in VIDEO_EXTENSIONS:
                ignored.append(clip)
                continue
            if kind:
                raise DataError(f"{root / clip}: is {kind}, not a regular file; remove it")
            if real in seen:
                raise DataError(f"{root}: {clip} and {seen[real]} are the same file; remove one of them")
            seen[real] = clip
            clips[label].append(clip)
        if not clips[label]:
            raise DataError(
                f"{folder / label}: class folder without clips; remove it, or add clips "
                f"({', '.join(sorted(VIDEO_EXTENSIONS))})"
            )
        clips[label].sort()
    if not clips:
        raise DataError(f"{folder}: has no class folders; put the clips of each class in a folder of its name")
    return _Listing(clips, ignored)


def _read_split_folders(root: Path, held_out: str) -> ClipSplits:
    seen: dict[str, str] = {}
    train = _list_classes(root / TRAIN_FOLDER, root, seen)
    val = _list_classes(root / held_out, root, seen)
    unknown = sorted(set(val.clips) - set(train.clips))
    if unknown:
        raise DataError(
            f"{root / held_out / unknown[0]}: {TRAIN_FOLDER}/ has no label {unknown[0]!r}; "
            "add clips of it there or remove this folder"
        )
    others = [name for name in _visible(os.listdir(root)) if name not in (TRAIN_FOLDER, held_out)]
    files = [name for name in others if not (root / name).is_dir()]
    notes = [f"{root / name}: not read; {held_out}/ is the held-out split" for name in others if name not in files]
    return _assemble(root, train.clips, val.clips, files + train.ignored + val.ignored, notes)


def _split_one_level(root: Path, rules: dict[str, Any], seed: int) -> ClipSplits:
    listing = _list_classes(root, root)
    if len(rules) != 1:
        problem = f"{' and '.join(rules)} are given" if rules else f"has no {TRAIN_FOLDER}/ and val/"
        raise DataError(f"{root}: {problem}; give exactly one of data.val_fraction, data.val_list, data.val_pattern")
    ((name, value),) = rules.items()
    if name == "data.val_fraction":
        is_held_out = _by_fraction(listing, value, seed)
    elif name == "data.val_list":
        is_held_out = _by_list(root, listing, Path(value))
    else:
        is_held_out = _by_pattern(value)
    train: dict[str, list[str]] = {}
    val: dict[str, list[str]] = {}
    for label, clips in listing.clips.items():
        for clip in clips:
            (val if is_held_out(clip) else train).setdefault(label, []).append(clip)
    _check_split(root, train, val, f"{name}={value}")
    return _assemble(root, train, val, listing.ignored, [])


def _check_split(root: Path, train: dict[str, list[str]], val: dict[str, list[str]], rule: str) -> None:
    if not val:
        raise DataError(f"{root}: {rule} holds out none of {sum(map(len, train.values()))} clips; change the rule")
    if not train:
        raise DataError(f"{root}: {rule} holds out every clip and leaves none to train on; change the rule")
    untrained = sorted(set(val) - set(train))
    if untrained:
        raise DataError(f"{root / untrained[0]}: {rule} holds out every clip of this label; leave some to train on")


def _by_fraction(listing: _Listing, fraction: float, seed: int) -> Callable[[str], bool]:
    if not 0 < fraction < 1:
        raise DataError(f"data.val_fraction={fraction}: must lie between 0 and 1, like 0.2")
    held_out: set[str] = set()
    for names in listing.clips.values():
        # Each class gives at least one clip and keeps at least one; a single clip stays in training.
        count = min(max(int(len(names) * fraction + 0.5), 1), len(names) - 1)
        held_out.update(sorted(names, key=lambda name: (stable_hash(seed, name), name))[:count])
    return held_out.__contains__


def _by_list(root: Path, listing: _Listing, path: Path) -> Callable[[str], bool]:
    try:
        check_regular(path)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.val_list={path}: cannot be read as a text file ({error})") from error
    known = {name for names in listing.clips.values() for name in names}
    held_out: set[str] = set()
    for number, line in enumerate(lines, start=1):
        name = Path(line.strip()).as_posix()
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if name not in known:
            raise DataError(f"{path}, line {number}: no clip {name!r} below {root}; give paths relative to it")
        if name in held_out:
            raise DataError(f"{path}, line {number}: {name!r} is listed twice; remove one")
        held_out.add(name)
    return held_out.__contains__


def _by_pattern(pattern: str) -> Callable[[str], bool]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise DataError(f"data.val_pattern={pattern}: is not a regular expression ({error})") from error
    return lambda name: regex.search(name.split("/", 1)[1]) is not None


def _assemble(
    root: Path,
    train: dict[str, list[str]],
    val: dict[str, list[str]],
    ignored: Sequence[str],
    notes: Sequence[str],
) -> ClipSplits:
    label2id = {label: index for index, label in enumerate(sorted(train))}
    notes = list(notes)
    missing = sorted(set(train) - set(val))
    if missing:
        notes.append(f"{root}: {len(missing)} of {len(train)} labels have no held-out clip: {preview(missing)}")
    if ignored:
        notes.append(f"{root}: {len(ignored)} files are not clips and are ignored: {preview(sorted(ignored))}")
    return ClipSplits(
        train=_table(root, train, label2id),
        val=_table(root, val, label2id),
        id2label={index: label for label, index in label2id.items()},
        ignored=tuple(sorted(ignored)),
        notes=tuple(notes),
    )


def _table(root: Path, clips: dict[str, list[str]], label2id: dict[str, int]) -> FileTable:
    rows = sorted((name, label2id[label]) for label, names in clips.items() for name in names)
    return FileTable.from_lists(root, [name for name, _ in rows], [label for _, label in rows])
