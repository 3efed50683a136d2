"""Checks of a recipe's trainer settings and callbacks, before anything is read or written.

Values that Lightning rejects itself when it builds the trainer are not checked here.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ..errors import UserError, first_line

# Minimum of each number that Lightning does not check; null is allowed.
LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "min_epochs": 0,
    "min_steps": 0,
    "num_sanity_val_steps": -1,
}
# With 0 for any of these, nothing would be trained.
NOT_NOTHING = ("max_epochs", "max_steps", "limit_train_batches", "val_check_interval")
# Switches that disable checkpoints, which a run needs for its test and export; and the advice for each.
SWITCHES = {
    "barebones": "a run logs and keeps checkpoints; remove it",
    "enable_checkpointing": "a run keeps checkpoints; remove it",
    "fast_dev_run": "it keeps no checkpoints; for a quick trial set max_epochs to 1 and limit_train_batches to 2",
}
CALLBACKS: dict[type[Callback], str] = {
    BackboneFinetuning: "set model.freeze_layers or model.backbone_lr_scale",
    ModelPruning: "an export has dense weights; prune it afterwards",
    SpikeDetection: "a run already stops when its loss is NaN or infinite",
    StochasticWeightAveraging: "checkpoints do not contain its average; set model.ema_decay",
}
MEASURED = re.compile(
    r"(train|val)/(loss|(classification|rank|gate|diversity)_loss)|val/(top[15]|expert_\d+_rate_\d+_weight)"
)


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Checks for trainer settings that would train nothing or break the run halfway.

    Raises:
        UserError: If there are any.
    """
    for name in NOT_NOTHING:
        if trainer.get(name) == 0:
            raise UserError(f"trainer.{name}=0: nothing would be trained; set it to 1 or more")
    for name, least in LEAST.items():
        value = trainer.get(name)
        if value is not None and not value >= least:
            raise UserError(f"trainer.{name}={value}: must be at least {least}")
    for name, why in SWITCHES.items():
        value = trainer.get(name)
        if value is not None and bool(value) != (name == "enable_checkpointing"):
            raise UserError(f"trainer.{name}={value}: {why}")


def check_callbacks(callbacks: Iterable[Callback], num_labels: int, others: bool) -> None:
    """Checks for callbacks that are not supported or that monitor an unknown metric.

    Args:
        callbacks: The recipe's callbacks.
        num_labels: Number of classes; with five or fewer there is no top-5 accuracy.
        others: Whether there are third-party callbacks, which may log metrics unknown here.

    Raises:
        UserError: If there are any.
    """
    for callback in callbacks:
        name = type(callback).__name__
        for kind, instead in CALLBACKS.items():
            if isinstance(callback, kind):
                raise UserError(f"trainer.callbacks: {name} is not supported: {instead}")
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or others:
            continue
        if not MEASURED.fullmatch(monitor) or (monitor == "val/top5" and num_labels <= 5):
            best = "val/top1, val/loss" if num_labels <= 5 else "val/top1, val/top5, val/loss"
            raise UserError(
                f"trainer.callbacks: {name}'s monitor={monitor}: no such metric; there are {best}, train/loss"
            )


@contextmanager
def lightnings_complaints() -> Iterator[None]:
    """Turns Lightning's own errors about settings, raised only at run time, into one line.

    Raises:
        UserError: With Lightning's message.
    """
    try:
        yield
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        where = raised_in(error)
        settings = isinstance(error, MisconfigurationException) or (
            type(error) is ValueError and where.startswith("lightning.pytorch.")
        )
        if settings or (type(error) is RuntimeError and where.startswith("lightning.pytorch.callbacks.")):
            raise UserError(f"trainer: {first_line(error)}") from error
        raise


def raised_in(error: BaseException) -> Any:
    """Returns the name of the module whose code raised an error."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place.tb_frame.f_globals.get("__name__", "") if place is not None else ""
