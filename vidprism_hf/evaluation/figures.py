"""The pictures of a model card, as PNG bytes: the same numbers give the same bytes."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..fonts import lettering

MOST_CLASSES = 40  # more rows would not be legible
MOST_LETTERS = 40  # of a name


def curves(epochs: Mapping[int, Mapping[str, float]]) -> bytes:
    """Losses and held-out top-1 over the epochs of a run.

    Args:
        epochs: Epoch, from 0, to any of `train_loss`, `val_loss` and `val_top1`.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    for axes, names in ((losses, {"train_loss": "training", "val_loss": "held-out"}), (accuracy, {"val_top1": None})):
        for name, label in names.items():
            points = [(epoch + 1, values[name]) for epoch, values in sorted(epochs.items()) if name in values]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    losses.set_ylabel("loss")
    if losses.lines:
        losses.legend()
    accuracy.set_ylabel("held-out top-1")
    accuracy.set_ylim(-0.02, 1.02)
    return png(figure)


def expert_names(rates: Sequence[int]) -> list[str]:
    """What the experts are called, each by another name."""
    return [
        f"rate {rate}" + (f" ({list(rates[: place + 1]).count(rate)})" if list(rates).count(rate) > 1 else "")
        for place, rate in enumerate(rates)
    ]


def expert_weights(weights: np.ndarray, labels: Sequence[str], rates: Sequence[int]) -> bytes:
    """Mean weight of each expert for each class; with many classes their distribution.

    Args:
        weights: (K, N), rows of classes without clips are NaN.
        labels: Of the K classes.
        rates: Of the N experts.
    """
    experts = expert_names(rates)
    if len(labels) > MOST_CLASSES:
        figure = Figure(figsize=(1.2 * len(rates) + 3, 4), layout="constrained")
        axes = figure.subplots()
        axes.boxplot(weights[~np.isnan(weights).any(axis=1)], tick_labels=experts)
        axes.set_ylabel("expert weight, one value a class")
        return png(figure)
    size = 1.2 * len(rates) + max(3, 2 + breadth(labels)), 0.3 * len(labels) + 1.2
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(weights, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks(range(len(experts)), experts)
    name(axes.yaxis, labels)
    figure.colorbar(image, ax=axes, label="expert weight")
    return png(figure)


def confusion_matrix(counts: np.ndarray, labels: Sequence[str]) -> bytes:
    """Which share of each class's clips got which label; with many classes without their names.

    Args:
        counts: (K, K), readable clips by class (row) and label given (column); a class may have none.
        labels: Of the K classes.
    """
    named = len(labels) <= MOST_CLASSES
    edge = 0.3 * len(labels) + max(2.5, 1.5 + breadth(labels)) if named else 8
    figure = Figure(figsize=(edge + 1, edge), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if named:
        name(axes.xaxis, labels, rotation=90)
        name(axes.yaxis, labels)
        for row, column in np.argwhere(counts):
            shade = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=shade)
    axes.set_xlabel("label given")
    axes.set_ylabel("class")
    figure.colorbar(image, ax=axes, label="share of the class's readable clips")
    return png(figure)


def breadth(labels: Sequence[str]) -> float:
    """Inches that the longest name may take."""
    letters = lettering(labels)
    return 0.15 * max(len(letters.text(label)[:MOST_LETTERS]) for label in labels)


def name(axis: Axis, labels: Sequence[str], places: Sequence[float] | None = None, **settings: Any) -> None:
    """Writes names at an axis.

    Args:
        axis: Of a figure.
        labels: Of strangers, or our own.
        places: Of each; the first few numbers where none are given.
        settings: Of matplotlib's, for the text.
    """
    letters = lettering(labels)
    shown = [letters.text(label)[:MOST_LETTERS] for label in labels]
    axis.set_ticks(range(len(labels)) if places is None else places, shown, **letters.settings, **settings)


def png(figure: Figure) -> bytes:
    """A figure as PNG bytes, without the date and the version that a file would hold."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    return picture.getvalue()
