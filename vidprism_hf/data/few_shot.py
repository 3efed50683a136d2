"""Few-shot training: K clips of each class, and the list of them, saved and hashed.

The clips are drawn here by seed, or come from a published list, which lists.py reads (the form of ViFi-CLIP and
TC-CLIP: `name.avi 0`, one clip a line, labels from 0).
"""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from ..util import atomic_write
from .tables import ClipSplits, ClipTable, DataError, rows_by_label, stable_hash


def few_shot(splits: ClipSplits, shots: int, seed: int) -> ClipSplits:
    """Keeps exactly `shots` training clips of each class, sorted by name; the held-out clips stay as they are.

    Which clips is decided by a hash of the seed and each clip's name: the order of listing and the other classes
    have no influence, and the clips of a smaller `shots` are among those of a larger one.

    Raises:
        DataError: If a class has fewer clips.
    """
    if shots < 1:
        raise DataError(f"data.shots={shots}: must be at least 1, or null for all clips")
    table = splits.train
    chosen: list[tuple[str, int]] = []
    by_label = rows_by_label(table.labels)
    for label, label_name in splits.id2label.items():
        clips = [(table.name(index), index) for index in by_label.get(label, ())]
        if len(clips) < shots:
            raise DataError(
                f"{table.origin}: label {label_name!r} has {len(clips)} training clips; "
                f"lower data.shots={shots}, or add clips"
            )
        chosen += sorted(clips, key=lambda clip: (stable_hash(seed, clip[0]), clip[0]))[:shots]
    note = f"{table.origin}: {len(chosen)} of {len(table)} training clips are used, {shots} a label (seed {seed})"
    train = table.select([index for _, index in sorted(chosen)])
    # What the full list lacks on disk is no part of the drawn one.
    missing = {name: clips for name, clips in splits.missing.items() if name != "train"}
    return replace(splits, train=train, notes=(*splits.notes, note), missing=missing)


def save_clip_list(table: ClipTable, path: str | os.PathLike) -> None:
    """Writes the clips of a table as a list file, `name`, a tab and the class index a line, in the table's order.

    `scan_lists` reads it back, given the names of the labels.

    Raises:
        DataError: If a clip's name holds a tab or the end of a line.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, b"".join(_lines(table)))


def clip_list_hash(table: ClipTable, in_order: bool = False) -> str:
    """The SHA-256 of a table's clips and labels, in hexadecimal digits.

    It is the hash of the lines of the saved list in the order of their bytes: `LC_ALL=C sort LIST | sha256sum`; or, if
    the order is to count, of the list as it is.
    """
    lines = _lines(table, strict=False)
    return hashlib.sha256(b"".join(lines if in_order else sorted(lines))).hexdigest()


def _lines(table: ClipTable, strict: bool = True) -> list[bytes]:
    lines = []
    for index, label in enumerate(table.labels.tolist()):
        name = table.name(index)
        if not name or set(name) & set("\t\r\n\0"):
            if strict:
                raise DataError(f"{table.origin}: clip name {name!r} does not fit a line of a list; rename the clip")
            name = repr(name)
        lines.append(f"{name}\t{label}\n".encode("utf-8", "surrogateescape"))
    return lines
