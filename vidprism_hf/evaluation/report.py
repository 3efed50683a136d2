"""What an evaluation found: as JSON, as tables on the terminal, and as the places where it is kept."""

import io
import json
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.bad_clips import BadClip, ClipCounts
from ..data.clip_contents import write_whole
from ..errors import UserError, printable
from .compute import Cost
from .figures import confusion_matrix
from .metrics import CALIBRATION_BINS, Metrics
from .scores import AverageClips

RESULTS, CONFUSION = "evaluation.json", "confusion.png"
MOST_CLASSES = 20  # on the terminal; of more the worst are shown
MOST_COLUMNS = 160  # of the terminal
DIGITS = 6  # a share's; what is beyond them differs between processes
PACKAGES = ("vidprism_hf", "torch", "transformers")


@dataclass(frozen=True)
class Protocol:
    """What of each video is shown to the model, and what is made of it.

    Attributes:
        frames: Frames of a view.
        crops: Crops of each clip, 1 or 3.
        clips: Clips of each video, at different places in time.
        frame_stride: Frames between those of a clip; None takes them from equal segments of the whole video.
        average_clips: What is averaged over the views: `score`, the logits, or `prob`, the probabilities.
    """

    frames: int
    crops: int = 1
    clips: int = 1
    frame_stride: int | None = None
    average_clips: AverageClips = "score"

    @property
    def views(self) -> str:
        """Frames x crops x clips, in words."""
        crops, clips = f"{self.crops} crop{'s' * (self.crops > 1)}", f"{self.clips} clip{'s' * (self.clips > 1)}"
        return f"{self.frames} frames x {crops} x {clips}"

    def __str__(self) -> str:
        """The whole protocol in a phrase."""
        averaged = "logits" if self.average_clips == "score" else "probabilities"
        parts = [
            self.views,
            f"every {self.frame_stride}th frame" if self.frame_stride else "",
            f"{averaged} averaged" if self.crops * self.clips > 1 else "",
        ]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model on the held-out clips of some data.

    Attributes:
        model: Folder or Hub id.
        dataset: Its name.
        split: How the clips were held out, in a phrase.
        protocol: How they were shown.
        labels: Of the classes.
        metrics: What the scores come to.
        num_clips: Held-out clips that are there; fewer are evaluated where the trainer was told to stop early.
        missing: Names of clips that the source lists and the disk lacks; they are left out.
        unreadable: Clips that could not be read; they count as wrong.
        cost: Of the model, for one view.
        dataset_id: The dataset's id on the Hub, if it has one.
    """

    model: str
    dataset: str
    split: str
    protocol: Protocol
    labels: list[str]
    metrics: Metrics
    num_clips: int
    missing: tuple[str, ...]
    unreadable: list[BadClip]
    cost: Cost
    dataset_id: str | None = None

    @property
    def evaluated(self) -> int:
        """Clips that the metrics are of."""
        return int(self.metrics.clips.sum())

    @property
    def counts(self) -> ClipCounts:
        """What became of the clips."""
        return ClipCounts(self.num_clips + len(self.missing), len(self.missing), len(self.unreadable))

    @property
    def values(self) -> dict[str, float]:
        """The metrics by name, without intervals."""
        return {name: share.value for name, share in self.metrics.accuracies.items()} | {"ece": self.metrics.ece}

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % intervals of the accuracies."""
        return {name: (share.low, share.high) for name, share in self.metrics.accuracies.items()}

    @cached_property
    def classes(self) -> list[dict[str, Any]]:
        """A row a class: `label`, `clips`, `unreadable`, `right`, `top1`, `low`, `high` (None without clips), and
        `taken_for`, the wrong label that its clips got most often, None if they got none.
        """
        found, rows = self.metrics, []
        wrong = found.confusion * ~np.eye(len(self.labels), dtype=bool)
        for index, label in enumerate(self.labels):
            share, other = found.class_share(index), int(wrong[index].argmax())
            rows.append(
                {
                    "label": label,
                    "clips": int(found.clips[index]),
                    "unreadable": int(found.unreadable[index]),
                    "right": int(found.right[index]),
                    "top1": share and share.value,
                    "low": share and share.low,
                    "high": share and share.high,
                    "taken_for": self.labels[other] if wrong[index, other] else None,
                }
            )
        return rows

    @property
    def folder_name(self) -> str:
        """A name for the folder of its files, which tells data and views."""
        known, protocol = re.sub(r"[^\w.]+", "-", self.dataset).strip("-."), self.protocol
        prob = "-prob" if protocol.average_clips == "prob" else ""
        return f"{known or 'data'}-{protocol.frames}x{protocol.crops}x{protocol.clips}{prob}"

    def to_json(self) -> str:
        """All of it. The number of processes makes no difference."""
        unreadable = [{"name": clip.name, "label": clip.label, "cause": clip.cause} for clip in self.unreadable]
        counts = self.counts
        content = {
            "model": self.model,
            "dataset": {"name": self.dataset, "id": self.dataset_id, "split": self.split},
            "protocol": {**vars(self.protocol), "text": str(self.protocol)},
            "clips": {
                "expected": counts.expected,
                "used": self.evaluated - counts.undecodable,
                "evaluated": self.evaluated,
                "unreadable": unreadable,
                "missing": list(self.missing),
            },
            "metrics": {name: vars(share) for name, share in self.metrics.accuracies.items()},
            "calibration": {
                "ece": self.metrics.ece,
                "bins": CALIBRATION_BINS,
                "mean_confidence": self.metrics.confidence,
            },
            "compute": vars(self.cost),
            "per_class": self.classes,
            "confusion": {"labels": self.labels, "counts": self.metrics.confusion.tolist()},
            "versions": {name: version(name) for name in PACKAGES},
        }
        text = json.dumps(rounded(content), indent=2)
        # A row of the matrix is a line.
        return re.sub(r"\[\n[\d\s,]+\]", lambda row: "[" + " ".join(row[0][1:-1].split()) + "]", text) + "\n"


def rounded(value: Any) -> Any:
    """The same with shorter numbers, and None for what is no number."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    return value


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Writes `evaluation.json` and `confusion.png`.

    Raises:
        UserError: If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RESULTS, evaluation.to_json().encode())
        write_whole(folder / CONFUSION, confusion_matrix(evaluation.metrics.confusion, evaluation.labels))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); name another folder by --evaluation.output"
        ) from error


def print_evaluation(evaluation: Evaluation) -> None:
    """Prints what a person wants to know of it."""
    part = f"; only {evaluation.evaluated} were evaluated" if evaluation.evaluated < evaluation.num_clips else ""
    used = evaluation.counts.phrase("held-out clips")
    print(f"{evaluation.model} on {used} of {printable(evaluation.dataset)}{part}")
    print(f"{evaluation.protocol}; {printable(evaluation.split)}")
    for table in (accuracy_table(evaluation.metrics), cost_table(evaluation), class_table(evaluation.classes)):
        text = io.StringIO()
        Console(file=text, width=MOST_COLUMNS).print(table)
        print("\n" + "\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def accuracy_table(metrics: Metrics) -> Table:
    """The metrics with their intervals."""
    table = plain_table("", ">", "", "")
    table.add_row("", "", "95 % interval", "")
    for name, share in metrics.accuracies.items():
        table.add_row(name, f"{share.value:.4f}", f"{share.low:.4f} to {share.high:.4f}", share.interval)
    confidence = f"of {CALIBRATION_BINS} bins; mean confidence {metrics.confidence:.4f}"
    table.add_row("ece", f"{metrics.ece:.4f}", "", confidence)
    return table


def cost_table(evaluation: Evaluation) -> Table:
    """Multiply-adds and parameters, beside what the paper states."""
    cost, frames = evaluation.cost, evaluation.protocol.frames
    table = plain_table("", ">", ">")
    table.add_row("", "GMACs a view", "parameters")
    table.add_row("this model, counted", f"{cost.giga_macs:.4g}", f"{cost.million_parameters:.1f} M")
    if cost.bare_tower_giga_macs is not None:
        table.add_row(f"bare CLIP tower, {frames} frames, counted", f"{cost.bare_tower_giga_macs:.4g}", "")
    if cost.paper_giga_macs is not None:
        table.add_row("the paper's, this tower and frames", f"{cost.paper_giga_macs:.4g}", "")
    return table


def class_table(classes: list[dict[str, Any]]) -> Table:
    """The classes, or the worst of many."""
    shown = [row for row in classes if row["clips"]]
    table = plain_table("", ">", ">", ">", "")
    title = "class"
    if len(shown) > MOST_CLASSES:
        title = f"the worst {MOST_CLASSES} of {len(shown)} classes"
        shown = sorted(shown, key=lambda row: row["top1"])[:MOST_CLASSES]
    table.add_row(title, "clips", "top1", "95 % interval", "most often taken for")
    for row in shown:
        interval = f"{row['low']:.4f} to {row['high']:.4f}"
        # As Text: names may look like rich's markup.
        label, other = (Text(printable(name or "")) for name in (row["label"], row["taken_for"]))
        table.add_row(label, str(row["clips"]), f"{row['top1']:.4f}", interval, other)
    return table


def plain_table(*columns: str) -> Table:
    """A table without lines; `>` is a column of numbers."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    for kind in columns:
        table.add_column(justify="right" if kind == ">" else "left", no_wrap=True)
    return table


def default_folder(model: str) -> Path:
    """Where evaluations of a model are kept: beside its folder, or for an id of the Hub below runs/."""
    return (Path(model).parent if os.path.isdir(model) else Path("runs") / model.replace("/", "--")) / "evaluation"
