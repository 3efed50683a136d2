"""Confidence intervals of accuracies."""

import math
import statistics
from collections.abc import Sequence
from statistics import NormalDist

# Student's t for an interval of 95 %, by degrees of freedom from 1; beyond them the normal's 1.96 plus its first term.
STUDENT_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def wilson_interval(share: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of independent trials (Wilson, 1927).

    Unlike the normal approximation it is sound for few clips and for shares near 0 and 1.

    Args:
        share: Of the trials that succeeded, from 0 to 1.
        trials: How many there were, at least one.
        confidence: Of the interval, above 0 and below 1.
    """
    if trials < 1 or not 0 <= share <= 1:
        raise ValueError(f"no interval of the share {share} of {trials} trials")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of independent values, of which there are at least two."""
    if len(values) < 2:
        raise ValueError(f"no interval of {len(values)} values")
    freedom = len(values) - 1
    t = STUDENT_95[freedom - 1] if freedom <= len(STUDENT_95) else 1.96 + 2.37 / freedom
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    return mean - t * error, mean + t * error
