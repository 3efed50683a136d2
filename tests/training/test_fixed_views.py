"""Fixed views (`data.train_views`): with a frozen tower their features are computed once, and nothing else changes."""

import pytest
import torch
from small import motion_folder, run_arguments

from vidprism_hf import VidPrismLightningModule
from vidprism_hf.cli import main
from vidprism_hf.data import VideoDataModule
from vidprism_hf.model.modeling_vidprism import VidPrismVisionTower


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return motion_folder(tmp_path_factory.mktemp("views") / "clips")


@pytest.fixture
def tower_clips(monkeypatch):
    """The number of clips that went through the tower, call by call."""
    seen = []
    forward = VidPrismVisionTower.forward

    def counted(self, pixel_values_videos):
        if not pixel_values_videos.is_meta:  # the card's count of multiply-adds
            seen.append(len(pixel_values_videos))
        return forward(self, pixel_values_videos)

    monkeypatch.setattr(VidPrismVisionTower, "forward", counted)
    return seen


def test_views_repeat_after_their_number(source):
    data = VideoDataModule(str(source), processor="tiny", num_frames=8, train_views=2, num_workers=0)
    data.setup("fit")
    clips = data.train_dataloader().dataset
    epochs = [clips[(epoch, 0)] for epoch in range(4)]
    assert [item["view"] for item in epochs] == [0, 1, 0, 1]
    assert torch.equal(epochs[0]["pixel_values_videos"], epochs[2]["pixel_values_videos"])
    assert not torch.equal(epochs[0]["pixel_values_videos"], epochs[1]["pixel_values_videos"])


def test_a_frozen_tower_sees_each_view_once(source, tmp_path, tower_clips):
    frozen = ("--model.freeze_backbone=true", "--trainer.max_epochs=6")
    views = (*frozen, "--data.train_views=2")
    assert main(run_arguments(source, tmp_path / "once", *views)) == 0
    # 8 training clips in two views; 4 held-out clips once, the final evaluation and its reload included.
    assert sum(tower_clips) == 2 * 8 + 4
    tower_clips.clear()
    assert main(run_arguments(source, tmp_path / "always", *frozen)) == 0
    assert sum(tower_clips) > 6 * 8


def test_remembered_features_change_no_number(source, tmp_path, monkeypatch):
    settings = ("--model.freeze_backbone=true", "--data.train_views=1", "--trainer.max_epochs=3")
    weights = []
    for name in ("remembered", "computed"):
        if name == "computed":
            monkeypatch.setattr(
                VidPrismLightningModule,
                "_classify",
                lambda self, stage, batch: self(batch["pixel_values_videos"], batch["labels"]),
            )
        assert main(run_arguments(source, tmp_path / name, *settings)) == 0
        checkpoint = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        weights.append(checkpoint["state_dict"])
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-5, atol=1e-6)
