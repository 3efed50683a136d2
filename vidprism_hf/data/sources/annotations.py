"""Annotation files: text, CSV or JSON files that list the videos below a root folder and their labels.

annotation_formats.py has the table of formats. Here the listed paths become files, and the labels class indices.

A path is relative to the root. One without the extension of a video gets that of the file which is there. One without
a folder that is not in the root itself is looked up below it by its file name, so that lists of bare names (SSv2, the
few-shot lists of ViFi-CLIP and TC-CLIP) fit class folders too.

A row without a label belongs to the class of its folder. Class names come from, in this order: the file of label
names; the labels, if they are names, sorted; the folders, if the labels are numbers and each goes with exactly one
folder. Whether numbers count from 0 or 1 is never guessed: the names, or the folders, say which class a number is.
"""

import errno
import os
import posixpath
from collections.abc import Sequence
from pathlib import Path

from ...label_names import LabelNames, read_label_names
from ...util import preview, shorten, special_kind
from ..tables import VIDEO_EXTENSIONS, ClipSplits, DataError, FileTable, is_video
from .annotation_formats import ClipList, ListRow, read_list
from .splits import split_table


def scan_lists(
    source: str | os.PathLike,
    train_list: str | os.PathLike,
    val_list: str | os.PathLike | None = None,
    label_names: str | os.PathLike | None = None,
    allow_missing: bool = False,
    val_fraction: float | None = None,
    seed: int = 0,
) -> ClipSplits:
    """Reads the videos that two annotation files list, or splits those of one. They keep the order of their file.

    Args:
        source: The folder that the paths are relative to.
        train_list: The training split; without `val_list` all videos.
        val_list: The validation split.
        label_names: The file of label names, see `read_label_names`.
        allow_missing: Leave out listed videos that do not exist, and say so in `notes` and `missing`.
        val_fraction: Without `val_list`: the share of each class to hold out, see `split_table`.
        seed: Seed of the fraction.

    Raises:
        DataError: If a file cannot be read, a row is unclear, a video is missing, listed twice or outside the
            folder, or the labels cannot be named or do not agree.
    """
    root = Path(source)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "no such folder"
        raise DataError(f"{root}: {what}; give the folder of the listed clips as data.source")
    if val_list is not None and val_fraction is not None:
        raise DataError("data.val_fraction: data.val_list gives the validation split already; remove one of them")
    given = None if label_names is None else read_label_names(label_names)
    lists = [read_list(train_list, "data.train_list")]
    if val_fraction is None:
        lists.append(read_list(val_list, "data.val_list"))
    try:
        disk = _Disk(root)
        notes = [note for clips in lists for note in _locate(clips, disk)]
    except OSError as error:
        name = preview([str(error.filename)])
        raise DataError(f"{name}: cannot be read ({error.strerror}); change its permissions") from error
    _check_repeats(lists)
    missing = {}
    for split, clips in zip(("train", "val"), lists, strict=False):
        if names := _missing(clips, root, allow_missing):
            missing[split] = names
            count = f"{len(names)} of {len(clips.rows)} clips are not below {root} and are left out"
            notes.append(f"{clips.path}: {count}: {preview(names)}")
    classes = given or _infer_classes(lists)
    for clips in lists:
        clips.rows = [row for row in clips.rows if row.present]
    origin = Path(lists[0].path if label_names is None else label_names)
    indices = [_indices(clips, classes, origin) for clips in lists]
    notes += _label_notes(lists, indices, classes, origin)
    id2label = dict(enumerate(classes.names))
    tables = [
        FileTable.from_lists(root, [row.paths[0] for row in clips.rows], labels)
        for clips, labels in zip(lists, indices, strict=True)
    ]
    if val_fraction is not None:
        tables = split_table(tables[0], id2label, {"val_fraction": val_fraction}, seed)
    return ClipSplits(*tables, id2label=id2label, notes=tuple(notes), missing=missing)


class _Disk:
    """Files below a folder. Every folder is listed once: asking for each file would take minutes on a server."""

    def __init__(self, root: Path):
        self.root = root
        self.bases = [f"{base.rstrip('/')}/" for base in (os.path.abspath(root), os.path.realpath(root))]
        self.listings: dict[str, tuple[set[str], list[str]]] = {}
        self.by_name: dict[str, list[str]] | None = None
        self.special: dict[str, str] = {}  # what must not be opened, by its path: what it is

    def relative(self, path: str, where: str) -> str:
        """Returns a listed path in its shortest form, relative to the root."""
        try:
            readable = path and b"\0" not in os.fsencode(path)
        except UnicodeEncodeError:
            readable = False
        if not readable:
            raise DataError(f"{where}: {path!r} is not a file name; correct it")
        path = posixpath.normpath(path)
        inside = next((path.removeprefix(base) for base in self.bases if path.startswith(base)), path)
        if inside.startswith("/") or inside.split("/", 1)[0] == "..":
            raise DataError(f"{where}: {path!r} is outside {self.root}; give paths relative to data.source")
        return inside

    def find(self, path: str) -> list[str]:
        """Returns the files that a listed path may mean; there should be one."""
        folder, name = posixpath.split(path)
        files, _ = self._list(folder)
        if name in files:
            return [path]
        found = [path + ending for ending in sorted(VIDEO_EXTENSIONS) if name + ending in files]
        return found if found or folder else self._index().get(name, [])

    def _list(self, folder: str) -> tuple[set[str], list[str]]:
        """Returns the files and folders in a folder; none if it does not exist."""
        if folder not in self.listings:
            files, folders = set(), []
            try:
                with os.scandir(self.root / folder) as entries:
                    for entry in entries:
                        if entry.is_file():
                            files.add(entry.name)
                        elif entry.is_dir():
                            folders.append(entry.name)
                        elif kind := special_kind(entry.path):
                            files.add(entry.name)
                            self.special[posixpath.join(folder, entry.name)] = kind
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                    raise
            self.listings[folder] = files, sorted(folders)
        return self.listings[folder]

    def _index(self) -> dict[str, list[str]]:
        """Returns the files below the root's folders, by name with and without the extension of a video."""
        if self.by_name is None:
            self.by_name = {}
            waiting, seen = [""], set()
            while waiting:
                folder = waiting.pop()
                real = os.path.realpath(self.root / folder)  # links may form a cycle
                if real in seen:
                    continue
                seen.add(real)
                files, folders = self._list(folder)
                waiting += [posixpath.join(folder, name) for name in folders if not name.startswith(".")]
                for name in files if folder else ():
                    for key in {name, posixpath.splitext(name)[0] if is_video(name) else name}:
                        self.by_name.setdefault(key, []).append(posixpath.join(folder, name))
        return self.by_name


def _locate(clips: ClipList, disk: _Disk) -> list[str]:
    """Puts the files found into the rows; returns notes."""
    moved = 0
    for index, row in enumerate(clips.rows):
        paths = tuple(disk.relative(path, clips.where(row)) for path in row.paths)
        found = next(filter(None, map(disk.find, paths)), [])
        if len(found) > 1:
            raise DataError(
                f"{clips.where(row)}: {paths[-1]!r} may be any of {preview(sorted(found))}; keep one of them"
            )
        if found and (kind := disk.special.get(found[0])):
            raise DataError(f"{clips.where(row)}: {shorten(found[0])} is {kind}, not a regular file; remove it")
        if found:
            moved += posixpath.dirname(found[0]) not in [posixpath.dirname(path) for path in paths]
        clips.rows[index] = row._replace(paths=tuple(found) or paths, present=bool(found))
    return [f"{clips.path}: {moved} clips are found by their file names in folders below {disk.root}"] if moved else []


def _check_repeats(lists: Sequence[ClipList]) -> None:
    seen: dict[str, tuple[ClipList, ListRow]] = {}
    for clips in lists:
        for row in clips.rows:
            name = row.paths[0]
            if name in seen:
                other, first = seen[name]
                raise DataError(
                    f"{clips.where(row)}: {name!r} is listed already in {other.where(first)}; list each clip once, "
                    "in one split"
                )
            seen[name] = clips, row


def _missing(clips: ClipList, root: Path, allow_missing: bool) -> tuple[str, ...]:
    missing = tuple(row.paths[0] for row in clips.rows if not row.present)
    if missing and os.path.isdir(root / missing[0]):
        raise DataError(f"{clips.path}: {missing[0]!r} is a folder; list video files, not folders of frames")
    if len(missing) == len(clips.rows):
        raise DataError(
            f"{clips.path}: none of its {len(missing)} clips is below {root}: {preview(missing)}; "
            "give the folder that its paths are relative to as data.source"
        )
    if missing and not allow_missing:
        raise DataError(
            f"{clips.path}: {len(missing)} of {len(clips.rows)} clips are not below {root}: {preview(missing)}; "
            "add them, or set data.allow_missing to leave them out"
        )
    return missing


def _infer_classes(lists: Sequence[ClipList]) -> LabelNames:
    """Names the classes without a file of names: by the labels or, where those are numbers, by the folders."""
    folder_of: dict[int, str] = {}
    number_of: dict[str, int] = {}
    for clips in lists:
        for row in clips.rows:
            place = row.folder
            if not isinstance(row.label, int) or not (place or row.present):
                continue
            folder = folder_of.setdefault(row.label, place)
            number = number_of.setdefault(place, row.label)
            if not place:
                why = "is a number, and the clip lies in no class folder"
            elif folder != place:
                why = f"stands for the folders {folder!r} and {place!r}"
            elif number != row.label:
                why = f"stands for the folder {folder!r}, and so does {number}"
            else:
                continue
            raise DataError(f"{clips.where(row)}: label {row.label} {why}; name the labels by data.label_names")
    if folder_of:
        numbers = sorted(folder_of)
        return LabelNames([folder_of[number] for number in numbers], {n: index for index, n in enumerate(numbers)})
    return LabelNames(sorted({row.label or row.folder for row in lists[0].rows} - {""}), {})


def _indices(clips: ClipList, classes: LabelNames, origin: Path) -> list[int]:
    """Returns the class index of each row."""
    index_of = {name: index for index, name in enumerate(classes.names)}
    indices = []
    for row in clips.rows:
        numbered = isinstance(row.label, int)
        name = row.folder if row.label is None else row.label
        index = (classes.indices if numbered else index_of).get(name)
        if index is None:
            known = f"{min(classes.indices)} to {max(classes.indices)}" if numbered else preview(classes.names)
            raise DataError(f"{clips.where(row)}: label {name!r} is not in {origin}; it has {known}")
        if numbered and index_of.get(row.folder, index) != index:
            raise DataError(
                f"{clips.where(row)}: label {name} is {classes.names[index]!r} in {origin}, but the clip lies in the "
                f"folder {row.folder!r}; let both count from 0, or both from 1"
            )
        indices.append(index)
    return indices


def _label_notes(
    lists: Sequence[ClipList], indices: Sequence[Sequence[int]], classes: LabelNames, origin: Path
) -> list[str]:
    """Returns notes about the labels; validation videos of a label that is never trained are an error."""
    train, trained = lists[0], set(indices[0])
    for clips, found in zip(lists[1:], indices[1:], strict=True):
        for row, index in zip(clips.rows, found, strict=True):
            if index not in trained:
                name = classes.names[index]
                where = f"{clips.where(row)}: label {name!r}"
                raise DataError(f"{where} has no clip in {train.path}; add some or remove it")
    notes = []
    uses_numbers = any(isinstance(clips.rows[0].label, int) for clips in lists)
    if uses_numbers and any(number != index for number, index in classes.indices.items()):
        numbers = f"{min(classes.indices)} to {max(classes.indices)}"
        notes.append(f"{origin}: labels {numbers} become indices 0 to {len(classes.names) - 1}, in this order")
    for clips, found in zip(lists, map(set, indices), strict=True):
        absent = [name for index, name in enumerate(classes.names) if index not in found]
        if absent:
            notes.append(f"{clips.path}: {len(absent)} of {len(classes.names)} labels have no clip: {preview(absent)}")
    return notes
