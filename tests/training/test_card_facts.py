"""What the callback keeps of a run for its card."""

from collections import defaultdict

import lightning as L
import numpy as np
import pytest
import torch
from small import LABELS, NUM_FRAMES
from synthetic import random_batches, trainer

from vidprism_hf import VidPrismLightningModule
from vidprism_hf.training.card_facts import CardRecorder, duration


def module(**settings) -> VidPrismLightningModule:
    torch.manual_seed(0)
    return VidPrismLightningModule("tiny", id2label=dict(enumerate(LABELS)), num_frames=NUM_FRAMES, **settings)


class Logged(L.Callback):
    """What the module logs in each training step and validation, by epoch."""

    def __init__(self):
        self.train, self.val = defaultdict(list), {}

    def on_train_batch_end(self, trainer, *_):
        self.train[trainer.current_epoch].append(trainer.callback_metrics["train/loss"].item())

    def on_validation_end(self, trainer, *_):
        names = {"val_loss": "val/loss", "val_top1": "val/top1"}
        self.val[trainer.current_epoch] = {name: trainer.callback_metrics[key].item() for name, key in names.items()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_curves_are_what_was_logged(tmp_path, accumulate):
    recorder, logged = CardRecorder(), Logged()
    run = trainer(tmp_path, callbacks=[recorder, logged], max_epochs=3, accumulate_grad_batches=accumulate)
    run.fit(module(learning_rate=1e-3), random_batches(4), random_batches(2, seed=1))
    assert list(recorder.epochs) == [0, 1, 2]
    for epoch, values in recorder.epochs.items():
        assert len(logged.train[epoch]) == 4
        assert values == pytest.approx({"train_loss": np.mean(logged.train[epoch]), **logged.val[epoch]}, abs=1e-6)
    assert 0 < recorder.seconds < 600
    assert recorder.peak_bytes > 1e8


def test_expert_weights_are_the_means_over_the_clips(tmp_path):
    recorder, trained = CardRecorder(), module()
    batches = list(random_batches(3, num_labels=1))
    batches[0]["readable"] = torch.tensor([True, False, True, True])
    run = trainer(tmp_path, callbacks=[recorder])
    run.test(trained, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    with torch.no_grad():
        weights = torch.cat([trained.model(batch["pixel_values_videos"]).expert_weights for batch in batches])
    expected = torch.cat([weights[:1], weights[2:]]).mean(0)
    np.testing.assert_allclose(recorder.mean_weights, expected, atol=1e-6)
    np.testing.assert_allclose(recorder.class_weights[0], expected, atol=1e-6)
    assert np.isnan(recorder.class_weights[1]).all()


def test_goes_on_after_a_resumption_and_not_back_for_a_test():
    first = CardRecorder()
    first.epochs, first.seconds = {0: {"train_loss": 1.0}}, 60.0
    resumed = CardRecorder()
    resumed.load_state_dict(first.state_dict())
    assert (resumed.epochs, resumed.seconds) == (first.epochs, 60.0)
    resumed.epochs[1], resumed.seconds = {"train_loss": 0.5}, 90.0
    resumed.load_state_dict(first.state_dict())  # the best checkpoint
    assert resumed.epochs == {0: {"train_loss": 1.0}, 1: {"train_loss": 0.5}}
    assert resumed.seconds == 90.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 min 00 s"), (62.2, "1 min 02 s"), (3599.9, "1 h 00 min 00 s"), (7265, "2 h 01 min 05 s")],
)
def test_duration(seconds, words):
    assert duration(seconds) == words
