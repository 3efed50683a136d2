"""The scores of the tested clips: averaged over each clip's views, put together from all processes, each clip once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import lightning as L
import numpy as np
import torch

from ..distributed import Ranks
from .metrics import measure

AverageClips = Literal["score", "prob"]  # mmaction2's words


@dataclass(frozen=True, eq=False)
class ClipScores:
    """What a model said of N clips, in the order of the dataset.

    Attributes:
        scores: (N, K), float32; their softmax are the probabilities of the classes.
        labels: Class indices, (N,).
        readable: False for clips that could not be read, whose scores say nothing, (N,).
        notes: By name of these clips, class index and cause.
        repeated: Names of clips that were scored more than once.
    """

    scores: np.ndarray
    labels: np.ndarray
    readable: np.ndarray
    notes: dict[str, tuple[int, str]]
    repeated: tuple[str, ...] = ()


class ScoreRecorder(L.Callback):
    """Keeps the scores of a test, and logs its accuracies as `test/top1` and the like.

    The module's test step gives `logits` (B, views, K). A batch has `labels`, and may have `readable`, `bad_clips`,
    `clip_index` and `name`, as those of `VideoDataModule` do.

    Args:
        average_clips: What is averaged over the views of a clip: `score`, the logits, or `prob`, the probabilities.

    Attributes:
        result: Of all processes, in each of them, when the test has ended.
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
        # They stay on the device until the end: to fetch them would wait for it in each step.
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
    """One row of scores a clip, (B, K), of the logits of its views, (B, views, K)."""
    if average_clips == "score":
        return logits.float().mean(dim=1)
    return logits.float().softmax(dim=-1).mean(dim=1).log()


def put_together(
    parts: Sequence[list[np.ndarray]], notes: Sequence[dict[str, Any]], names: Sequence[str] = ()
) -> ClipScores:
    """The shares of all processes in the order of the clips.

    Args:
        parts: Of each process that had clips: scores, labels, readable, and each clip's index or -1.
        notes: Of each process.
        names: Of the clips in the order of the parts, where they are known.

    Raises:
        RuntimeError: If no clip was scored.
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
