"""Clips by list files: text, CSV or JSON files that name the clips below a root folder and their labels.

list_files.py has the table of their forms. Here the listed paths become files, and the labels class indices.

A path is relative to the root. One without the extension of a video gets that of the file which is there. One without
a folder that is not in the root itself is looked up below it by its file name, so that lists of bare names (SSv2, the
few-shot lists of ViFi-CLIP and TC-CLIP) fit class folders too.

A row without a label belongs to the class of the folder that its clip lies in. Class names come from, in this order:
the file of label names; the labels, if they are names, sorted; the folders, if the labels are numbers and each number
goes with exactly one folder. Whether numbers count from 0 or 1 is never guessed: the names, or the folders, say which
class a number is.
"""

import errno
import os
import posixpath
from collections.abc import Sequence
from pathlib import Path

from ..util import preview, shorten, special_kind
from .folder import VIDEO_EXTENSIONS
from .list_files import ClipList, LabelNames, ListRow, read_label_names, read_list
from .tables import ClipSplits, DataError, FileTable


def scan_lists(
    source: str | os.PathLike,
    train_list: str | os.PathLike,
    val_list: str | os.PathLike | None,
    label_names: str | os.PathLike | None = None,
    allow_missing: bool = False,
) -> ClipSplits:
    """Reads the clips that two list files name. They keep the order of their list.

    Args:
        source: The folder that the paths are relative to.
        train_list: The list of the clips to train on.
        val_list: The list of the held-out clips.
        label_names: The file of label names, see `read_label_names`.
        allow_missing: Leave out listed clips that are not there, and say so in `notes` and `missing`.

    Raises:
        DataError: If a file cannot be read, a row is unclear, a clip is missing, listed twice or outside the
            folder, or the labels cannot be named or do not agree.
    """
    root = Path(source)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "no such folder"
        raise DataError(f"{root}: {what}; give the folder of the listed clips as data.source")
    given = None if label_names is None else read_label_names(label_names)
    train, val = read_list(train_list, "data.train_list"), read_list(val_list, "data.val_list")
    try:
        disk = _Disk(root)
        notes = [*_locate(train, disk), *_locate(val, disk)]
    except OSError as error:
        name = preview([str(error.filename)])
        raise DataError(f"{name}: cannot be read ({error.strerror}); change its permissions") from error
    _check_repeats(train, val)
    missing = {"train": _missing(train, root, allow_missing), "val": _missing(val, root, allow_missing)}
    for clips, names in zip((train, val), missing.values(), strict=True):
        if names:
            count = f"{len(names)} of {len(clips.rows)} clips are not below {root} and are left out"
            notes.append(f"{clips.path}: {count}: {preview(names)}")
    classes = given or _infer_classes(train, val)
    for clips in (train, val):
        clips.rows = [row for row in clips.rows if row.present]
    origin = Path(train.path if label_names is None else label_names)
    indices = [_indices(clips, classes, origin) for clips in (train, val)]
    notes += _label_notes(train, val, indices, classes, origin)
    tables = [
        FileTable.from_lists(root, [row.paths[0] for row in clips.rows], labels)
        for clips, labels in zip((train, val), indices, strict=True)
    ]
    return ClipSplits(
        train=tables[0],
        val=tables[1],
        id2label=dict(enumerate(classes.names)),
        notes=tuple(notes),
        missing={split: names for split, names in missing.items() if names},
    )


class _Disk:
    """What lies below a folder. Every folder is listed once: asking for each file would take minutes on a server."""

    def __init__(self, root: Path):
        self.root = root
        self.bases = [f"{base.rstrip('/')}/" for base in (os.path.abspath(root), os.path.realpath(root))]
        self.listings: dict[str, tuple[set[str], list[str]]] = {}
        self.by_name: dict[str, list[str]] | None = None
        self.special: dict[str, str] = {}  # what must not be opened, by its path: what it is

    def relative(self, path: str, where: str) -> str:
        """A listed path in its shortest form, relative to the root."""
        try:
            readable = path and b"\0" not in os.fsencode(path)
        except UnicodeEncodeError:
            readable = False
        if not readable:
            raise DataError(f"{where}: {path!r} is no file name; mend it")
        path = posixpath.normpath(path)
        inside = next((path.removeprefix(base) for base in self.bases if path.startswith(base)), path)
        if inside.startswith("/") or inside.split("/", 1)[0] == "..":
            raise DataError(f"{where}: {path!r} is outside {self.root}; give paths relative to data.source")
        return inside

    def find(self, path: str) -> list[str]:
        """The files that a listed path may mean, of which there should be one."""
        folder, name = posixpath.split(path)
        files, _ = self._list(folder)
        if name in files:
            return [path]
        found = [path + ending for ending in sorted(VIDEO_EXTENSIONS) if name + ending in files]
        return found if found or folder else self._index().get(name, [])

    def _list(self, folder: str) -> tuple[set[str], list[str]]:
        """The files and the folders in a folder; a folder that is not there has none."""
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
        """The files below the root's folders, by their names with and without the extension of a video."""
        if self.by_name is None:
            self.by_name = {}
            waiting, seen = [""], set()
            while waiting:
                folder = waiting.pop()
                real = os.path.realpath(self.root / folder)  # links may lead round in a circle
                if real in seen:
                    continue
                seen.add(real)
                files, folders = self._list(folder)
                waiting += [posixpath.join(folder, name) for name in folders if not name.startswith(".")]
                for name in files if folder else ():
                    stem, ending = posixpath.splitext(name)
                    for key in {name, stem if ending.lower() in VIDEO_EXTENSIONS else name}:
                        self.by_name.setdefault(key, []).append(posixpath.join(folder, name))
        return self.by_name


def _locate(clips: ClipList, disk: _Disk) -> list[str]:
    """Puts the files that are there into the rows; returns what to tell about it."""
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


def _check_repeats(train: ClipList, val: ClipList) -> None:
    seen: dict[str, tuple[ClipList, ListRow]] = {}
    for clips in (train, val):
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


def _infer_classes(train: ClipList, val: ClipList) -> LabelNames:
    """Class names without a file of them: the labels or, where those are numbers, the folders."""
    folder_of: dict[int, str] = {}
    number_of: dict[str, int] = {}
    for clips in (train, val):
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
    return LabelNames(sorted({row.label or row.folder for row in train.rows} - {""}), {})


def _indices(clips: ClipList, classes: LabelNames, origin: Path) -> list[int]:
    """The class index of each row."""
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
    train: ClipList, val: ClipList, indices: Sequence[Sequence[int]], classes: LabelNames, origin: Path
) -> list[str]:
    """What to tell about the labels; held-out clips of a label that is never trained are an error."""
    trained, held_out = map(set, indices)
    for row, index in zip(val.rows, indices[1], strict=True):
        if index not in trained:
            raise DataError(
                f"{val.where(row)}: label {classes.names[index]!r} has no clip in {train.path}; add some or remove it"
            )
    notes = []
    uses_numbers = any(isinstance(row.label, int) for row in (train.rows[0], val.rows[0]))
    if uses_numbers and any(number != index for number, index in classes.indices.items()):
        numbers = f"{min(classes.indices)} to {max(classes.indices)}"
        notes.append(f"{origin}: labels {numbers} become indices 0 to {len(classes.names) - 1}, in this order")
    for clips, present in ((train, trained), (val, held_out)):
        absent = [name for index, name in enumerate(classes.names) if index not in present]
        if absent:
            notes.append(f"{clips.path}: {len(absent)} of {len(classes.names)} labels have no clip: {preview(absent)}")
    return notes
