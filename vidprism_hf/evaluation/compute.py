"""What a model costs: multiply-adds and parameters, counted on the meta device without data or memory."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..model import VidPrismConfig, VidPrismForVideoClassification


def without_memory(config: VidPrismConfig) -> VidPrismForVideoClassification:
    """The model of a configuration, with no memory behind its weights."""
    with torch.device("meta"):
        return VidPrismForVideoClassification(copy.deepcopy(config)).eval()


def empty_view(config: VidPrismConfig, num_frames: int) -> torch.Tensor:
    """One view without data, (1, T, 3, H, W)."""
    edge = config.vision_config.image_size
    return torch.empty(1, num_frames, 3, edge, edge, device="meta")


def giga_macs(module: nn.Module, *inputs: torch.Tensor) -> float:
    """Multiply-adds of a forward pass in units of 1e9, as torch counts them: matrix products and convolutions."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops() / 2e9


def giga_macs_per_view(config: VidPrismConfig, num_frames: int | None = None) -> float:
    """Multiply-adds of the whole model for one view, in units of 1e9."""
    return giga_macs(without_memory(config), empty_view(config, num_frames or config.num_frames))


def million_parameters(module: nn.Module) -> float:
    """Parameters in units of 1e6."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6
