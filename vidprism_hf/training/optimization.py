"""Parameter groups: head and backbone at their own learning rates, weight decay where it belongs."""

from collections.abc import Iterator

from torch import nn

BACKBONE_PREFIX = "vidprism.vision_tower."
NO_DECAY_NAMES = ("readout.query",)


def parameter_groups(
    model: nn.Module, learning_rate: float, backbone_lr_scale: float, weight_decay: float
) -> list[dict]:
    """Groups a classifier's trainable parameters for AdamW.

    Args:
        model: A `VidPrismForVideoClassification`.
        learning_rate: Of everything but the tower.
        backbone_lr_scale: The tower's learning rate as a share of it.
        weight_decay: Of weights; biases, norms and the global query have none.

    Returns:
        Up to four groups with `name`, `params`, `lr` and `weight_decay`; those without parameters are left
        out.
    """
    groups = {}
    for name, parameter in trainable_parameters(model):
        part = "backbone" if name.startswith(BACKBONE_PREFIX) else "head"
        decays = parameter.dim() > 1 and not name.endswith(NO_DECAY_NAMES)
        group = groups.setdefault(
            (part, decays),
            {
                "name": part if decays else f"{part}_no_decay",
                "params": [],
                "lr": learning_rate * (backbone_lr_scale if part == "backbone" else 1.0),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that require a gradient."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
