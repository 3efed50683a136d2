"""Weight averaging: over the steps of a run (EMA), and between the fine-tuned and the original tower (WiSE-FT)."""

import warnings
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ...errors import UserError, first_line
from ...model import VISION_PRESETS, VidPrismForVideoClassification
from ...model.modeling_vidprism import load_vision_tower

SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


class WeightEMA(WeightAveraging):
    """Keeps an exponential moving average (EMA) of the weights, which is validated, exported and tested.

    The average starts from the weights after the first step and is updated after every optimiser step. A checkpoint
    stores it as `state_dict` and the training weights, needed to resume, as `current_model_state`.

    Lightning does the averaging. Changes to lightning 2.6.6:
    - A test loads the average. In Lightning, a trainer that has fitted loads the training weights.
    - A checkpoint written during a validation, as after Ctrl-C, does not swap the two.
    - Buffers are not averaged: rounding down would corrupt the towers' integer position indices.
    - Sharding strategies are rejected; Lightning's copy does not support them.

    Args:
        decay: Weight of the old average in each update.
    """

    def __init__(self, decay: float):
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.decay = decay
        self._exchanged = False  # whether the module currently has the averaged weights

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(trainer.strategy, SHARDING):
            raise UserError(
                "model.ema_decay: not supported by strategies that shard the weights (fsdp, deepspeed); set "
                "trainer.strategy to ddp, or model.ema_decay to null"
            )
        with warnings.catch_warnings():
            # Warns about the strategies rejected above.
            warnings.filterwarnings("ignore", "You're using the WeightAveraging callback with a model that overrides")
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        span, steps = round(1 / (1 - self.decay)), trainer.estimated_stepping_batches
        if span > steps:
            rank_zero_warn(
                f"model.ema_decay={self.decay:g} averages over about {span} steps, and the run has {steps}: the "
                "validated and exported weights stay near the starting weights; use a smaller decay"
            )

    def average(self) -> dict[str, torch.Tensor] | None:
        """Returns the averaged weights by the module's names; None outside of training."""
        return None if self._average_model is None else self._average_model.module.state_dict()

    def on_validation_epoch_start(self, trainer, pl_module):
        super().on_validation_epoch_start(trainer, pl_module)
        self._exchanged = self._average_model is not None

    def on_validation_epoch_end(self, trainer, pl_module):
        super().on_validation_epoch_end(trainer, pl_module)
        self._exchanged = False

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]):
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._exchanged:
            training, average = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, training

    def teardown(self, trainer, pl_module, stage: str):
        self._average_model = None  # copied to the module in on_train_end

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]):
        if self._average_model is not None:  # otherwise state_dict is already the right one
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


class WiseFT(L.Callback):
    """Averages the fine-tuned tower, before the test, with the tower that the run started from.

    Wortsman et al., arXiv:2109.01903: the weights alpha * tuned + (1 - alpha) * base retain more of the base's
    abilities. VidPrism's released code tests with alpha = 0.99. Streams, experts and classifier have no base and are
    not changed. The base is loaded again from `model.checkpoint` if the run started from one, otherwise from
    `model.backbone`.

    Args:
        alpha: Weight of the fine-tuned tower, 0 to 1.
        backbone: The run's `model.backbone`.
        checkpoint: The run's `model.checkpoint`.

    Attributes:
        applied: Description of the tested weights; None before a test.

    Raises:
        UserError: If alpha is out of range or the run has no base.
    """

    def __init__(self, alpha: float, backbone: str, checkpoint: str | None = None):
        if not 0 <= alpha <= 1:
            raise UserError(f"export.wise_ft_alpha={alpha}: must be between 0 and 1, or null for the tuned tower alone")
        if checkpoint is None and VISION_PRESETS.get(backbone, {}).get("name_or_path", backbone) is None:
            raise UserError(
                f"export.wise_ft_alpha: model.backbone {backbone} has random weights, which cannot serve as a base; "
                "set it to null, or name a pretrained tower"
            )
        self.alpha, self.backbone, self.checkpoint = alpha, backbone, checkpoint
        self.applied: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise UserError(
                "export.wise_ft_alpha: not supported with DeepSpeed; set trainer.strategy to ddp or fsdp, or it to null"
            )
        if pl_module.hparams.freeze_backbone:
            raise UserError("export.wise_ft_alpha: has no effect on a frozen tower; set it to null")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        tower = pl_module.model.vidprism.vision_tower
        move_towards(tower, base_tower(self.backbone, self.checkpoint), 1 - self.alpha)
        self.applied = f"tower: {self.alpha:g} x tuned + {1 - self.alpha:g} x start (WiSE-FT)"


def base_tower(backbone: str, checkpoint: str | None = None) -> dict[str, torch.Tensor]:
    """Loads the weights of the tower that a run started from, by the tower's own names.

    Raises:
        UserError: If it cannot be loaded.
    """
    name = checkpoint or VISION_PRESETS.get(backbone, {}).get("name_or_path", backbone)
    try:
        if checkpoint is None:
            return load_vision_tower(name, dtype=torch.float32).state_dict()
        model = VidPrismForVideoClassification.from_pretrained(checkpoint, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        raise UserError(
            f"export.wise_ft_alpha: {name}, from which the run started, cannot be loaded again ({first_line(error)}); "
            "restore it, or set this to null, and resume the run"
        ) from error
    return model.vidprism.vision_tower.state_dict()


@torch.no_grad()
def move_towards(module: nn.Module, weights: dict[str, torch.Tensor], share: float) -> None:
    """Interpolates a module's parameters towards other weights, in place.

    Args:
        module: Its parameters may be sharded (DTensor); then call this on all ranks.
        weights: Unsharded weights by the module's names.
        share: Fraction of the way: 0 keeps the parameters, 1 replaces them, both exactly.
    """
    for name, parameter in module.named_parameters():
        other = weights[name].to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            other = distribute_tensor(other, parameter.device_mesh, parameter.placements)
        parameter.lerp_(other, share)
