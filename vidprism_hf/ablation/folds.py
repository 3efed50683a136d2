"""Folds for cross-validation on small data: leave one group out, or contiguous blocks of each class."""

import re
from collections.abc import Sequence

import numpy as np

from ..errors import UserError


def group_folds(names: Sequence[str], pattern: str) -> np.ndarray:
    """Assigns videos whose names agree in what a pattern captures to one fold.

    Args:
        names: Names of the videos below the source, such as `run/daria_run.avi`.
        pattern: Regular expression with one group, searched in the name below the class folder.

    Returns:
        The fold of each video, (N,), numbered by the sorted groups.

    Raises:
        UserError: If the pattern is invalid, does not match a name, or makes fewer than two groups.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"groups={pattern}: is not a regular expression ({error})") from error
    if expression.groups != 1:
        raise UserError(f"groups={pattern}: must contain one capturing group, such as '^([a-z]+)_'")
    groups = []
    for name in names:
        match = expression.search(name.partition("/")[2] or name)
        if match is None or match[1] is None:
            raise UserError(f"groups={pattern}: does not match {name}; every video needs a group")
        groups.append(match[1])
    order, folds = np.unique(groups, return_inverse=True)
    if len(order) < 2:
        raise UserError(f"groups={pattern}: all videos are in one group, {order[0]}; at least two are needed")
    return folds


def block_folds(names: Sequence[str], labels: Sequence[int], count: int) -> np.ndarray:
    """Divides the videos of each class, sorted by the numbers in their names, into contiguous blocks.

    Videos cut from one recording are neighbours and so share a fold, except at the ends of blocks. (scikit-learn's
    StratifiedKFold divides blocks of other sizes, and published tables are of these.)

    Args:
        names: Names of the videos.
        labels: Their class indices.
        count: Number of folds, at least two.

    Returns:
        The fold of each video, (N,).

    Raises:
        UserError: If a class has fewer videos than folds.
    """
    if count < 2:
        raise UserError(f"folds={count}: must be at least 2")
    labels, folds = np.asarray(labels), np.zeros(len(names), dtype=np.int64)
    for label in np.unique(labels):
        videos = sorted(np.flatnonzero(labels == label).tolist(), key=lambda video: natural(names[video]))
        if len(videos) < count:
            raise UserError(f"folds={count}: a class has {len(videos)} videos; lower it")
        folds[videos] = np.arange(len(videos)) * count // len(videos)
    return folds


def natural(name: str) -> list[tuple[int, str]]:
    """Returns a key that sorts `clip9` before `clip10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
