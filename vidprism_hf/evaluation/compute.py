"""Compute cost of a model: multiply-adds and parameters, counted on the meta device without data or memory."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForVideoClassification, CLIPVisionModel, PreTrainedConfig

from ..errors import UserError, first_line
from ..model import VISION_PRESETS, VidPrismConfig, VidPrismForVideoClassification

# The paper's (arXiv 2605.28229) "GFLOPs" per view, by tower and frames; they are multiply-adds, as is usual. Quoted
# from a reading note, see recipes/README.md.
PAPER = {("b16", 8): 162.0, ("b16", 32): 721.0, ("l14", 8): 632.0}


@dataclass(frozen=True)
class Cost:
    """Compute cost of a model.

    Attributes:
        giga_macs: Counted multiply-adds of one view, in units of 1e9.
        million_parameters: Parameters in millions.
        bare_tower_giga_macs: The same for CLIP's image tower alone on these frames; None for other models.
        paper_giga_macs: The paper's figure for this tower and number of frames, if it states one.
    """

    giga_macs: float
    million_parameters: float
    bare_tower_giga_macs: float | None = None
    paper_giga_macs: float | None = None


def cost(config: PreTrainedConfig, num_frames: int, size: tuple[int, int] | None = None) -> Cost:
    """Counts the cost of a video classifier: a VidPrism or another transformers model.

    Args:
        config: The model's configuration.
        num_frames: Frames per view.
        size: Height and width of the frames; None takes a VidPrism's own.

    Raises:
        UserError: If the model does not accept such a view.
    """
    if not isinstance(config, VidPrismConfig):
        with torch.device("meta"):
            model = AutoModelForVideoClassification.from_config(copy.deepcopy(config)).eval()
            view = torch.empty(1, num_frames, 3, *size)
        try:
            return Cost(giga_macs(model, view), million_parameters(model))
        except (ValueError, RuntimeError) as error:
            shape = f"{num_frames} frames of {size[0]} x {size[1]}, which its processor makes"
            raise UserError(f"{config.model_type}: the model cannot take {shape} ({first_line(error)})") from error
    model = without_memory(config)
    view = empty_view(config, num_frames)
    with torch.device("meta"):
        tower = CLIPVisionModel(copy.deepcopy(config.vision_config))
    bare = giga_macs(tower, view[0])
    return Cost(giga_macs(model, view), million_parameters(model), bare, paper_giga_macs(config, num_frames))


def paper_giga_macs(config: VidPrismConfig, num_frames: int) -> float | None:
    """Returns the paper's figure for a VidPrism on this tower with this number of frames, if it states one."""
    for (preset, frames), stated in PAPER.items():
        sizes = VidPrismConfig(vision_config=dict(VISION_PRESETS[preset]["vision_config"])).vision_config
        alike = ("hidden_size", "num_hidden_layers", "patch_size", "image_size", "intermediate_size")
        same = all(getattr(sizes, name) == getattr(config.vision_config, name) for name in alike)
        if same and frames == num_frames:
            return stated
    return None


def without_memory(config: VidPrismConfig) -> VidPrismForVideoClassification:
    """Builds a configuration's model on the meta device."""
    with torch.device("meta"):
        return VidPrismForVideoClassification(copy.deepcopy(config)).eval()


def empty_view(config: VidPrismConfig, num_frames: int) -> torch.Tensor:
    """Returns one view on the meta device, (1, T, 3, H, W)."""
    edge = config.vision_config.image_size
    return torch.empty(1, num_frames, 3, edge, edge, device="meta")


def giga_macs(module: nn.Module, *inputs: torch.Tensor) -> float:
    """Counts the multiply-adds of a forward pass in units of 1e9, as torch does: matrix products and convolutions."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops() / 2e9


def giga_macs_per_view(config: VidPrismConfig, num_frames: int | None = None) -> float:
    """Counts the multiply-adds of the whole model for one view, in units of 1e9."""
    return giga_macs(without_memory(config), empty_view(config, num_frames or config.num_frames))


def million_parameters(module: nn.Module) -> float:
    """Returns the number of parameters in millions."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6
