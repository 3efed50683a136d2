"""The processor of evaluation input: whose it is, and its last step, which is done on the device."""

from functools import lru_cache

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from ..errors import first_line
from ..model import VISION_PRESETS, VidPrismConfig, VidPrismVideoProcessor
from .tables import DataError


def load_processor(name: str, num_frames: int) -> VidPrismVideoProcessor:
    """The processor of a preset, a VidPrism checkpoint or a CLIP checkpoint.

    Args:
        name: Preset (b32, b16, l14, tiny), folder or Hub id.
        num_frames: Frames per clip.

    Raises:
        DataError: If there is no such checkpoint.
    """
    if name in VISION_PRESETS:
        # Presets are OpenAI's CLIP, whose mean and deviation are the processor's own: nothing to fetch.
        edge = VidPrismConfig.from_preset(name).vision_config.image_size
        return VidPrismVideoProcessor(
            num_frames=num_frames, size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}
        )
    try:
        if isinstance(AutoConfig.from_pretrained(name, trust_remote_code=False), VidPrismConfig):
            return VidPrismVideoProcessor.from_pretrained(name, num_frames=num_frames, trust_remote_code=False)
        return VidPrismVideoProcessor.from_vision_pretrained(name, num_frames)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise DataError(
            f"{name}: no CLIP or VidPrism checkpoint ({first_line(error)}); give a folder, a Hub id or "
            f"one of {', '.join(VISION_PRESETS)}"
        ) from error


def normalize_clips(pixels: torch.Tensor, processor: VidPrismVideoProcessor) -> torch.Tensor:
    """Turns uint8 pixels (..., 3, H, W) into the float32 ones that the processor's full output holds."""
    mean, std = (_per_channel(tuple(values), pixels.device) for values in (processor.image_mean, processor.image_std))
    return (pixels.float() * processor.rescale_factor - mean) / std


@lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """A value for each channel, (C, 1, 1). Kept: a copy to the device waits for the work queued there."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
