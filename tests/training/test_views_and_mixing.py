"""Test views whose logits are averaged, and training on mixed clips with soft labels."""

import copy

import pytest
import torch
from small import LABELS, NUM_FRAMES, motion_folder, run_arguments
from synthetic import random_batches, trainer

from vidprism_cli import main
from vidprism_hf import VidPrismLightningModule
from vidprism_hf.data import VideoDataModule


def module(**settings):
    torch.manual_seed(0)
    return VidPrismLightningModule(
        backbone="tiny", id2label=dict(enumerate(LABELS)), num_frames=NUM_FRAMES, warmup_epochs=0, **settings
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return motion_folder(tmp_path_factory.mktemp("mixed") / "clips")


def test_logits_of_the_views_are_averaged(tmp_path):
    """Three views of a clip, of which two outvote the third."""
    model = module()
    model.configure_model()
    views = torch.randn(4, 3, NUM_FRAMES, 3, 32, 32)
    with torch.no_grad():
        alone = torch.stack([model.model.eval()(views[:, number]).logits for number in range(3)], dim=1)
    expected = alone.mean(dim=1).argmax(dim=1)
    batch = {"pixel_values_videos": views, "labels": expected, "readable": torch.ones(4, dtype=torch.bool)}
    batches = torch.utils.data.DataLoader([batch], batch_size=None)
    (result,) = trainer(tmp_path).test(model, batches, verbose=False)
    assert result["test/top1"] == 1.0
    wrong = copy.deepcopy(batch) | {"labels": 1 - expected}
    (result,) = trainer(tmp_path).test(model, torch.utils.data.DataLoader([wrong], batch_size=None), verbose=False)
    assert result["test/top1"] == 0.0


def test_a_clip_without_pixels_is_never_right(tmp_path):
    model = module()
    batch = next(iter(random_batches(1)))
    model.configure_model()
    with torch.no_grad():
        guess = model.model.eval()(batch["pixel_values_videos"]).logits.argmax(dim=1)
    readable = torch.tensor([True, False, True, False])
    batches = torch.utils.data.DataLoader([batch | {"labels": guess, "readable": readable}], batch_size=None)
    (result,) = trainer(tmp_path).test(model, batches, verbose=False)
    assert result["test/top1"] == 0.5


def test_mixed_clips_train_on_both_labels(tmp_path):
    model = module()
    model.configure_model()
    fit = trainer(tmp_path)
    batch = next(iter(random_batches(1)))
    soft = torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.0, 1.0], [0.4, 0.6]])
    seen = []
    model._log_losses = lambda stage, output: seen.append((output.classification_loss.item(), output.logits.detach()))
    fit.fit(model, torch.utils.data.DataLoader([batch | {"soft_labels": soft}], batch_size=None))
    ((loss, logits),) = seen
    expected = -(soft * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_only_training_batches_are_mixed(source):
    data = VideoDataModule(
        str(source), processor="tiny", num_frames=8, num_workers=0, mixup_alpha=0.8, cutmix_alpha=1.0
    )
    batch = next(iter(data.train_dataloader()))
    data.trainer = type("Trainer", (), {"training": True, "current_epoch": 0, "world_size": 1})()
    mixed, again = (data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0) for _ in range(2))
    assert mixed["soft_labels"].shape == (8, 2)
    torch.testing.assert_close(mixed["soft_labels"].sum(dim=1), torch.ones(8))
    assert torch.equal(mixed["pixel_values_videos"], again["pixel_values_videos"])  # of the clips and the epoch alone
    data.trainer.current_epoch = 1
    later = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
    assert not torch.equal(mixed["pixel_values_videos"], later["pixel_values_videos"])
    data.trainer.training = False
    plain = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
    assert "soft_labels" not in plain


@pytest.mark.slow
def test_a_run_with_all_of_it(source, tmp_path, capsys):
    settings = {
        "rand_augment": 9,
        "random_erasing": 0.25,
        "mixup_alpha": 0.8,
        "cutmix_alpha": 1.0,
        "frame_stride": 2,
        "test_clips": 2,
        "test_crops": 3,
    }
    more = [f"--data.{name}={value}" for name, value in settings.items()]
    assert main(run_arguments(source, tmp_path / "run", *more)) == 0
    assert "on 4 clips" in capsys.readouterr().out
    assert "8 frames x 3 crops x 2 clips" in (tmp_path / "run" / "export" / "README.md").read_text()
