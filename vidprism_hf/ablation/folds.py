"""Folds of a cross-validation over small data: leave one group out, or contiguous blocks of each class."""

import re
from collections.abc import Sequence

import numpy as np

from ..errors import UserError


def group_folds(names: Sequence[str], pattern: str) -> np.ndarray:
    """Leave one group out: clips whose names agree in what a pattern captures are one fold.

    Args:
        names: Names of the clips below the source, `run/daria_run.avi`.
        pattern: Regular expression with one group, searched in the name below the class folder.

    Returns:
        The fold of each clip, (N,), by the sorted groups.

    Raises:
        UserError: If the pattern is none, does not match a name, or makes fewer than two groups.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--groups {pattern}: is no regular expression ({error})") from error
    if expression.groups != 1:
        raise UserError(f"--groups {pattern}: must capture one group, such as '^([a-z]+)_'")
    groups = []
    for name in names:
        match = expression.search(name.partition("/")[2] or name)
        if match is None or match[1] is None:
            raise UserError(f"--groups {pattern}: is not found in {name}; every clip needs a group")
        groups.append(match[1])
    order = sorted(set(groups))
    if len(order) < 2:
        raise UserError(f"--groups {pattern}: all clips are of one group, {order[0]}; two are needed")
    return np.array([order.index(group) for group in groups])


def block_folds(names: Sequence[str], labels: Sequence[int], count: int) -> np.ndarray:
    """Contiguous blocks: the clips of each class, in the order of the numbers in their names, in `count` parts.

    Clips that were cut from one recording stand side by side and stay in one fold, but at the blocks' ends.

    Args:
        names: Names of the clips.
        labels: Their class indices.
        count: Of folds, at least two.

    Returns:
        The fold of each clip, (N,).

    Raises:
        UserError: If a class has fewer clips than there are folds.
    """
    if count < 2:
        raise UserError(f"--folds {count}: must be at least 2")
    labels, folds = np.asarray(labels), np.zeros(len(names), dtype=np.int64)
    for label in np.unique(labels):
        clips = sorted(np.flatnonzero(labels == label).tolist(), key=lambda clip: natural(names[clip]))
        if len(clips) < count:
            raise UserError(f"--folds {count}: a class has {len(clips)} clips; lower it")
        folds[clips] = np.arange(len(clips)) * count // len(clips)
    return folds


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts `clip9` before `clip10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
