"""What an evaluation is of and what it found: as JSON, and as tables on the terminal."""

import io
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.bad_clips import BadClip, ClipCounts
from ..errors import printable
from ..util import preview
from .compute import Cost
from .metrics import CALIBRATION_BINS, Metrics
from .scores import AverageClips

MOST_CLASSES = 20  # on the terminal; of more the worst are shown
MOST_COLUMNS = 160  # of the terminal
MOST_MISSING = 3  # names on the terminal
SHORT = 12  # digits of a commit
DIGITS = 6  # a share's; what is beyond them differs between processes
PACKAGES = ("vidprism_hf", "torch", "transformers")
FULL_PRECISION = "32-true"
CHOSEN = "The same clips chose the checkpoint: the figure is optimistic."


@dataclass(frozen=True)
class Protocol:
    """What of each video is shown to the model, and what is made of it.

    Attributes:
        frames: Frames of a view.
        crops: Crops of each clip, 1 or 3.
        clips: Clips of each video, at different places in time.
        frame_stride: Frames between those of a clip; None takes them from equal segments of the whole video.
        average_clips: What is averaged over the views: `score`, the logits, or `prob`, the probabilities.
        precision: The trainer's.
    """

    frames: int
    crops: int = 1
    clips: int = 1
    frame_stride: int | None = None
    average_clips: AverageClips = "score"
    precision: str = FULL_PRECISION

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
            every(self.frame_stride) if self.frame_stride else "",
            f"{averaged} averaged" if self.crops * self.clips > 1 else "",
            self.precision if self.precision != FULL_PRECISION else "",
        ]
        return ", ".join(part for part in parts if part)


def every(stride: int) -> str:
    """Which frames a stride takes, in words."""
    if stride == 1:
        return "every frame"
    ending = "th" if stride % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(stride % 10, "th")
    return f"every {stride}{ending} frame"


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """What is evaluated, as it is known before.

    Attributes:
        model: Folder or Hub id.
        commit: Of a model on the Hub; None of a folder.
        dataset: Its name.
        dataset_id: The dataset's id on the Hub, if it has one.
        split: How the clips were held out, in a phrase.
        sha256: Over names and labels of the held-out clips; None of streamed ones.
        protocol: How they are shown.
        labels: Of the classes.
        num_clips: Held-out clips that are there.
        missing: Names of clips that the source lists and the disk lacks; they are left out.
        cost: Of the model, for one view.
        chose_checkpoint: Whether the same clips chose this checkpoint among others.
    """

    model: str
    commit: str | None = None
    dataset: str
    dataset_id: str | None = None
    split: str
    sha256: str | None = None
    protocol: Protocol
    labels: list[str]
    num_clips: int
    missing: tuple[str, ...] = ()
    cost: Cost
    chose_checkpoint: bool = False

    @property
    def title(self) -> str:
        """What is evaluated, in a phrase."""
        return f"{self.model} at {self.commit[:SHORT]}" if self.commit else self.model

    @property
    def conditions(self) -> str:
        """What figures must have in common to be compared, in a phrase."""
        return f"{self.protocol}; {self.split}"

    @property
    def about(self) -> dict[str, Any]:
        """What tells this evaluation from others, as `evaluation.json` begins."""
        dataset = {"name": self.dataset, "id": self.dataset_id, "split": self.split, "sha256": self.sha256}
        return {
            "model": self.model,
            "commit": self.commit,
            "dataset": dataset,
            "protocol": {**vars(self.protocol), "text": str(self.protocol)},
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation(Subject):
    """What was found.

    Attributes:
        metrics: What the scores come to; of fewer than `num_clips` clips where the trainer was told to stop early.
        unreadable: Clips that could not be read; they count as wrong.
    """

    metrics: Metrics
    unreadable: list[BadClip]

    @property
    def evaluated(self) -> int:
        """Clips that the metrics are of."""
        return int(self.metrics.clips.sum())

    @property
    def is_partial(self) -> bool:
        """Whether clips that are there were not evaluated."""
        return self.evaluated < self.num_clips

    @property
    def counts(self) -> ClipCounts:
        """What became of the clips."""
        return ClipCounts(self.num_clips + len(self.missing), len(self.missing), len(self.unreadable))

    @property
    def over_expected(self) -> dict[str, float]:
        """Top-k accuracies with the missing clips counted as wrong; nothing where none is missing, or of a part."""
        if not self.missing or self.is_partial:
            return {}
        shares = {name: share.value for name, share in self.metrics.accuracies.items() if name.startswith("top")}
        return {name: value * self.evaluated / self.counts.expected for name, value in shares.items()}

    @property
    def caveats(self) -> list[str]:
        """What to know of the figures, in sentences."""
        told = []
        if self.is_partial:
            told.append(f"Only {self.evaluated} of the {self.num_clips} held-out clips were evaluated.")
        if self.missing:
            told.append(f"{len(self.missing)} of {self.counts.expected} listed clips are not on disk and are left out.")
        if self.over_expected:
            found = ", ".join(f"{name} {value:.4f}" for name, value in self.over_expected.items())
            told.append(f"Over all {self.counts.expected}, missing ones counted as wrong: {found}.")
        if self.unreadable:
            told.append("ece and the confusion matrix are of the readable clips.")
        if self.metrics.not_finite:
            told.append(f"The scores of {self.metrics.not_finite} readable clips are no numbers: they count as wrong.")
        return told + [CHOSEN] * self.chose_checkpoint

    @property
    def values(self) -> dict[str, float]:
        """The metrics by name, without intervals."""
        found = {name: share.value for name, share in self.metrics.accuracies.items()}
        return found | ({"ece": self.metrics.ece} if math.isfinite(self.metrics.ece) else {})

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
        """A name for the folder of its files: the data, the views, and what is unusual."""
        known, protocol = re.sub(r"[^\w.]+", "-", self.dataset).strip("-."), self.protocol
        parts = [
            known or "data",
            f"{protocol.frames}x{protocol.crops}x{protocol.clips}",
            f"stride{protocol.frame_stride}" if protocol.frame_stride else "",
            protocol.average_clips if protocol.average_clips != "score" else "",
            protocol.precision if protocol.precision != FULL_PRECISION else "",
            "partial" if self.is_partial else "",
        ]
        return "-".join(part for part in parts if part)

    def to_json(self) -> str:
        """All of it. The number of processes makes no difference."""
        unreadable = [{"name": clip.name, "label": clip.label, "cause": clip.cause} for clip in self.unreadable]
        counts = self.counts
        content = {
            **self.about,
            "caveats": self.caveats,
            "clips": {
                "expected": counts.expected,
                "used": self.evaluated - counts.undecodable,
                "evaluated": self.evaluated,
                "not_finite": self.metrics.not_finite,
                "unreadable": unreadable,
                "missing": list(self.missing),
            },
            "metrics": {name: vars(share) for name, share in self.metrics.accuracies.items()},
            "missing_counted_wrong": self.over_expected,
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
        text = json.dumps(rounded(content), indent=2, allow_nan=False)
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


def print_evaluation(evaluation: Evaluation) -> None:
    """Prints what a person wants to know of it."""
    counts = evaluation.counts.phrase("held-out clips")
    print(printable(f"{evaluation.title} on {counts} of {evaluation.dataset}"))
    print(f"{evaluation.protocol}; {printable(evaluation.split)}")
    for sentence in evaluation.caveats:
        print(sentence)
    if evaluation.missing:
        print(f"Missing: {preview(evaluation.missing, MOST_MISSING)}")
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
    if math.isfinite(metrics.ece):
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
    """The classes, or the worst of many; unreadable clips where there are any."""
    shown = [row for row in classes if row["clips"]]
    lost = any(row["unreadable"] for row in shown)
    table = plain_table("", ">", *[">"] * lost, ">", ">", "")
    title = "class"
    if len(shown) > MOST_CLASSES:
        title = f"the worst {MOST_CLASSES} of {len(shown)} classes"
        shown = sorted(shown, key=lambda row: row["top1"])[:MOST_CLASSES]
    table.add_row(title, "clips", *["unreadable"] * lost, "top1", "95 % interval", "most often taken for")
    for row in shown:
        interval = f"{row['low']:.4f} to {row['high']:.4f}"
        # As Text: names may look like rich's markup.
        label, other = (Text(printable(name or "")) for name in (row["label"], row["taken_for"]))
        unreadable = [str(row["unreadable"])] * lost
        table.add_row(label, str(row["clips"]), *unreadable, f"{row['top1']:.4f}", interval, other)
    return table


def plain_table(*columns: str) -> Table:
    """A table without lines; `>` is a column of numbers."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    for kind in columns:
        table.add_column(justify="right" if kind == ">" else "left", no_wrap=True)
    return table
