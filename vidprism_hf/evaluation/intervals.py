"""Confidence intervals of accuracies."""

import math
from collections.abc import Sequence
from statistics import NormalDist


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
