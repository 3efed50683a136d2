"""Intervals: recorded values, what holds for all, and how often they hold the truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidprism_hf.evaluation.intervals import mean_class_interval, wilson_interval


@pytest.mark.parametrize(
    ("share", "trials", "interval"),
    # By the closed form with z = 1.959964; the first is Agresti and Coull's example of no success in ten.
    [(0.0, 10, (0.0, 0.2775)), (0.9, 30, (0.7438, 0.9654)), (0.5, 100, (0.4038, 0.5962)), (1.0, 30, (0.8865, 1.0))],
)
def test_recorded(share, trials, interval):
    assert wilson_interval(share, trials) == pytest.approx(interval, abs=5e-5)


@given(st.integers(1, 10_000), st.floats(0, 1), st.floats(0.5, 0.999))
def test_properties(trials, share, confidence):
    share = round(share * trials) / trials
    low, high = wilson_interval(share, trials, confidence)
    assert 0 <= low <= share + 1e-9
    assert share - 1e-9 <= high <= 1
    mirrored = wilson_interval(1 - share, trials, confidence)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-9)
    wider = wilson_interval(share, trials, (1 + confidence) / 2)
    assert wider[0] <= low + 1e-12
    assert wider[1] >= high - 1e-12


@pytest.mark.parametrize(("share", "trials"), [(0.5, 0), (1.1, 10), (-0.1, 10)])
def test_nonsense(share, trials):
    with pytest.raises(ValueError, match="no interval"):
        wilson_interval(share, trials)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=12))
def test_mean_class_properties(classes):
    clips = [most for _, most in classes]
    right = [min(pair) for pair in classes]
    if not any(clips):
        with pytest.raises(ValueError, match="no clips"):
            mean_class_interval(right, clips)
        return
    mean = np.mean([hits / count for hits, count in zip(right, clips, strict=True) if count])
    low, high = mean_class_interval(right, clips)
    assert 0 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= 1
    wrong = [count - hits for hits, count in zip(right, clips, strict=True)]
    assert mean_class_interval(wrong, clips) == pytest.approx((1 - high, 1 - low), abs=1e-9)
    assert mean_class_interval([*right, 0], [*clips, 0]) == (low, high)  # a class without clips says nothing


def test_of_one_class_it_is_wilsons():
    assert mean_class_interval([27], [30]) == pytest.approx(wilson_interval(0.9, 30))


@pytest.mark.parametrize("shares", [(0.5, 0.9, 0.7), (0.95, 0.99, 0.97, 0.9), (0.1, 0.9)])
def test_mean_class_interval_holds_the_truth(shares):
    """In about 95 of 100 draws, also where a class has few clips."""
    generator = np.random.default_rng(0)
    clips = [10, 25, 40, 15][: len(shares)]
    draws = generator.binomial(clips, shares, size=(1000, len(shares)))
    limits = np.array([mean_class_interval(draw.tolist(), clips) for draw in draws])
    held = ((limits[:, 0] <= np.mean(shares)) & (np.mean(shares) <= limits[:, 1])).mean()
    assert 0.93 <= held <= 0.99
