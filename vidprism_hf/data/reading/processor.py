"""Finds the processor of the evaluation input, and does its last step, normalisation, on the device."""

from functools import lru_cache

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from ...errors import first_line
from ...model import VISION_PRESETS, VidPrismConfig, VidPrismForVideoClassification, VidPrismVideoProcessor
from ..tables import DataError

DEFAULT_FRAMES = 32


def processor_for(model: VidPrismForVideoClassification) -> VidPrismVideoProcessor:
    """Returns a model's processor: its checkpoint's, or one built from its configuration."""
    config = model.config
    if name := model.vision_source or config._name_or_path:
        return load_processor(name, config.num_frames)
    return square_processor(config.num_frames, config.vision_config.image_size)


def square_processor(num_frames: int, edge: int) -> VidPrismVideoProcessor:
    """Returns a processor for square frames with CLIP's mean and standard deviation."""
    size = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    return VidPrismVideoProcessor(num_frames=num_frames, **size)


def load_processor(name: str, num_frames: int) -> VidPrismVideoProcessor:
    """Loads the processor of a preset, a VidPrism checkpoint or a CLIP checkpoint.

    Args:
        name: Preset (b32, b16, l14, tiny), folder or Hub id.
        num_frames: Frames per clip.

    Raises:
        DataError: If there is no such checkpoint.
    """
    if name in VISION_PRESETS:
        # Presets are OpenAI's CLIP, whose mean and deviation are the processor's defaults: no download.
        return square_processor(num_frames, VidPrismConfig.from_preset(name).vision_config.image_size)
    try:
        if isinstance(AutoConfig.from_pretrained(name, trust_remote_code=False), VidPrismConfig):
            return VidPrismVideoProcessor.from_pretrained(name, num_frames=num_frames, trust_remote_code=False)
        return VidPrismVideoProcessor.from_vision_pretrained(name, num_frames)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise DataError(
            f"{name}: not a CLIP or VidPrism checkpoint ({first_line(error)}); give a folder, a Hub id or "
            f"one of {', '.join(VISION_PRESETS)}"
        ) from error


def normalize_clips(pixels: torch.Tensor, processor: VidPrismVideoProcessor) -> torch.Tensor:
    """Normalises uint8 pixels (..., 3, H, W) to float32, equal to the processor's full output."""
    mean, std = (_per_channel(tuple(values), pixels.device) for values in (processor.image_mean, processor.image_std))
    return (pixels.float() * processor.rescale_factor - mean) / std


@lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Returns one value per channel, (C, 1, 1). Cached, because a copy to the device waits for queued work."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
