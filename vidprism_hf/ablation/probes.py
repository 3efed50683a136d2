"""Linear probes of frame features: ridge regression by scikit-learn (extra `ablate`).

Shapes: N videos, T frames, D width.
"""

from itertools import product
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import LeaveOneGroupOut
from sklearn.pipeline import Pipeline

from ..model.temporal_vidprism import VidPrismFeatureWhitening

# Of equally accurate settings the first wins: the least weight on time, then the strongest penalty.
TIME_WEIGHTS = (0.0, 0.3)
PENALTIES = tuple(10 ** (exponent / 2) for exponent in range(4, -9, -1))
# The probes by the name that a grid gives them.
PROBES: dict[str, dict[str, Any]] = {
    "probe": {},
    "whitened_probe": {"whitened": True},
    "timed_probe": {"time_weights": TIME_WEIGHTS},
}


class FrameMeans(TransformerMixin, BaseEstimator):
    """Maps frame features (N, T, D) to what a probe reads: (N, D), or (N, 3 D) with a weight on time.

    Outputs are scaled as a whole to a mean squared length of 1 about their mean, so that penalties do not depend on
    the tower.

    Args:
        whitened: Whether frames are whitened as by `feature_norm: whitened`.
        time_weight: Above 0 the output includes the frames' means under the two slowest cosines of time, at this share
            of the mean frame's variance.
    """

    def __init__(self, whitened: bool = False, time_weight: float = 0.0):
        self.whitened, self.time_weight = whitened, time_weight

    def fit(self, frames: np.ndarray, labels: np.ndarray | None = None) -> "FrameMeans":
        """Fits whitening and scales to training videos."""
        width = frames.shape[-1]
        self.whitening_ = VidPrismFeatureWhitening(width, width) if self.whitened else torch.nn.Identity()
        if self.whitened:
            self.whitening_.fit([torch.as_tensor(frames)])
        shares = np.array([1.0, self.time_weight]) / (1 + self.time_weight)
        parts = self._parts(frames)
        self.scales_ = [(share / part.var(axis=0).sum()) ** 0.5 for share, part in zip(shares, parts, strict=False)]
        return self

    def transform(self, frames: np.ndarray) -> np.ndarray:
        """Returns the vectors of videos."""
        return np.hstack([part * scale for part, scale in zip(self._parts(frames), self.scales_, strict=True)])

    def _parts(self, frames: np.ndarray) -> list[np.ndarray]:
        frames = self.whitening_(torch.as_tensor(frames)).double().numpy()
        means = frames.mean(axis=1)
        if not self.time_weight:
            return [means]
        time = (np.arange(frames.shape[1]) + 0.5) / frames.shape[1]
        slow = [np.einsum("ntd,t->nd", frames, np.cos(np.pi * order * time)) for order in (1, 2)]
        return [means, np.hstack(slow) / len(time)]


def fit_probe(
    frames: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    whitened: bool = False,
    time_weights: tuple[float, ...] = (0.0,),
    penalties: tuple[float, ...] = PENALTIES,
) -> Pipeline:
    """Fits a ridge classifier on the mean frame, with penalty and time weight chosen on the training videos alone.

    The choice is the most accurate one when each group of training videos is held out in turn.

    Args:
        frames: Frame features of the training videos, (N, T, D).
        labels: Class indices, (N,).
        groups: Group of each video, (N,); at least two groups.
        whitened: Whether frames are whitened.
        time_weights: To choose from, see `FrameMeans`.
        penalties: To choose from: the weight of the squared norm beside the sum of squared errors.

    Returns:
        The fitted pipeline of steps `frames` (`FrameMeans`) and `ridge`; `predict(frames)` gives class indices.

    Example:
        >>> probe = fit_probe(frames, labels, groups=persons)
        >>> accuracy = (probe.predict(other_frames) == other_labels).mean()
    """
    correct = dict.fromkeys(product(time_weights, penalties), 0)
    for inner, held_out in LeaveOneGroupOut().split(frames, labels, groups):
        for time_weight in time_weights:
            means = FrameMeans(whitened, time_weight).fit(frames[inner])
            vectors, others = means.transform(frames[inner]), means.transform(frames[held_out])
            for penalty in penalties:
                predicted = RidgeClassifier(alpha=penalty).fit(vectors, labels[inner]).predict(others)
                correct[time_weight, penalty] += (predicted == labels[held_out]).sum()
    time_weight, penalty = max(correct, key=correct.get)
    steps = [("frames", FrameMeans(whitened, time_weight)), ("ridge", RidgeClassifier(alpha=penalty))]
    return Pipeline(steps).fit(frames, labels)
