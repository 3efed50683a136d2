"""What of a recipe's trainer no run can have, found before anything is read or written; and what Lightning finds later.

Values that Lightning refuses itself, as it builds the trainer, are not repeated here.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ..errors import UserError, first_line

# Least value of each number that Lightning takes without a look; null is none.
LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "min_epochs": 0,
    "min_steps": 0,
    "num_sanity_val_steps": -1,
}
# Without these there would be no training: 0 is a value for them all.
NOT_NOTHING = ("max_epochs", "max_steps", "limit_train_batches", "val_check_interval")
# Switches that take the checkpoints away, the best of which a run tests and exports: what to say of each.
SWITCHES = {
    "barebones": "a run logs and keeps checkpoints; remove it",
    "enable_checkpointing": "a run keeps checkpoints; remove it",
    "fast_dev_run": "it keeps no checkpoints; for a trial set max_epochs to 1 and limit_train_batches to 2 instead",
}
CALLBACKS: dict[type[Callback], str] = {
    BackboneFinetuning: "set model.freeze_layers or model.backbone_lr_scale",
    ModelPruning: "an export holds whole weights; prune it afterwards",
    SpikeDetection: "a run ends by itself where its loss is no number",
    StochasticWeightAveraging: "its average is in no checkpoint; set model.ema_decay",
}
MEASURED = re.compile(
    r"(train|val)/(loss|(classification|rank|gate|diversity)_loss)|val/(top[15]|expert_\d+_rate_\d+_weight)"
)


def check_trainer(trainer: Namespace) -> None:
    """Looks for settings with which a run would train nothing, or end in the middle.

    Raises:
        UserError: If there is one.
    """
    for name in NOT_NOTHING:
        if trainer[name] == 0:
            raise UserError(f"trainer.{name}=0: nothing would be trained; set it to 1 or more")
    for name, least in LEAST.items():
        value = trainer[name]
        if value is not None and not value >= least:
            raise UserError(f"trainer.{name}={value}: must be at least {least}")
    for name, why in SWITCHES.items():
        value = trainer[name]
        if value is not None and bool(value) != (name == "enable_checkpointing"):
            raise UserError(f"trainer.{name}={value}: {why}")


def check_callbacks(callbacks: Iterable[Callback], num_labels: int, others: bool) -> None:
    """Looks for callbacks that do not go with a run, and for those that wait for a metric that there is not.

    Args:
        callbacks: The recipe's.
        num_labels: Of the data; with five or fewer there is no top-5 accuracy.
        others: Whether classes of others are among them, which may measure what is not known here.

    Raises:
        UserError: If there is one.
    """
    for callback in callbacks:
        name = type(callback).__name__
        for kind, instead in CALLBACKS.items():
            if isinstance(callback, kind):
                raise UserError(f"trainer.callbacks: {name} does not go with a run: {instead}")
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
    """Makes one line of what Lightning has against settings, which it finds only as it runs.

    Raises:
        UserError: With its message.
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
    """The name of the module whose code has raised an error."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place.tb_frame.f_globals.get("__name__", "") if place is not None else ""
