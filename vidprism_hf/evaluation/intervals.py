"""Confidence intervals of accuracies."""

import math
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
