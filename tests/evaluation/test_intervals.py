"""Wilson's interval: recorded values, and what holds for all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidprism_hf.evaluation.intervals import wilson_interval


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
