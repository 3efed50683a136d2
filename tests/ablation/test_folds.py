"""Folds: groups and blocks stay together, every video is held out once, and bad options say why."""

import numpy as np
import pytest

from vidprism_hf.ablation.folds import block_folds, group_folds
from vidprism_hf.errors import UserError

NAMES = [f"{action}/{person}_{action}.avi" for action in ("run", "walk") for person in ("daria", "eli", "ira")]


def test_a_group_is_a_fold():
    assert group_folds(NAMES, "^([a-z]+)_").tolist() == [0, 1, 2, 0, 1, 2]


def test_blocks_are_contiguous_in_the_order_of_numbers():
    names = [f"serve/serve{number}.mp4" for number in (10, 2, 1, 9, 11)] + ["smash/a.mp4", "smash/b.mp4"]
    labels = [0] * 5 + [1] * 2
    folds = block_folds(names, labels, 2)
    assert folds.tolist() == [1, 0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_blocks_differ_by_one_video_at_most(count):
    names = [f"a/{number}" for number in range(13)]
    sizes = np.bincount(block_folds(names, [0] * 13, count))
    assert len(sizes) == count
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "is not a regular expression"),
        ("^[a-z]+_", "must contain one capturing group"),
        ("^([0-9]+)_", "does not match run/daria_run.avi"),
        ("_(r|w)", None),
        ("(avi)", "all videos are in one group, avi"),
    ],
)
def test_patterns_that_make_no_folds(pattern, message):
    if message is None:
        assert len(set(group_folds(NAMES, pattern))) == 2
        return
    with pytest.raises(UserError, match=message):
        group_folds(NAMES, pattern)


def test_more_folds_than_videos():
    with pytest.raises(UserError, match="a class has 3 videos"):
        block_folds(NAMES, [0, 0, 0, 1, 1, 1], 4)
    with pytest.raises(UserError, match="at least 2"):
        block_folds(NAMES, [0, 0, 0, 1, 1, 1], 1)
