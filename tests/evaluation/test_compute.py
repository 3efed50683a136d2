"""Counted multiply-adds and parameters against what is known of the towers."""

import pytest

from vidprism_hf import VidPrismConfig
from vidprism_hf.evaluation.compute import (
    empty_view,
    giga_macs,
    giga_macs_per_view,
    million_parameters,
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
    counted = giga_macs(tower, empty_view(settings, 8)[0])
    assert counted == pytest.approx(macs / 1e9, rel=1e-9)
    if preset == "b16":
        assert counted == pytest.approx(140.5, abs=0.05)  # the usual figure for CLIP ViT-B/16 at 8 frames
        assert million_parameters(tower) == pytest.approx(85.8, abs=0.05)


def test_whole_model():
    settings = config("b16", 8)
    assert giga_macs_per_view(settings) > giga_macs(
        without_memory(settings).vidprism.vision_tower, empty_view(settings, 8)
    )
    assert giga_macs_per_view(settings, 16) == pytest.approx(2 * giga_macs_per_view(settings), rel=1e-3)
