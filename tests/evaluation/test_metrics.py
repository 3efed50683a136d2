"""Metrics of scores: against the plain definition of each, and what holds for all."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidprism_hf.evaluation.metrics import CALIBRATION_BINS, measure


@st.composite
def cases(draw):
    """Scores with ties, labels, and which clips are readable; some classes have no clips."""
    total, classes = draw(st.integers(1, 30)), draw(st.integers(2, 9))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    scores = generator.integers(0, draw(st.sampled_from((2, 1000))), (total, classes)).astype(np.float32) / 3
    return scores, generator.integers(0, classes, total), generator.random(total) < 0.8


@settings(max_examples=40, deadline=None)
@given(cases())
def test_definitions(case):
    scores, labels, readable = case
    found, classes = measure(*case), scores.shape[1]
    order = np.argsort(-scores, axis=1, kind="stable")
    names = {"top1", "mean_class"} | ({"top5"} if classes > 5 else set())
    assert found.accuracies.keys() == names
    for name in names - {"mean_class"}:
        hits = [
            known and label in row[: int(name[3:])] for label, row, known in zip(labels, order, readable, strict=True)
        ]
        assert found.accuracies[name].value == pytest.approx(np.mean(hits))
    right = (order[:, 0] == labels) & readable
    means = [right[labels == index].mean() for index in set(labels.tolist())]
    assert found.accuracies["mean_class"].value == pytest.approx(np.mean(means))
    for share in found.accuracies.values():
        assert 0 <= share.low <= share.value + 1e-9
        assert share.value - 1e-9 <= share.high <= 1
    expected = np.zeros((classes, classes), dtype=int)
    np.add.at(expected, (labels[readable], order[readable, 0]), 1)
    assert np.array_equal(found.confusion, expected)
    assert np.array_equal(found.clips, expected.sum(1) + found.unreadable)
    assert np.array_equal(found.right, expected.diagonal())
    if readable.any():
        shares = np.exp(scores[readable] - scores[readable].max(1, keepdims=True))
        best = 1 / shares.sum(1)
        assert found.confidence == pytest.approx(best.mean(), abs=1e-5)
        assert 0 <= found.ece <= 1
    else:
        assert math.isnan(found.ece)


def test_calibration_error_by_hand():
    """Sure of 0.9 and right in half of the cases: 0.4 off. And sure of 0.6, right in all: 0.4 off too."""
    sure = np.log(np.array([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 4, dtype=np.float32))
    labels = np.array([0, 1, 0, 1, 0, 0, 0, 0])
    found = measure(sure, labels)
    assert CALIBRATION_BINS == 15  # in which the two confidences lie apart
    assert found.ece == pytest.approx(0.4, abs=1e-5)
    assert found.confidence == pytest.approx(0.75, abs=1e-5)


def test_a_probability_of_one_shares_the_last_bin():
    """Sure of 1 and right in 60 of 100 cases, sure of 0.97 in 100 others and always right: 0.985 against 0.8."""
    scores = np.array([[500.0, 0.0]] * 100 + [[np.log(0.97 / 0.03), 0.0]] * 100, dtype=np.float32)
    labels = np.array([0] * 60 + [1] * 40 + [0] * 100)
    found = measure(scores, labels)
    assert found.ece == pytest.approx(0.185, abs=1e-6)
    assert found.confidence == pytest.approx(0.985, abs=1e-6)


def test_scores_that_are_no_numbers_are_wrong():
    found = measure(np.array([[np.nan, np.nan], [1.0, 0.0]], dtype=np.float32), np.array([0, 0]))
    assert found.accuracies["top1"].value == 0.5
    assert found.confusion.tolist() == [[1, 0], [0, 0]]


def test_a_class_without_clips():
    found = measure(np.eye(3, dtype=np.float32)[[0, 0]], np.array([0, 0]))
    assert found.class_share(1) is None
    assert found.accuracies["mean_class"].value == 1.0


def test_no_clips():
    with pytest.raises(ValueError, match="no clips"):
        measure(np.empty((0, 3), dtype=np.float32), np.empty(0, dtype=np.int64))
