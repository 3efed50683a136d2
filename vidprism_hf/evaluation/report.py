"""Evaluation metadata and results, as JSON and as tables on the terminal."""

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

from ..data.bad_videos import BadClip, ClipCounts
from ..errors import printable
from ..util import preview
from .compute import Cost
from .metrics import CALIBRATION_BINS, Metrics, Share
from .scores import AverageClips

MOST_CLASSES = 20  # on the terminal; the worst if there are more
MOST_COLUMNS = 160  # of the terminal
MOST_MISSING = 3  # names on the terminal
SHORT = 12  # digits of a commit
DIGITS = 6  # of a proportion; further digits vary with the number of ranks
PACKAGES = ("vidprism_hf", "torch", "transformers")
FULL_PRECISION = "32-true"
CHOSEN = "The same clips chose the checkpoint: the figure is optimistic."


@dataclass(frozen=True)
class Protocol:
    """Test protocol: views per video, and how their scores are averaged.

    Attributes:
        frames: Frames per view.
        crops: Crops per clip, 1 or 3.
        clips: Clips per video, at different times.
        frame_stride: Stride of a clip's frames; None takes them from equal segments of the whole video.
        average_clips: Averages the logits (`score`) or the probabilities (`prob`) over the views.
        precision: The trainer's precision.
    """

    frames: int
    crops: int = 1
    clips: int = 1
    frame_stride: int | None = None
    average_clips: AverageClips = "score"
    precision: str = FULL_PRECISION

    @property
    def views(self) -> str:
        """Describes frames x crops x clips."""
        crops, clips = f"{self.crops} crop{'s' * (self.crops > 1)}", f"{self.clips} clip{'s' * (self.clips > 1)}"
        return f"{self.frames} frames x {crops} x {clips}"

    def __str__(self) -> str:
        """Describes the protocol in a phrase."""
        averaged = "logits" if self.average_clips == "score" else "probabilities"
        parts = [
            self.views,
            every(self.frame_stride) if self.frame_stride else "",
            f"{averaged} averaged" if self.crops * self.clips > 1 else "",
            self.precision if self.precision != FULL_PRECISION else "",
        ]
        return ", ".join(part for part in parts if part)


def every(stride: int) -> str:
    """Describes a stride: "every 2nd frame"."""
    if stride == 1:
        return "every frame"
    ending = "th" if stride % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(stride % 10, "th")
    return f"every {stride}{ending} frame"


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """Evaluation metadata, known before the test.

    Attributes:
        model: Folder or Hub id.
        commit: Commit of a model on the Hub; None for a folder.
        dataset: Name of the dataset.
        dataset_id: The dataset's id on the Hub, if it has one.
        split: Description of the validation split.
        sha256: Hash of names and labels of the validation split; None if streamed.
        protocol: Test protocol.
        labels: Names of the classes.
        num_clips: Videos of the validation split that are on disk.
        missing: Names of listed videos that are not on disk; they are skipped.
        cost: Compute cost of the model for one view.
        chose_checkpoint: Whether the checkpoint was selected on these videos.
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
        """Names the model, with its commit."""
        return f"{self.model} at {self.commit[:SHORT]}" if self.commit else self.model

    @property
    def conditions(self) -> str:
        """Describes what results must have in common to be comparable."""
        return f"{self.protocol}; {self.split}"

    @property
    def about(self) -> dict[str, Any]:
        """Identifies this evaluation: the first fields of `evaluation.json`."""
        dataset = {"name": self.dataset, "id": self.dataset_id, "split": self.split, "sha256": self.sha256}
        return {
            "model": self.model,
            "commit": self.commit,
            "dataset": dataset,
            "protocol": {**vars(self.protocol), "text": str(self.protocol)},
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation(Subject):
    """Evaluation metadata and results.

    Attributes:
        metrics: Metrics of all videos, or of fewer if the trainer's limits stopped the test early.
        unreadable: Videos that could not be read; they count as wrong.
    """

    metrics: Metrics
    unreadable: list[BadClip]

    @property
    def evaluated(self) -> int:
        """Number of videos evaluated."""
        return int(self.metrics.clips.sum())

    @property
    def is_partial(self) -> bool:
        """Whether some videos on disk were not evaluated."""
        return self.evaluated < self.num_clips

    @property
    def counts(self) -> ClipCounts:
        """Counts of expected, missing and undecodable videos."""
        return ClipCounts(self.num_clips + len(self.missing), len(self.missing), len(self.unreadable))

    @property
    def over_expected(self) -> dict[str, float]:
        """Top-k accuracies with missing videos counted as wrong; empty if none is missing, or if partial."""
        if not self.missing or self.is_partial:
            return {}
        shares = {name: share.value for name, share in self.metrics.accuracies.items() if name.startswith("top")}
        return {name: value * self.evaluated / self.counts.expected for name, value in shares.items()}

    @property
    def caveats(self) -> list[str]:
        """Caveats of the results, in sentences."""
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
        """One row per class: `label`, `clips`, `unreadable`, `right`, `top1`, `low`, `high` (None without videos), and
        `taken_for`, the most frequent wrong label, if any.
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
        """Folder name of its files: data, views, and settings other than the defaults."""
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
        """Returns everything as JSON, independent of the number of ranks."""
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
        # Each row of the matrix on one line.
        return re.sub(r"\[\n[\d\s,]+\]", lambda row: "[" + " ".join(row[0][1:-1].split()) + "]", text) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Evaluation":
        """Reads the output of `to_json`, with its rounded values."""
        found = json.loads(text)
        dataset, clips, rows = found["dataset"], found["clips"], found["per_class"]
        numbers = {
            name: np.array([row[name] for row in rows], dtype=np.int64) for name in ("clips", "unreadable", "right")
        }
        calibration = {
            name: math.nan if found["calibration"][key] is None else found["calibration"][key]
            for name, key in (("ece", "ece"), ("confidence", "mean_confidence"))
        }
        return cls(
            model=found["model"],
            commit=found["commit"],
            dataset=dataset["name"],
            dataset_id=dataset["id"],
            split=dataset["split"],
            sha256=dataset["sha256"],
            protocol=Protocol(**{name: value for name, value in found["protocol"].items() if name != "text"}),
            labels=found["confusion"]["labels"],
            num_clips=clips["expected"] - len(clips["missing"]),
            missing=tuple(clips["missing"]),
            cost=Cost(**found["compute"]),
            chose_checkpoint=CHOSEN in found["caveats"],
            metrics=Metrics(
                accuracies={name: Share(**share) for name, share in found["metrics"].items()},
                confusion=np.array(found["confusion"]["counts"], dtype=np.int64),
                not_finite=clips["not_finite"],
                **numbers,
                **calibration,
            ),
            unreadable=[BadClip("val", **note) for note in clips["unreadable"]],
        )


def rounded(value: Any) -> Any:
    """Rounds all floats, nested ones too; NaN and infinity become None."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    return value


def print_evaluation(evaluation: Evaluation) -> None:
    """Prints an evaluation for reading."""
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
    """Returns the table of metrics with their intervals."""
    table = plain_table("", ">", "", "")
    table.add_row("", "", "95 % interval", "")
    for name, share in metrics.accuracies.items():
        table.add_row(name, f"{share.value:.4f}", f"{share.low:.4f} to {share.high:.4f}", share.interval)
    confidence = f"of {CALIBRATION_BINS} bins; mean confidence {metrics.confidence:.4f}"
    if math.isfinite(metrics.ece):
        table.add_row("ece", f"{metrics.ece:.4f}", "", confidence)
    return table


def cost_table(evaluation: Evaluation) -> Table:
    """Returns the table of multiply-adds and parameters, with the paper's figures."""
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
    """Returns the table of classes, or of the worst of many; with unreadable videos if there are any."""
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
    """Returns an empty table without borders; `>` right-aligns a column."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    for kind in columns:
        table.add_column(justify="right" if kind == ">" else "left", no_wrap=True)
    return table
