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


def student_interval(values: Sequence[float], overlap: float = 0.0) -> tuple[float, float]:
    """Student's 95 % interval of the mean of at least two values.

    Args:
        values: One a fold.
        overlap: Held-out clips of a fold as a share of its training clips: folds share training clips, so that
            their results are not independent. The variance of the mean is then (1 / k + overlap) of that of the k
            values, not 1 / k (Nadeau and Bengio, 2003, "Inference for the generalization error"). 0 for independent
            values.
    """
    if len(values) < 2:
        raise ValueError(f"no interval of {len(values)} values")
    freedom = len(values) - 1
    t = STUDENT_95[freedom - 1] if freedom <= len(STUDENT_95) else 1.96 + 2.37 / freedom
    mean, error = statistics.fmean(values), statistics.stdev(values) * math.sqrt(1 / len(values) + overlap)
    return mean - t * error, mean + t * error


def mean_class_interval(right: Sequence[int], clips: Sequence[int], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean over classes of the shares that are right in each.

    The classes' Wilson intervals are put together by MOVER: their distances from the shares add up as variances do
    (Zou, Huang and Zhang, 2009, "A note on confidence interval estimation for a linear function of binomial
    proportions"). A bootstrap would call a model that is right on all of a few clips certain; this does not.

    Args:
        right: Clips of each class that are right.
        clips: Clips of each class; classes without any are left out.
        confidence: Of the interval, above 0 and below 1.
    """
    shares = [(hits / count, count) for hits, count in zip(right, clips, strict=True) if count]
    if not shares:
        raise ValueError("no interval of no clips")
    limits = [wilson_interval(share, count, confidence) for share, count in shares]
    mean = sum(share for share, _ in shares) / len(shares)
    below = math.hypot(*(share - low for (share, _), (low, _) in zip(shares, limits, strict=True)))
    above = math.hypot(*(high - share for (share, _), (_, high) in zip(shares, limits, strict=True)))
    return max(0.0, mean - below / len(shares)), min(1.0, mean + above / len(shares))
