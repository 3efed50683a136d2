"""Averages of weights: over the steps of a run (EMA), and of the tuned tower with the one it started from (WiSE-FT)."""

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

from ..errors import UserError, first_line
from ..model import VISION_PRESETS, VidPrismForVideoClassification
from ..model.modeling_vidprism import load_vision_tower

SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


class WeightEMA(WeightAveraging):
    """Keeps an exponential moving average of the weights, which is validated, exported and tested.

    It begins with the weights after the first step, and follows each step of the optimiser. A checkpoint has it as
    `state_dict`, and the weights in training, to go on with, as `current_model_state`.

    The averaging is Lightning's. What is added here (to lightning 2.6.6):
    - A test loads the average. There, a trainer that has fitted loads the weights in training.
    - A checkpoint written during a validation, as after Ctrl-C, has the two in their places, not exchanged.
    - Buffers are no averages: rounding down would spoil the towers' position indices, which are integers.
    - It refuses strategies that share the weights out, for which Lightning's copy is not made.

    Args:
        decay: Share of the average that stays at each step.
    """

    def __init__(self, decay: float):
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.decay = decay
        self._exchanged = False  # whether the module holds the average just now

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(trainer.strategy, SHARDING):
            raise UserError(
                "model.ema_decay: not with a strategy that shares the weights out (fsdp, deepspeed); set "
                "trainer.strategy to ddp, or model.ema_decay to null"
            )
        with warnings.catch_warnings():
            # It warns of what is refused here.
            warnings.filterwarnings("ignore", "You're using the WeightAveraging callback with a model that overrides")
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        span, steps = round(1 / (1 - self.decay)), trainer.estimated_stepping_batches
        if span > steps:
            rank_zero_warn(
                f"model.ema_decay={self.decay:g} averages over about {span} steps, and the run has {steps}: what is "
                "validated and exported stays near the starting weights; take less"
            )

    def average(self) -> dict[str, torch.Tensor] | None:
        """The averaged weights by the module's names; None outside of training."""
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
        self._average_model = None  # its values are the module's since on_train_end

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]):
        if self._average_model is not None:  # else state_dict is what is wanted, and loaded
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


class WiseFT(L.Callback):
    """Averages the tower, before its test, with the tower that the run started from.

    Wortsman et al., arXiv:2109.01903: the weights alpha * tuned + (1 - alpha) * base keep more of what the base is
    good at. The released code of VidPrism tests with alpha = 0.99. Streams, experts and classifier have no base and
    stay as they are. The base is loaded again: from `model.backbone`, or where the run started from
    `model.checkpoint` that checkpoint's tower.

    Args:
        alpha: Share of the tuned tower, 0 to 1.
        backbone: The run's `model.backbone`.
        checkpoint: The run's `model.checkpoint`.

    Attributes:
        applied: What the tested weights are, in words; None before a test.

    Raises:
        UserError: If alpha is out of its range or the run has no base.
    """

    def __init__(self, alpha: float, backbone: str, checkpoint: str | None = None):
        if not 0 <= alpha <= 1:
            raise UserError(f"export.wise_ft_alpha={alpha}: must be between 0 and 1, or null for the tuned tower alone")
        if checkpoint is None and VISION_PRESETS.get(backbone, {}).get("name_or_path", backbone) is None:
            raise UserError(
                f"export.wise_ft_alpha: model.backbone {backbone} starts from random weights, which are no base; set "
                "it to null, or name a pretrained tower"
            )
        self.alpha, self.backbone, self.checkpoint = alpha, backbone, checkpoint
        self.applied: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise UserError(
                "export.wise_ft_alpha: not with DeepSpeed; set trainer.strategy to ddp or fsdp, or it to null"
            )
        if pl_module.hparams.freeze_backbone:
            raise UserError("export.wise_ft_alpha: a frozen tower is its own start; set it to null")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        tower = pl_module.model.vidprism.vision_tower
        move_towards(tower, base_tower(self.backbone, self.checkpoint), 1 - self.alpha)
        self.applied = f"tower: {self.alpha:g} x tuned + {1 - self.alpha:g} x start (WiSE-FT)"


def base_tower(backbone: str, checkpoint: str | None = None) -> dict[str, torch.Tensor]:
    """Weights of the tower that a run starts from, by its own names.

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
            "mend it, or set this to null, and resume the run"
        ) from error
    return model.vidprism.vision_tower.state_dict()


@torch.no_grad()
def move_towards(module: nn.Module, weights: dict[str, torch.Tensor], share: float) -> None:
    """Moves a module's parameters, where they are, by a share of the way to other weights.

    Args:
        module: Its parameters may be shared out over processes (DTensor); all processes call this then.
        weights: Whole, by the module's names.
        share: 0 leaves the parameters, 1 replaces them, both exactly.
    """
    for name, parameter in module.named_parameters():
        other = weights[name].to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            other = distribute_tensor(other, parameter.device_mesh, parameter.placements)
        parameter.lerp_(other, share)
