"""Counted multiply-adds and parameters against what is known of the towers."""

import pytest
import torch
from transformers import CLIPVisionModel, TimesformerConfig, VideoMAEConfig

from vidprism_hf import VidPrismConfig
from vidprism_hf.evaluation.compute import (
    cost,
    empty_view,
    giga_macs,
    giga_macs_per_view,
    million_parameters,
    paper_giga_macs,
    without_memory,
)


def config(preset: str, num_frames: int) -> VidPrismConfig:
    return VidPrismConfig.from_preset(preset, num_frames=num_frames, id2label={0: "a", 1: "b"})


@pytest.mark.parametrize("preset", ["b32", "b16"])
def test_tower(preset):
    """The bare tower costs what its sizes say: patches, projections, attention and MLP of each layer."""
    settings = config(preset, 8)
    vision, tower = settings.vision_config, without_memory(settings).vidprism.vision_tower.vision_model
    width, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    tokens = patches + 1
    layer = 4 * tokens * width**2 + 2 * tokens * width * vision.intermediate_size + 2 * tokens**2 * width
    macs = 8 * (patches * 3 * vision.patch_size**2 * width + vision.num_hidden_layers * layer)
    with torch.device("meta"):
        clip = CLIPVisionModel(vision)
    counted = giga_macs(clip, empty_view(settings, 8)[0])
    assert counted == pytest.approx(macs / 1e9, rel=1e-9)
    if preset == "b16":
        assert counted == pytest.approx(140.5, abs=0.05)  # the usual figure for CLIP ViT-B/16 at 8 frames
        assert million_parameters(tower) == pytest.approx(85.8, abs=0.05)
    # Ours leaves out the queries, outputs and MLP of the last layer's patches, which nothing reads.
    unread = 8 * patches * (2 * width**2 + 2 * width * vision.intermediate_size + 2 * tokens * width)
    assert giga_macs(tower, empty_view(settings, 8)[0]) == pytest.approx((macs - unread) / 1e9, rel=1e-9)


def test_head():
    """The head costs what its sizes say, here with windows of whole length and rates that divide."""
    settings = config("b16", 32)
    width, frames, rates = settings.hidden_size, 32, settings.rates
    streams, pairs = len(rates), len(rates) * (len(rates) - 1) // 2
    lengths = [frames // rate for rate in rates]
    tokens = sum(lengths)
    mergers = streams * (frames * width**2 + frames**2 * width) + tokens * frames * width
    gates = pairs * (2 * width * width // 4 + width // 4)
    up = tokens * width**2 + tokens**2 * width
    down = sum(5 * lengths[dst] * width**2 for dst in range(streams) for _ in range(dst))
    experts = 8 * tokens * width**2 + 2 * sum(length**2 for length in lengths) * width
    readout = 2 * tokens * width**2 + 2 * tokens * width + 2 * width**2
    head = without_memory(settings).vidprism.temporal_model
    features = torch.empty(1, frames, width, device="meta")
    expected = mergers + gates + up + down + experts + readout
    assert giga_macs(head, features) == pytest.approx(expected / 1e9, rel=1e-9)


@pytest.mark.parametrize("preset", ["b32", "b16", "l14"])
@pytest.mark.parametrize("frames", [8, 32])
def test_the_head_costs_less_than_a_hundredth_of_the_tower(preset, frames):
    settings = config(preset, frames)
    model = without_memory(settings).vidprism
    head = giga_macs(model.temporal_model, torch.empty(1, frames, settings.feature_size, device="meta"))
    assert 0 < head < 0.01 * giga_macs(model.vision_tower, empty_view(settings, frames))


def test_whole_model():
    settings = config("b16", 8)
    assert giga_macs_per_view(settings) > giga_macs(
        without_memory(settings).vidprism.vision_tower, empty_view(settings, 8)
    )
    assert giga_macs_per_view(settings, 16) == pytest.approx(2 * giga_macs_per_view(settings), rel=1e-3)


@pytest.mark.parametrize(
    ("preset", "frames", "paper"),
    [("b16", 8, 162), ("b16", 32, 721), ("l14", 8, 632), ("b16", 16, None), ("b32", 8, None), ("tiny", 8, None)],
)
def test_what_the_paper_states(preset, frames, paper):
    assert paper_giga_macs(config(preset, frames), frames) == paper


def test_cost_beside_the_papers():
    found = cost(config("b16", 8), 8)
    assert found.paper_giga_macs == 162
    assert found.giga_macs == giga_macs_per_view(config("b16", 8))
    assert found.bare_tower_giga_macs == pytest.approx(140.5, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "frames", "giga", "million"),
    # As their papers state them: VideoMAE's table 6 (arXiv:2203.12602), TimeSformer's tables 2 and 6 (arXiv:2102.05095:
    # 0.59 tera for three views). V-JEPA 2 states none.
    [(VideoMAEConfig(num_labels=400), 16, 180, 87), (TimesformerConfig(num_labels=400), 8, 590 / 3, 121.4)],
    ids=["videomae", "timesformer"],
)
def test_cost_of_other_models(settings, frames, giga, million):
    found = cost(settings, frames, (224, 224))
    assert found.giga_macs == pytest.approx(giga, rel=0.01)
    assert found.million_parameters == pytest.approx(million, rel=0.01)
    assert found.bare_tower_giga_macs is None
