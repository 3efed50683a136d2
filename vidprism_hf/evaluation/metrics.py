"""Accuracies with intervals, confusion matrix and calibration, from scores and labels."""

from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from .intervals import mean_class_interval, wilson_interval

CALIBRATION_BINS = 15  # of equal width, as in Guo et al. (arXiv:1706.04599)
WILSON, MOVER = "Wilson", "MOVER of the classes' Wilson"  # methods of intervals


@dataclass(frozen=True)
class Share:
    """A proportion with its 95 % interval.

    Attributes:
        value: From 0 to 1.
        low: Lower limit.
        high: Upper limit.
        interval: Method of the interval.
    """

    value: float
    low: float
    high: float
    interval: str


@dataclass(frozen=True, eq=False)
class Metrics:
    """Metrics of N videos and K classes. An unreadable video counts as wrong.

    Attributes:
        accuracies: `top1`; `top5` for more than five classes; `mean_class`, the mean top-1 of the classes that have
            videos.
        clips: Videos per class, (K,).
        unreadable: Unreadable videos per class, (K,).
        right: Correctly classified videos per class, (K,).
        confusion: Readable videos by class (row) and predicted label (column), (K, K).
        ece: Expected calibration error over the readable videos; NaN without any.
        confidence: Mean probability of the predicted label.
        not_finite: Readable videos without valid probabilities, for example because of NaN scores. They count as wrong
            and are excluded from confusion matrix and calibration.
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
        """Returns the top-1 accuracy of a class; None without videos."""
        clips = int(self.clips[index])
        return _share(int(self.right[index]), clips) if clips else None


def measure(scores: np.ndarray, labels: np.ndarray, readable: np.ndarray | None = None) -> Metrics:
    """Computes the metrics of scores against labels.

    Args:
        scores: (N, K), logits or log-probabilities; calibration uses their softmax.
        labels: Class indices, (N,).
        readable: Which videos have scores, (N,); None means all.

    Raises:
        ValueError: If there are no videos.
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
    """Returns the expected calibration error (Guo et al., arXiv:1706.04599).

    Not torchmetrics', which gives a confidence of exactly 1 (saturated scores) a bin of its own.

    Args:
        confidence: Probability of the predicted label, (N,).
        right: Whether the prediction is right, (N,).
    """
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]  # a bin includes its upper edge
    apart = np.bincount(np.digitize(confidence, edges, right=True), weights=confidence.astype(np.float64) - right)
    return float(np.abs(apart).sum() / len(confidence))


def label_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns how many classes rank above the true one, (N,); ties rank by index, NaN above everything."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = (scores == own) & (np.arange(scores.shape[1]) < labels[:, None])
    return (~(scores <= own) | before).sum(axis=1)


def _share(hits: int, trials: int) -> Share:
    return Share(hits / trials, *wilson_interval(hits / trials, trials), WILSON)
