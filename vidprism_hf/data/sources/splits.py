"""Splits: which videos are for validation and which for training, by each rule once; and split files.

| rule     | setting        | validation split                                           |
| -------- | -------------- | ---------------------------------------------------------- |
| fraction | `val_fraction` | a share of each class, drawn by seed                       |
| list     | `val_list`     | the videos that a text file names                          |
| pattern  | `val_pattern`  | the videos in whose name a regular expression is found     |
| few-shot | `shots`        | unchanged; K training videos of each class, drawn by seed  |

A draw is decided by a hash of the seed and each name: neither the order of listing nor other classes matter.
"""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...util import atomic_write, check_regular
from ..tables import ClipSplits, ClipTable, DataError, rows_by_label, stable_hash

DEFAULT_FRACTION = 0.2  # of class folders without a rule


def split_table(
    table: ClipTable, id2label: dict[int, str], rules: dict[str, Any], seed: int
) -> tuple[ClipTable, ClipTable]:
    """Divides a table into training and validation split by exactly one rule.

    Args:
        table: All videos.
        id2label: Class index to label name.
        rules: `val_fraction`, `val_list` and `val_pattern`; those that are None are not given. With the fraction each
            class gives at least one video and keeps at least one; a single one stays in training. The list has a
            name a line; empty lines and lines that begin with `#` are skipped. The pattern is searched in the name
            below its class folder: `day1/take2.mp4` of `bend/day1/take2.mp4`.
        seed: Seed of the fraction.

    Raises:
        DataError: If there is not exactly one rule, or it is unusable, or leaves a split or a trained class empty.
    """
    given = {name: value for name, value in rules.items() if value is not None}
    if len(given) != 1:
        what = " and ".join(f"data.{name}" for name in given) + " are given" if given else "has no split"
        raise DataError(f"{table.origin}: {what}; give exactly one of {', '.join(f'data.{name}' for name in rules)}")
    ((rule, value),) = given.items()
    drawn = {"val_fraction": _by_fraction, "val_list": _by_list, "val_pattern": _by_pattern}[rule]
    is_val = drawn(table, value, seed)
    where = f"{table.origin}: data.{rule}={value}"
    if not is_val.any():
        raise DataError(f"{where} holds out none of {len(table)} clips; change the rule")
    if is_val.all():
        raise DataError(f"{where} holds out every clip and leaves none to train on; change the rule")
    untrained = np.setdiff1d(table.labels[is_val], table.labels[~is_val])
    if len(untrained):
        label = id2label[int(untrained[0])]
        raise DataError(f"{where} holds out every clip of label {label!r}; leave some to train on")
    return table.select(np.flatnonzero(~is_val)), table.select(np.flatnonzero(is_val))


def describe_fraction(fraction: float, seed: int) -> str:
    """Names the fraction rule, for model cards."""
    return f"a share of {fraction:g} of each class held out (seed {seed})"


def _names(table: ClipTable) -> list[str]:
    return [table.name(index) for index in range(len(table))]


def _draw(table: ClipTable, rows: Sequence[int], seed: int, count: Callable[[int], int]) -> list[int]:
    """Draws `count(n)` of the n videos of a class; those drawn for a smaller count are among them."""
    return sorted(rows, key=lambda row: (stable_hash(seed, table.name(row)), table.name(row)))[: count(len(rows))]


def _by_fraction(table: ClipTable, fraction: float, seed: int) -> np.ndarray:
    if not 0 < fraction < 1:
        raise DataError(f"data.val_fraction={fraction}: must lie between 0 and 1, like 0.2")
    is_val = np.zeros(len(table), dtype=bool)
    for rows in rows_by_label(table.labels).values():
        is_val[_draw(table, rows, seed, lambda size: min(max(int(size * fraction + 0.5), 1), size - 1))] = True
    return is_val


def _by_list(table: ClipTable, path: str | os.PathLike, seed: int) -> np.ndarray:
    try:
        check_regular(path)
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.val_list={path}: cannot be read as a text file ({error})") from error
    row_of = {name: row for row, name in enumerate(_names(table))}
    is_val = np.zeros(len(table), dtype=bool)
    for number, line in enumerate(lines, start=1):
        name = Path(line.strip()).as_posix()
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if name not in row_of:
            raise DataError(f"{path}, line {number}: no clip {name!r} below {table.origin}; give paths relative to it")
        if is_val[row_of[name]]:
            raise DataError(f"{path}, line {number}: {name!r} is listed twice; remove one")
        is_val[row_of[name]] = True
    return is_val


def _by_pattern(table: ClipTable, pattern: str, seed: int) -> np.ndarray:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise DataError(f"data.val_pattern={pattern}: is not a regular expression ({error})") from error
    return np.array([regex.search(name.split("/", 1)[1]) is not None for name in _names(table)], dtype=bool)


def few_shot(splits: ClipSplits, shots: int, seed: int) -> ClipSplits:
    """Keeps exactly `shots` training videos of each class, sorted by name; the validation split stays as it is.

    The videos of a smaller `shots` are among those of a larger one.

    Raises:
        DataError: If a class has fewer videos.
    """
    if shots < 1:
        raise DataError(f"data.shots={shots}: must be at least 1, or null for all clips")
    table = splits.train
    chosen: list[int] = []
    rows = rows_by_label(table.labels)
    for label, label_name in splits.id2label.items():
        drawn = _draw(table, rows.get(label, []), seed, lambda size: shots)
        if len(drawn) < shots:
            raise DataError(
                f"{table.origin}: label {label_name!r} has {len(drawn)} training clips; "
                f"lower data.shots={shots}, or add clips"
            )
        chosen += drawn
    note = f"{table.origin}: {len(chosen)} of {len(table)} training clips are used, {shots} a label (seed {seed})"
    # Clips that the full list names and the disk lacks are not part of the drawn list.
    missing = {name: clips for name, clips in splits.missing.items() if name != "train"}
    train = table.select(sorted(chosen, key=table.name))
    return replace(splits, train=train, notes=(*splits.notes, note), missing=missing)


def save_clip_list(table: ClipTable, path: str | os.PathLike) -> None:
    """Writes a table as a split file: name, tab, class index per line. `scan_lists` reads it, given label names.

    Raises:
        DataError: If a name contains a tab or a line end.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, b"".join(_lines(table)))


def clip_list_hash(table: ClipTable, in_order: bool = False) -> str:
    """Returns the SHA-256 of a table's names and labels, in hexadecimal digits.

    It is the hash of the saved list's sorted lines, `LC_ALL=C sort LIST | sha256sum`, or of the list as it is
    (`in_order`).
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
