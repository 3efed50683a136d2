"""Parameter groups and learning rates: head, tower and its layers at their own, scaled with the batch if asked for.

Sources: layer-wise decay as in BEiT (arXiv:2106.08254) and timm's `param_groups_layer_decay`; the learning rate with
the square root of the batch, which suits Adam's normalised steps (Malladi et al., arXiv:2205.10287) and is timm's
choice for adaptive optimisers. Goyal et al.'s linear rule (arXiv:1706.02677) is SGD's.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..errors import UserError

BACKBONE_PREFIX = "vidprism.vision_tower."
NO_DECAY_NAMES = ("readout.query",)
TOWER_LAYER = re.compile(r"\.layers?\.(\d+)\.")  # transformers' encoders: encoder.layers.N or encoder.layer.N
# What stands in front of a tower's first layer, by parts of names; `pre_layrnorm` is transformers' spelling.
TOWER_STEM = (".embeddings.", ".pre_layrnorm.")


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    backbone_lr_scale: float,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> list[dict]:
    """Groups a classifier's trainable parameters for AdamW.

    Args:
        model: A `VidPrismForVideoClassification`.
        learning_rate: Of everything but the tower.
        backbone_lr_scale: The learning rate of the tower's top as a share of it.
        weight_decay: Of weights; biases, norms and the global query have none.
        layer_decay: Learning rate of a layer of the tower as a share of that of the layer above it.

    Returns:
        Groups with `name`, `params`, `lr` and `weight_decay`: head and backbone, with and without weight decay; with
        layer_decay the backbone in as many parts as it has layers, and two. Those without parameters are left out.
    """
    depth = tower_depth(name for name, _ in model.named_parameters())
    groups = {}
    for name, parameter in trainable_parameters(model):
        part, scale = "head", 1.0
        if name.startswith(BACKBONE_PREFIX):
            part, scale = "backbone", backbone_lr_scale
            if layer_decay != 1.0:
                level = tower_level(name, depth)
                part, scale = f"backbone_{level:02}", scale * layer_decay ** (depth + 1 - level)
        decays = parameter.dim() > 1 and not name.endswith(NO_DECAY_NAMES)
        group = groups.setdefault(
            (part, decays),
            {
                "name": part if decays else f"{part}_no_decay",
                "params": [],
                "lr": learning_rate * scale,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def tower_depth(names: Iterable[str]) -> int:
    """Layers of the tower among the names of a model's parameters, frozen ones too."""
    matches = (TOWER_LAYER.search(name) for name in names if name.startswith(BACKBONE_PREFIX))
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def tower_level(name: str, depth: int) -> int:
    """How high a parameter of the tower stands: 0 for embeddings, n for the n-th layer, depth + 1 for what follows."""
    if any(part in name for part in TOWER_STEM):
        return 0
    match = TOWER_LAYER.search(name)
    return int(match[1]) + 1 if match else depth + 1


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that require a gradient."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def scaled_learning_rate(learning_rate: float, clips: int, reference: int | None) -> float:
    """The learning rate for a batch of so many clips, where it is stated for the reference; None leaves it alone."""
    return learning_rate if reference is None else learning_rate * math.sqrt(clips / reference)


def extend_schedule(schedule: LambdaLR) -> None:
    """Lets parameter groups that were added to an optimiser later follow the schedule of the others, from their rate.

    As Lightning's BaseFinetuning adds them; LambdaLR has one function for each group there was when it was built.
    """
    for group in schedule.optimizer.param_groups[len(schedule.base_lrs) :]:
        schedule.base_lrs.append(group.setdefault("initial_lr", group["lr"]))
        schedule.lr_lambdas.append(schedule.lr_lambdas[0])


def clips_per_step(trainer: L.Trainer) -> int:
    """Clips of one step of the optimiser: all batches that are put together for it, in all processes.

    Raises:
        UserError: If the trainer has no data module that tells its batch size.
    """
    size = getattr(getattr(trainer.datamodule, "hparams", None), "batch_size", None)
    if size is None:
        raise UserError("model.reference_batch_size: the data have no batch_size; train with a VideoDataModule")
    return size * trainer.world_size * trainer.accumulate_grad_batches


def check_settings(settings: dict[str, Any]) -> None:
    """Checks the module's settings of this room.

    Raises:
        UserError: If a value is out of its range.
    """
    for name in ("learning_rate", "backbone_lr_scale", "weight_decay", "warmup_epochs", "freeze_layers"):
        if not 0 <= settings[name] < math.inf:
            raise UserError(f"model.{name}={settings[name]}: must be a number of at least 0")
    reference, decay, layers, smoothing = (
        settings[name] for name in ("reference_batch_size", "ema_decay", "layer_decay", "label_smoothing")
    )
    if reference is not None and reference < 1:
        raise UserError(f"model.reference_batch_size={reference}: must be at least 1, or null for no scaling")
    if decay is not None and not 0 < decay < 1:
        raise UserError(f"model.ema_decay={decay}: must be between 0 and 1, such as 0.999, or null for no average")
    if not 0 < layers <= 1:
        raise UserError(f"model.layer_decay={layers}: must be above 0 and at most 1")
    if not 0 <= smoothing < 1:
        raise UserError(f"model.label_smoothing={smoothing}: must be at least 0 and below 1")
