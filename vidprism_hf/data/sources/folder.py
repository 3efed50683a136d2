"""Folders of class folders: lists the videos and their labels, and splits them.

Two layouts are read. Either the split is in the folders,

    source/train/<class>/...    source/val/<class>/...

or there is one level, `source/<class>/...`, and a rule of splits.py says which videos are for validation.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...util import preview, special_kind
from ..tables import VIDEO_EXTENSIONS, ClipSplits, DataError, FileTable, is_video
from .splits import DEFAULT_FRACTION, describe_fraction, split_table

TRAIN_FOLDER = "train"
HELD_OUT_FOLDERS = ("val", "validation", "test")


def scan_folder(
    source: str | os.PathLike,
    val_fraction: float | None = None,
    val_list: str | os.PathLike | None = None,
    val_pattern: str | None = None,
    seed: int = 0,
) -> ClipSplits:
    """Lists the videos of a folder of class folders and splits them.

    With `source/train` the validation split is `source/val`, else `source/validation`, else `source/test`, and no rule
    may be given. With one level of class folders at most one rule of `split_table` is given; without any a fifth of
    each class is held out. Class folders are searched to any depth, links are followed; hidden files and folders are
    skipped.

    Args:
        source: The folder.
        val_fraction: Share of each class to hold out, between 0 and 1.
        val_list: A text file that names the validation split, one path relative to `source` a line.
        val_pattern: A regular expression, searched in each path below its class folder.
        seed: Seed of the fraction.

    Raises:
        DataError: If the folder, a class folder or the rule cannot be used.
    """
    root = Path(source)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "no such folder"
        raise DataError(f"{root}: {what}; give a folder of class folders as data.source, or demo")
    rules = {"val_fraction": val_fraction, "val_list": val_list, "val_pattern": val_pattern}
    given = [f"data.{name}" for name, value in rules.items() if value is not None]
    try:
        held_out = _held_out_folder(root)
        if held_out is not None and given:
            raise DataError(f"{root}: is split into {TRAIN_FOLDER}/ and {held_out}/ already; remove {given[0]}")
        if held_out is not None:
            return _read_split_folders(root, held_out)
        listing = _list_classes(root, root)
    except OSError as error:
        raise DataError(
            f"{error.filename}: cannot be read ({error.strerror}); change its permissions or remove it"
        ) from error
    notes, description = [], ""
    if not given:
        rules["val_fraction"], description = DEFAULT_FRACTION, describe_fraction(DEFAULT_FRACTION, seed)
        notes = [f"{root}: has no split, so {description}; data.val_fraction, val_list or val_pattern choose another"]
    id2label = dict(enumerate(sorted(listing.clips)))
    train, val = split_table(_table(root, listing, id2label), id2label, rules, seed)
    return _assemble(train, val, id2label, listing.ignored, [*notes, *listing.notes], description)


@dataclass(frozen=True)
class _Listing:
    """Videos per class, as paths relative to the source with `/` between folders; other files; notes."""

    clips: dict[str, list[str]]
    ignored: list[str]
    notes: list[str]


def _visible(names: Sequence[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))


def _folders(path: Path) -> list[str]:
    return _visible([entry.name for entry in os.scandir(path) if entry.is_dir()])


def _held_out_folder(root: Path) -> str | None:
    """Returns the name of the validation folder if the source is split by folders, None if it has one level."""
    # A folder of that name with videos and no folders in it is a class that happens to be called so.
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
    """Lists `folder/<class>/...` with paths relative to `root`; `seen` maps real paths to videos so far."""
    seen = {} if seen is None else seen
    prefix = "" if folder == root else folder.relative_to(root).as_posix() + "/"
    ignored = [prefix + name for name in _visible([e.name for e in os.scandir(folder) if not e.is_dir()])]
    clips: dict[str, list[str]] = {}
    inner: set[tuple[str, ...]] = set()
    for label in _folders(folder):
        clips[label], below = [], set()
        for name, real, kind in _walk(folder / label):
            clip = f"{prefix}{label}/{name}"
            if not is_video(name):
                ignored.append(clip)
                continue
            if kind:
                raise DataError(f"{root / clip}: is {kind}, not a regular file; remove it")
            if real in seen:
                raise DataError(f"{root}: {clip} and {seen[real]} are the same file; remove one of them")
            seen[real] = clip
            clips[label].append(clip)
            below.add(name.partition("/")[0] if "/" in name else "")
        if not clips[label]:
            raise DataError(
                f"{folder / label}: class folder without clips; remove it, or add clips "
                f"({', '.join(sorted(VIDEO_EXTENSIONS))})"
            )
        inner.add(tuple(sorted(below)))
    if not clips:
        raise DataError(f"{folder}: has no class folders; put the clips of each class in a folder of its name")
    return _Listing(clips, ignored, _session_notes(folder, list(clips), inner))


def _session_notes(folder: Path, labels: list[str], inner: set[tuple[str, ...]]) -> list[str]:
    """Warns where the class folders may be sessions, and the folders in them the classes."""
    same = next(iter(inner))
    if len(labels) < 2 or len(inner) > 1 or len(same) < 2 or "" in same:
        return []
    return [
        f"{folder}: all class folders have the same subfolders: read as classes {preview(labels)}, each with "
        f"{preview(same)}; if {preview(same)} are the classes, put them outermost ({same[0]}/{labels[0]}/...)"
    ]


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
    id2label = dict(enumerate(sorted(train.clips)))
    tables = [_table(root, listing, id2label) for listing in (train, val)]
    return _assemble(*tables, id2label, files + train.ignored + val.ignored, notes + train.notes)


def _assemble(
    train: FileTable,
    val: FileTable,
    id2label: dict[int, str],
    ignored: Sequence[str],
    notes: list[str],
    description: str = "",
) -> ClipSplits:
    root, notes, ignored = train.origin, list(notes), sorted(ignored)
    missing = [id2label[index] for index in sorted(set(id2label) - set(val.labels.tolist()))]
    if missing:
        notes.append(f"{root}: {len(missing)} of {len(id2label)} labels have no held-out clip: {preview(missing)}")
    if ignored:
        notes.append(f"{root}: {len(ignored)} files are not clips and are ignored: {preview(ignored)}")
    return ClipSplits(train, val, id2label, tuple(ignored), tuple(notes), description=description)


def _table(root: Path, listing: _Listing, id2label: dict[int, str]) -> FileTable:
    rows = sorted((name, index) for index, label in id2label.items() for name in listing.clips.get(label, ()))
    return FileTable.from_lists(root, [name for name, _ in rows], [index for _, index in rows])
