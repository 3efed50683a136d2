"""The feature cache's view of a frozen tower: what identifies its features, and how to compute them."""

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
    """A frozen tower for the feature cache.

    Attributes:
        digest: Hash of its weights and settings (`tower_digest`).
        precision: The trainer's precision, such as `bf16-mixed`.
        encode: Maps uint8 pixels on the CPU, (B, T, 3, H, W), to frame features, (B, T', D).
    """

    digest: str
    precision: str
    encode: Callable[[torch.Tensor], torch.Tensor]


def tower_digest(tower: nn.Module, config: PreTrainedConfig) -> str:
    """Hashes a tower's weights, their names and dtypes, and the architecture settings of its configuration.

    Raises:
        DataError: If the weights are sharded.
    """
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(config)} - inherited
    settings = {"model_type": config.model_type} | {name: getattr(config, name) for name in sorted(own)}
    digest = hashlib.sha256(json.dumps(settings, default=str).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        if isinstance(tensor, DTensor) or tensor.numel() == 0:
            raise DataError(
                "data.feature_cache: trainer.strategy shards the tower's weights; use ddp, since a tower with cached "
                "features does not run in training"
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def encoder_of(model: VidPrismForVideoClassification, trainer: Trainer) -> FrameEncoder:
    """Returns a model's tower as a `FrameEncoder` in the trainer's precision."""

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        pixels = normalize_clips(pixels.to(model.device), trainer.datamodule.video_processor)
        with trainer.precision_plugin.forward_context():
            return model.vidprism.get_frame_features(pixels)

    digest = tower_digest(model.vidprism.vision_tower, model.config.vision_config)
    return FrameEncoder(digest, str(trainer.precision), encode)
