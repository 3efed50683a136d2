"""`model.config.feature_norm: whitened` in a run: fitted to its training clips once, kept, and refused in one line."""

import pytest
import torch
from small import complaint, motion_folder, run_arguments, tiny_model

from vidprism_hf import VidPrismForVideoClassification
from vidprism_hf.cli import main
from vidprism_hf.data import VideoDataModule, normalize_clips
from vidprism_hf.errors import UserError
from vidprism_hf.model.temporal_vidprism import VidPrismFeatureWhitening
from vidprism_hf.training.whitening import fit_whitening

WHITENED = ("--model.freeze_backbone=true", "--data.train_views=1", "--model.config.feature_norm=whitened")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return motion_folder(tmp_path_factory.mktemp("clips"))


def norm_of(export):
    model = VidPrismForVideoClassification.from_pretrained(export)
    return model.vidprism.temporal_model.feature_norm


def run(source, output, *more):
    return main(run_arguments(source, output, *WHITENED, *more))


def test_it_is_that_of_the_training_clips_and_stays_so(source, tmp_path):
    cache = f"--data.feature_cache={tmp_path / 'cache'}"
    assert run(source, tmp_path / "run", cache, "--trainer.max_epochs=1", "--model.ema_decay=0.5") == 0
    norm = norm_of(tmp_path / "run" / "export")
    data = VideoDataModule(str(source), processor="tiny", num_frames=8, train_views=1, num_workers=0)
    data.setup("fit")
    clips = data.train_dataloader().dataset
    tower = VidPrismForVideoClassification.from_pretrained(tmp_path / "run" / "export").vidprism
    pixels = torch.stack([clips[0, index]["pixel_values_videos"] for index in range(len(clips))])
    with torch.no_grad():
        frames = tower.get_frame_features(normalize_clips(pixels, data.video_processor))
    expected = VidPrismFeatureWhitening(frames.shape[-1], frames.shape[-1])
    expected.fit(frames)
    assert norm.num_frames == expected.num_frames == frames[..., 0].numel()
    torch.testing.assert_close(norm(frames), expected(frames), atol=1e-3, rtol=1e-3)

    # A run that starts from a checkpoint keeps what came with it, on whatever clips it trains.
    fewer = (f"--model.checkpoint={tmp_path / 'run' / 'export'}", "--data.shots=2", "--trainer.max_epochs=1")
    without = [word for word in WHITENED if "config" not in word]
    assert main(run_arguments(source, tmp_path / "second", *without, cache, *fewer)) == 0
    assert torch.equal(norm_of(tmp_path / "second" / "export").weight, norm.weight)


def test_a_run_that_goes_on_does_not_fit_again(source, tmp_path, monkeypatch):
    settings = (f"--data.feature_cache={tmp_path / 'cache'}",)
    assert run(source, tmp_path / "run", *settings, "--trainer.max_epochs=1") == 0
    weight = norm_of(tmp_path / "run" / "export").weight
    monkeypatch.setattr(VidPrismFeatureWhitening, "fit", lambda *_: pytest.fail("fitted again"))
    last = f"--resume={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"
    assert run(source, tmp_path / "run", *settings, last, "--trainer.max_epochs=2") == 0
    assert torch.equal(norm_of(tmp_path / "run" / "export").weight, weight)


def test_without_kept_features_it_is_refused_before_the_run(source, tmp_path, capsys):
    assert run(source, tmp_path / "run") == 1
    assert "model.config.feature_norm: whitened is fitted to kept features; set data.feature_cache" in complaint(capsys)
    assert not (tmp_path / "run").exists()


def test_only_a_whitening_asks_for_kept_features():
    fit_whitening(tiny_model(), None)  # a training on a loader of one's own
    with pytest.raises(UserError, match="fitted to kept features"):
        fit_whitening(tiny_model(feature_norm="whitened"), None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_are_not_fitted_to(value):
    whitening = VidPrismFeatureWhitening(4, 4)
    frames = torch.randn(2, 3, 4)
    frames[1, 2, 0] = value
    with pytest.raises(ValueError, match="features of frames are not finite numbers"):
        whitening.fit(frames)
    assert not whitening.num_frames
