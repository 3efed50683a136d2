"""From scores and labels of clips to accuracies with intervals, a confusion matrix and calibration."""

from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from .intervals import mean_class_interval, wilson_interval

CALIBRATION_BINS = 15  # of equal width, as Guo et al. (arXiv:1706.04599) take them
WILSON, MOVER = "Wilson", "MOVER of the classes' Wilson"  # how an interval was found


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval.

    Attributes:
        value: From 0 to 1.
        low: Lower limit.
        high: Upper limit.
        interval: How the interval was found.
    """

    value: float
    low: float
    high: float
    interval: str


@dataclass(frozen=True, eq=False)
class Metrics:
    """What the scores of N clips over K classes come to. A clip that could not be read counts as wrong.

    Attributes:
        accuracies: `top1`, `top5` where there are more than five classes, and `mean_class`, the mean of the classes'
            top-1 over those that have clips.
        clips: Of each class, (K,).
        unreadable: Of these, clips that could not be read, (K,).
        right: Of these, clips whose best label is right, (K,).
        confusion: Readable clips by class (row) and best label (column), (K, K).
        ece: Expected calibration error of the best label's probability over the readable clips; NaN without any.
        confidence: The mean of that probability.
        not_finite: Readable clips whose scores give no probabilities, as of NaN. They count as wrong and are left out
            of confusion matrix and calibration.
    """

    accuracies: dict[str, Share]
    clips: np.ndarray
    unreadable: np.ndarray
    right: np.ndarray
    confusion: np.ndarray
    ece: float
    confidence: float
    not_finite: int = 0

    def class_share(self, index: int) -> Share | None:
        """Top-1 of a class; None without clips."""
        clips = int(self.clips[index])
        return _share(int(self.right[index]), clips) if clips else None


def measure(scores: np.ndarray, labels: np.ndarray, readable: np.ndarray | None = None) -> Metrics:
    """Measures scores against labels.

    Args:
        scores: (N, K), logits or log-probabilities: their softmax is what calibration looks at.
        labels: Class indices, (N,).
        readable: Which clips have scores, (N,); None is all.

    Raises:
        ValueError: If there are no clips.
    """
    total, classes = scores.shape
    if not total:
        raise ValueError("no clips to measure")
    readable = np.ones(total, dtype=bool) if readable is None else readable.astype(bool)
    ranks, probabilities = label_ranks(scores, labels), torch.from_numpy(scores).softmax(1).numpy()
    known = readable & ~np.isnan(probabilities).any(axis=1)
    hits = {f"top{k}": (ranks < k) & known for k in ((1, 5) if classes > 5 else (1,))}
    clips, unreadable, right = (
        np.bincount(labels[chosen], minlength=classes) for chosen in (np.ones_like(readable), ~readable, hits["top1"])
    )
    accuracies = {name: _share(int(hit.sum()), total) for name, hit in hits.items()}
    shares = right[clips > 0] / clips[clips > 0]
    accuracies["mean_class"] = Share(float(shares.mean()), *mean_class_interval(right.tolist(), clips.tolist()), MOVER)
    confusion = np.zeros((classes, classes), dtype=np.int64)
    ece = confidence = float("nan")
    if known.any():
        best, target = scores[known].argmax(1), labels[known]
        confusion = multiclass_confusion_matrix(torch.from_numpy(best), torch.from_numpy(target), classes).numpy()
        sure = probabilities[known].max(1)
        ece, confidence = calibration_error(sure, best == target), float(sure.mean())
    not_finite = int((readable & ~known).sum())
    return Metrics(accuracies, clips, unreadable, right, confusion, ece, confidence, not_finite)


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error (Guo et al., arXiv:1706.04599): how far confidence and accuracy lie apart.

    Not torchmetrics', which has a bin of its own for a confidence of exactly 1, that of saturated scores.

    Args:
        confidence: Of N clips, from 0 to 1, (N,).
        right: Whether each is right, (N,).
    """
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]  # a bin has its upper edge
    apart = np.bincount(np.digitize(confidence, edges, right=True), weights=confidence.astype(np.float64) - right)
    return float(np.abs(apart).sum() / len(confidence))


def label_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the right one, (N,): those with more, and of equals those of a lower index.

    A score that is no number comes before all.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = (scores == own) & (np.arange(scores.shape[1]) < labels[:, None])
    return (~(scores <= own) | before).sum(axis=1)


def _share(hits: int, trials: int) -> Share:
    return Share(hits / trials, *wilson_interval(hits / trials, trials), WILSON)
