"""Confidence intervals of accuracies."""

import math
from collections.abc import Sequence
from statistics import NormalDist


def wilson_interval(share: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's score interval of a proportion of independent trials (Wilson, 1927).

    Unlike the normal approximation it is valid for few trials and for proportions near 0 and 1.

    Args:
        share: Proportion of successes, from 0 to 1.
        trials: Number of trials, at least one.
        confidence: Confidence level, above 0 and below 1.
    """
    if trials < 1 or not 0 <= share <= 1:
        raise ValueError(f"no interval of the share {share} of {trials} trials")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def mean_class_interval(right: Sequence[int], clips: Sequence[int], confidence: float = 0.95) -> tuple[float, float]:
    """Returns the interval of the mean class accuracy.

    MOVER combines the classes' Wilson intervals: their distances from the estimates add up like standard errors (Zou,
    Huang and Zhang, 2009, "A note on confidence interval estimation for a linear function of binomial proportions").
    For a model that is right on all of a few videos, a bootstrap interval would have no width; this one does.

    Args:
        right: Correctly classified videos of each class.
        clips: Videos of each class; classes without any are ignored.
        confidence: Confidence level, above 0 and below 1.
    """
    shares = [(hits / count, count) for hits, count in zip(right, clips, strict=True) if count]
    if not shares:
        raise ValueError("no interval of no clips")
    limits = [wilson_interval(share, count, confidence) for share, count in shares]
    mean = sum(share for share, _ in shares) / len(shares)
    below = math.hypot(*(share - low for (share, _), (low, _) in zip(shares, limits, strict=True)))
    above = math.hypot(*(high - share for (share, _), (_, high) in zip(shares, limits, strict=True)))
    return max(0.0, mean - below / len(shares)), min(1.0, mean + above / len(shares))
