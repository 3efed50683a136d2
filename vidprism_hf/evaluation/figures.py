"""The pictures of a model card, as PNG bytes: the same numbers give the same bytes."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MOST_CLASSES = 40  # more rows would not be legible


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
    figure = Figure(figsize=(1.2 * len(rates) + 3, 0.3 * len(labels) + 1.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(weights, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks(range(len(experts)), experts)
    axes.set_yticks(range(len(labels)), [_tick(label) for label in labels])
    figure.colorbar(image, ax=axes, label="expert weight")
    return png(figure)


def confusion_matrix(counts: np.ndarray, labels: Sequence[str]) -> bytes:
    """Which share of each class's clips got which label; with many classes without their names.

    Args:
        counts: (K, K), readable clips by class (row) and label given (column); a class may have none.
        labels: Of the K classes.
    """
    named = len(labels) <= MOST_CLASSES
    edge = 0.3 * len(labels) + 2.5 if named else 8
    figure = Figure(figsize=(edge + 1, edge), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if named:
        ticks = [_tick(label) for label in labels]
        axes.set_xticks(range(len(labels)), ticks, rotation=90)
        axes.set_yticks(range(len(labels)), ticks)
        for row, column in np.argwhere(counts):
            shade = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=shade)
    axes.set_xlabel("label given")
    axes.set_ylabel("class")
    figure.colorbar(image, ax=axes, label="share of the class's readable clips")
    return png(figure)


def _tick(label: str) -> str:
    # A dollar sign would begin a formula.
    return label.replace("$", r"\$")[:40]


def png(figure: Figure) -> bytes:
    """A figure as PNG bytes, without the date and the version that a file would hold."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    return picture.getvalue()
