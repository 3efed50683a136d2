"""The trainer of a run: Lightning's, with the run's callbacks, loggers and strategy."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy

from ..errors import UserError
from ..evaluation.scores import ScoreRecorder
from ..evaluation.testing import callbacks_of, make_trainer, progress_bars
from ..stalls import COLLECTIVE_TIMEOUT, LONG, StallWatch
from .callbacks.averaging import WiseFT
from .callbacks.bad_videos import BadClipReport
from .callbacks.push import PushToHub
from .callbacks.recorder import CardRecorder
from .checkpoint.callback import Safeguard
from .checkpoint.files import BEST, KeptCheckpoint, SafeCheckpointIO
from .checkpoint.resume import free_name
from .distributed import ddp_settings, named_strategy
from .exporting import ExportedCheckpoint, export_kept, export_or_warn
from .plan import RunPlan


def build_trainer(plan: RunPlan) -> Trainer:
    """Builds the trainer of a run.

    Raises:
        UserError: If this machine cannot give what the settings ask for.
    """
    asked = dict(plan.trainer)
    if asked.pop("default_root_dir", None) is not None:
        raise UserError("trainer.default_root_dir: the run's folder is output; set that")
    logger = asked.pop("logger", None)
    if logger in (None, True):
        logger = [
            TensorBoardLogger(plan.output, name="logs", version="tensorboard"),
            CSVLogger(plan.output, name="logs", version=free_name(plan.output / "logs" / "csv").name),
        ]
    callbacks = [*run_callbacks(plan), *([LearningRateMonitor(logging_interval="step")] if logger else [])]
    trainer = training_trainer(
        asked, callbacks, plan.collective_timeout, default_root_dir=str(plan.output), logger=logger
    )
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # neither the recipe's nor a strategy's own
        trainer.strategy.checkpoint_io = SafeCheckpointIO()
    for callback in trainer.callbacks:
        if isinstance(callback, PushToHub):  # a recipe's (trainer.callbacks), which cannot name a function
            callback.export = lambda trainer, module, folder: export_kept(plan, trainer, folder)
    return trainer


def tower_ensemble(plan: RunPlan) -> list[Callback]:
    """Returns what averages the tower for the final test, if that is asked for.

    Raises:
        UserError: If the run has no tower to average with.
    """
    alpha, start = plan.export.wise_ft_alpha, plan.module.hparams
    return [] if alpha is None else [WiseFT(alpha, start.backbone, start.checkpoint)]


def training_trainer(
    settings: Mapping[str, Any],
    callbacks: Sequence[Callback] = (),
    collective_timeout: float = COLLECTIVE_TIMEOUT,
    **own: Any,
) -> Trainer:
    """Builds a trainer with the strategy that training needs; see `make_trainer`."""
    limit = timedelta(seconds=LONG * collective_timeout)  # where StallWatch does not look
    # Accumulation leaves steps without communication.
    accumulates = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(settings))
    accumulates = accumulates or settings.get("accumulate_grad_batches", 1) > 1
    strategy = named_strategy(settings.get("strategy", "auto"), accumulates, limit)
    trainer = make_trainer(settings, callbacks, strategy=strategy, **own)
    if strategy == "auto" and type(trainer.strategy) is DDPStrategy:  # Lightning has found several devices
        trainer.strategy._ddp_kwargs.update(ddp_settings(accumulates))
        trainer.strategy._timeout = limit
    return trainer


def run_callbacks(plan: RunPlan) -> list[Callback]:
    """Returns the run's own callbacks."""
    checkpoints, exported = plan.output / "checkpoints", plan.export.checkpoints
    keep = partial(ExportedCheckpoint, partial(export_kept, plan)) if exported else KeptCheckpoint
    export_last = partial(export_or_warn, partial(export_kept, plan, chosen=False))
    best = keep(
        dirpath=checkpoints,
        filename=BEST.removesuffix(".ckpt"),
        monitor="val/top1",
        mode="max",
        enable_version_counter=False,
    )
    return [
        best,
        Safeguard(checkpoints, plan.checkpoint, export_last if exported else None),
        BadClipReport(plan.output),
        CardRecorder(),
        ScoreRecorder(plan.evaluation.average_clips),
        *tower_ensemble(plan),
        *progress_bars(plan.trainer.get("enable_progress_bar")),
        StallWatch(plan.collective_timeout),
    ]
