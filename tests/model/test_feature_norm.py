"""`feature_norm: whitened` and `zero_init_residual`: what a head for few clips begins with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import card_facts, tiny_export, tiny_model, tiny_processor

from vidprism_hf import VidPrismForVideoClassification
from vidprism_hf.hub import export_model, render_card
from vidprism_hf.hub.export import ExportError
from vidprism_hf.model.temporal_vidprism import VidPrismFeatureWhitening

CHANNELS = 64  # the tiny tower's features


def clips(count=40, seed=0):
    """Features with an offset, scales over two orders of magnitude, correlations and a constant channel."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(9))
    mixing = mixing * torch.logspace(-1, 1, CHANNELS)[:, None]
    frames = torch.randn(count, 16, CHANNELS, generator=generator) @ mixing + torch.linspace(-20, 20, CHANNELS)
    frames[..., 3] = 5.0
    return frames


def fitted(width=CHANNELS, frames=None):
    norm = VidPrismFeatureWhitening(CHANNELS, width)
    norm.fit(clips() if frames is None else frames)
    return norm


def covariance(frames):
    return torch.cov(frames.flatten(0, -2).double().T)


@pytest.mark.parametrize("width", [CHANNELS, 16])
def test_frames_come_to_mean_zero_and_mean_square_one(width):
    frames = fitted(width)(clips())
    torch.testing.assert_close(frames.mean(dim=(0, 1)), torch.zeros(width), atol=1e-3, rtol=0)
    live = frames.square().mean() * width / min(width, CHANNELS - 1)  # one direction is constant, and has nothing
    torch.testing.assert_close(live, torch.ones(()), atol=3e-2, rtol=0)


def test_directions_of_much_variance_come_to_one_and_small_ones_stay_small():
    before, after = (torch.linalg.eigvalsh(covariance(x)).flip(0) for x in (clips(), fitted()(clips())))
    mean = before[:-1].mean()
    expected = before / (before + 0.1 * mean)
    torch.testing.assert_close(after / after[0], expected / expected[0], atol=1e-3, rtol=1e-2)
    assert before[0] / before[10] > 3 > 1.2 > after[0] / after[10]


def test_fewer_channels_are_the_directions_of_most_variance():
    whole = clips().flatten(0, 1).double()
    narrow = fitted(16)(clips()).flatten(0, 1).double()
    directions = torch.linalg.eigh(covariance(clips()))[1]
    centred = whole - whole.mean(dim=0)
    for part, share in ((directions[:, -16:], 1.0), (directions[:, :-16], 0.0)):
        projected = centred @ part
        explained = narrow.T @ projected / len(whole)
        assert (explained.norm() > 1e-2) == bool(share)


@given(seed=st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_units_and_offsets_do_not_matter(seed):
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=generator))[0]
    frames = clips(20, seed)
    changed = 3.0 * frames @ rotation + 7.0
    # The symmetric map keeps channels what they were: the outputs are turned as the inputs are.
    expected, found = fitted(frames=frames)(frames) @ rotation, fitted(frames=changed)(changed)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_batches_of_clips_are_one_fit():
    frames = clips()
    torch.testing.assert_close(fitted(frames=frames.split(7)).weight, fitted(frames=frames[None]).weight)


@pytest.mark.parametrize("frames", [torch.ones(3, 4, CHANNELS), torch.ones(1, 1, CHANNELS)])
def test_nothing_to_whiten_is_an_error(frames):
    with pytest.raises(ValueError, match="frames"):
        fitted(frames=frames[None])


def test_more_channels_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="hidden_size"):
        tiny_model(feature_norm="whitened", hidden_size=2 * CHANNELS)


@pytest.mark.parametrize("width", [CHANNELS, 16])
def test_it_is_saved_and_the_same_in_half_precision(tmp_path, width):
    model = tiny_model(feature_norm="whitened", hidden_size=width).eval()
    assert model.vidprism.temporal_model.input_projection is None
    model.vidprism.temporal_model.feature_norm.fit(clips())
    model.save_pretrained(tmp_path)
    again = VidPrismForVideoClassification.from_pretrained(tmp_path)
    logits = model(frame_features=clips(3)).logits
    torch.testing.assert_close(again(frame_features=clips(3)).logits, logits)
    assert again.vidprism.temporal_model.feature_norm.num_frames == 640
    norm, frames = again.vidprism.temporal_model.feature_norm, clips(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        precise = norm(frames)
    torch.testing.assert_close(precise, norm(frames))


@pytest.mark.parametrize("width", [CHANNELS, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision_keeps_the_whole_map(tmp_path, width, dtype):
    model = tiny_model(feature_norm="whitened", hidden_size=width)
    model.vidprism.temporal_model.feature_norm.fit(clips())
    frames = clips(3).to(dtype).float()
    expected = model.vidprism.temporal_model.feature_norm(frames)
    exports = {name: tmp_path / name for name in ("saved", "exported")}
    model.save_pretrained(exports["saved"])
    export_model(
        model,
        tiny_processor(),
        exports["exported"],
        render_card(card_facts()),
        dtype=str(dtype).removeprefix("torch."),
    )
    models = [VidPrismForVideoClassification.from_pretrained(folder, dtype=dtype) for folder in exports.values()]
    models.append(VidPrismForVideoClassification.from_pretrained(exports["exported"]))  # as its configuration says
    models.append(VidPrismForVideoClassification.from_pretrained(exports["saved"]).to(dtype))
    for half in models:
        norm = half.vidprism.temporal_model.feature_norm
        assert half.dtype == half.classifier.weight.dtype == dtype
        assert norm.num_frames == 640
        assert torch.equal(norm(frames), expected)
        assert torch.equal(norm(frames.to(dtype)), expected.to(dtype))
        assert half(frame_features=frames.to(dtype)).logits.isfinite().all()


def test_one_that_was_never_fitted_is_not_exported(tmp_path):
    with pytest.raises(ExportError, match="feature_norm: whitened is not fitted") as error:
        tiny_export(tmp_path / "model", feature_norm="whitened")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    tiny_model(feature_norm="whitened")(frame_features=clips(2))  # but it can be used


def test_a_new_model_with_idle_branches_is_the_mean_of_its_windows():
    idle = {"zero_init_residual": True, "readout": "mean", "aggregation": "mean"}
    frames = clips(2)
    with_messages, without = (tiny_model(**idle, interaction=how).eval() for how in ("both", "none"))
    for model in (with_messages, without):
        streams = model(frame_features=frames, output_streams=True).streams
        tokens = torch.cat([torch.nn.functional.layer_norm(stream, stream.shape[-1:]) for stream in streams], dim=1)
        expected = torch.nn.functional.layer_norm(tokens.mean(dim=1), tokens.shape[-1:])
        found = model.vidprism.temporal_model(frames).pooler_output
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    # Every branch can leave its start: its last layer has a gradient.
    with_messages.train()(frame_features=frames, labels=torch.tensor([0, 1])).loss.backward()
    temporal = with_messages.vidprism.temporal_model
    last = [expert.mlp[-1].weight for expert in temporal.experts]
    last += [temporal.interaction.slow_to_fast.weight]
    assert all(weight.grad.abs().max() > 0 for weight in last)
