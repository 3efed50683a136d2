"""From scores and labels of clips to accuracies with intervals, a confusion matrix and calibration."""

from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

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
    """

    accuracies: dict[str, Share]
    clips: np.ndarray
    unreadable: np.ndarray
    right: np.ndarray
    confusion: np.ndarray
    ece: float
    confidence: float

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
    ranks = label_ranks(scores, labels)
    hits = {f"top{k}": (ranks < k) & readable for k in ((1, 5) if classes > 5 else (1,))}
    clips, unreadable, right = (
        np.bincount(labels[chosen], minlength=classes) for chosen in (np.ones_like(readable), ~readable, hits["top1"])
    )
    accuracies = {name: _share(int(hit.sum()), total) for name, hit in hits.items()}
    shares = right[clips > 0] / clips[clips > 0]
    accuracies["mean_class"] = Share(float(shares.mean()), *mean_class_interval(right.tolist(), clips.tolist()), MOVER)
    confusion = np.zeros((classes, classes), dtype=np.int64)
    ece = confidence = float("nan")
    known = readable & ~np.isnan(scores).any(axis=1)
    if known.any():
        probabilities, target = torch.from_numpy(scores[known]).softmax(1), torch.from_numpy(labels[known])
        best = torch.from_numpy(scores[known].argmax(1))
        confusion = multiclass_confusion_matrix(best, target, classes).numpy()
        ece = multiclass_calibration_error(probabilities, target, classes, CALIBRATION_BINS, "l1").item()
        confidence = probabilities.max(1).values.mean().item()
    return Metrics(accuracies, clips, unreadable, right, confusion, ece, confidence)


def label_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the right one, (N,): those with more, and of equals those of a lower index.

    A score that is no number comes before all.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = (scores == own) & (np.arange(scores.shape[1]) < labels[:, None])
    return (~(scores <= own) | before).sum(axis=1)


def _share(hits: int, trials: int) -> Share:
    return Share(hits / trials, *wilson_interval(hits / trials, trials), WILSON)
