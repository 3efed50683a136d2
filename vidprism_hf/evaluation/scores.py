"""Test scores: averaged over each video's views and merged from all ranks, every video once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import lightning as L
import numpy as np
import torch

from ..distributed import Ranks
from .metrics import measure

AverageClips = Literal["score", "prob"]  # mmaction2's terms


@dataclass(frozen=True, eq=False)
class ClipScores:
    """Scores of N videos, in the order of the dataset.

    Attributes:
        scores: (N, K), float32; their softmax gives the class probabilities.
        labels: Class indices, (N,).
        readable: False for unreadable videos, whose scores are meaningless, (N,).
        notes: Class index and cause of unreadable videos by name.
        repeated: Names of videos that were scored more than once.
    """

    scores: np.ndarray
    labels: np.ndarray
    readable: np.ndarray
    notes: dict[str, tuple[int, str]]
    repeated: tuple[str, ...] = ()


class ScoreRecorder(L.Callback):
    """Records the scores of a test and logs its accuracies as `test/top1` etc.

    The module's test step returns `logits` (B, views, K). A batch has `labels`, and may have `readable`, `bad_clips`,
    `clip_index` and `name`, as in `VideoDataModule`.

    Args:
        average_clips: Averages the logits (`score`) or the probabilities (`prob`) over the views of a video.

    Attributes:
        result: Merged scores of all ranks, on every rank, after the test.
    """

    def __init__(self, average_clips: AverageClips = "score"):
        self.average_clips = average_clips
        self.result: ClipScores | None = None
        self._batches: list[tuple[torch.Tensor, ...]] = []
        self._notes: dict[str, tuple[int, str]] = {}
        self._names: list[str] = []

    def on_test_epoch_start(self, trainer, pl_module):
        self.result, self._batches, self._notes, self._names = None, [], {}, []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        labels = batch["labels"]
        readable = batch.get("readable", torch.ones_like(labels, dtype=torch.bool))
        index = batch.get("clip_index", torch.full_like(labels, -1))
        # Kept on the device until the end; copying would synchronise in every step.
        self._batches.append((average_views(outputs["logits"], self.average_clips), labels, readable, index))
        self._names += batch.get("name", ())
        self._notes.update({name: (label, cause) for name, label, cause in batch.get("bad_clips", ())})

    def on_test_epoch_end(self, trainer, pl_module):
        mine = [torch.cat(parts).cpu().numpy() for parts in zip(*self._batches, strict=True)]
        with Ranks.running() as ranks:
            told = ranks.gather(lambda: (mine, self._notes, self._names))
        self._batches = []
        parts, notes, names = zip(*told, strict=True)
        self.result = put_together([arrays for arrays in parts if arrays], notes, [*chain(*names)])
        accuracies = measure(self.result.scores, self.result.labels, self.result.readable).accuracies
        pl_module.log_dict({f"test/{name}": share.value for name, share in accuracies.items()})


def average_views(logits: torch.Tensor, average_clips: AverageClips) -> torch.Tensor:
    """Averages the views of each video: logits (B, views, K) to scores (B, K)."""
    if average_clips == "score":
        return logits.float().mean(dim=1)
    return logits.float().softmax(dim=-1).mean(dim=1).log()


def put_together(
    parts: Sequence[list[np.ndarray]], notes: Sequence[dict[str, Any]], names: Sequence[str] = ()
) -> ClipScores:
    """Merges the scores of all ranks, in the order of the dataset.

    Args:
        parts: Per rank with any videos: scores, labels, readable, and each video's index or -1.
        notes: Per rank.
        names: Names of the videos in the order of the parts, if known.

    Raises:
        RuntimeError: If no video was scored.
    """
    if not parts:
        raise RuntimeError("no clip was evaluated")
    scores, labels, readable, index = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    known, first, times = np.unique(index, return_index=True, return_counts=True)
    twice = [
        (number, place) for number, place, seen in zip(known, first, times, strict=True) if seen > 1 and number >= 0
    ]
    repeated = tuple(names[place] if names else f"held-out clip {number}" for number, place in twice)
    order = np.argsort(index, kind="stable")
    merged = {name: note for each in notes for name, note in each.items()}
    return ClipScores(scores[order], labels[order], readable[order], dict(sorted(merged.items())), repeated)
