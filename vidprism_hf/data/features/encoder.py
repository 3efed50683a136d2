"""A frozen tower as the feature cache sees it: what its features follow from, and how they are computed."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from ...model import VidPrismForVideoClassification
from ..reading.processor import normalize_clips
from ..tables import DataError


@dataclass(frozen=True)
class FrameEncoder:
    """A frozen tower, as the cache needs it.

    Attributes:
        digest: Hash of its weights and settings (`tower_digest`).
        precision: That of the run, such as `bf16-mixed`.
        encode: uint8 pixels on the CPU, (B, T, 3, H, W), to frame features, (B, T', D).
    """

    digest: str
    precision: str
    encode: Callable[[torch.Tensor], torch.Tensor]


def tower_digest(tower: nn.Module, config: PreTrainedConfig) -> str:
    """A hash of a tower's weights, their names and types, and of what the configuration says of its architecture.

    Raises:
        DataError: If this process has only a part of the weights.
    """
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(config)} - inherited
    settings = {"model_type": config.model_type} | {name: getattr(config, name) for name in sorted(own)}
    digest = hashlib.sha256(json.dumps(settings, default=str).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        if isinstance(tensor, DTensor) or tensor.numel() == 0:
            raise DataError(
                "data.feature_cache: trainer.strategy divides the tower's weights among processes; use ddp, since a "
                "tower whose features are kept does not run"
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def encoder_of(model: VidPrismForVideoClassification, trainer: Trainer) -> FrameEncoder:
    """Returns the tower of a model as the cache needs it, in a trainer's precision."""

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        pixels = normalize_clips(pixels.to(model.device), trainer.datamodule.video_processor)
        with trainer.precision_plugin.forward_context():
            return model.vidprism.get_frame_features(pixels)

    digest = tower_digest(model.vidprism.vision_tower, model.config.vision_config)
    return FrameEncoder(digest, str(trainer.precision), encode)
