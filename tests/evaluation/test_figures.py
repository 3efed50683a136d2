"""The pictures of cards and evaluations: real PNGs, the same each time, different for different numbers."""

import io

import numpy as np
import pytest
from PIL import Image

from vidprism_hf.evaluation.figures import confusion_matrix, curves, expert_weights

EPOCHS = {
    0: {"train_loss": 1.0},
    1: {"train_loss": 0.8, "val_loss": 0.9, "val_top1": 0.5},
    2: {"train_loss": 0.7, "val_loss": 0.8, "val_top1": 0.6},
}


def size(picture: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(picture)) as image:
        image.verify()
        assert image.format == "PNG"
        return image.size


@pytest.mark.parametrize("epochs", [EPOCHS, {0: EPOCHS[0]}, {}], ids=["run", "one epoch", "none"])
def test_curves(epochs):
    picture = curves(epochs)
    assert min(size(picture)) > 300
    assert picture == curves(dict(reversed(epochs.items())))
    assert picture != curves(epochs | {3: {"train_loss": 0.1, "val_top1": 0.9}})


@pytest.mark.parametrize("num_labels", [2, 40, 41, 400])
def test_expert_weights(num_labels):
    weights = np.random.default_rng(0).dirichlet((1, 1, 1), num_labels)
    weights[0] = np.nan  # a class without clips
    labels = [f"$label {index}$ <&>" for index in range(num_labels)]
    picture = expert_weights(weights, labels, [2, 4, 8])
    assert min(size(picture)) > 150
    assert picture == expert_weights(weights, labels, [2, 4, 8])
    assert picture != expert_weights(weights[:, ::-1], labels, [2, 4, 8])


@pytest.mark.parametrize("num_labels", [2, 12, 41])
def test_confusion_matrix(num_labels):
    counts = np.random.default_rng(0).integers(0, 3, (num_labels, num_labels))
    counts[0] = 0  # a class without clips
    labels = [f"$label {index}$ <&>" for index in range(num_labels)]
    picture = confusion_matrix(counts, labels)
    assert min(size(picture)) > 150
    assert picture == confusion_matrix(counts, labels)
    assert picture != confusion_matrix(counts.T, labels)
