"""The callback that no run loses its work to: it writes last.ckpt, stops at signals, and ends a run that diverges.

All three are decided between two steps, by all processes alike. With a step's end goes one tensor of three numbers
(is the loss no number, the signal, is a checkpoint due), its maximum over the processes. On a GPU it is copied to the
host behind the step and read a step later: nothing waits for the device, and a decision comes one step late. Before a
checkpoint is written what is still on its way is awaited, and the weights are looked at: none that is NaN or infinite
gets into a file.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from ..data.bad_clips import TooManyBadClips
from ..data.ranks import gathered
from ..errors import UserError
from ..util import preview
from .checkpointing import LAST, CheckpointSettings
from .resuming import random_states, set_random_states, settle_loops, settle_progress
from .signals import WARNING, SignalWatch, Stopped, requeue

NAMED_CLIPS = 16  # in the message of a run that diverges
YOUNG = 60.0  # seconds: epochs that are shorter share a last.ckpt, whose writing may take longer than they do


class Diverged(UserError):
    """A run whose loss, or a weight, is no finite number any more."""


class _Told(NamedTuple):
    """What a batch told.

    Attributes:
        step: The optimiser step that it is part of, from 1.
        flags: (3,) float32 on the host: see the module. On a GPU still on its way until `copied`.
        copied: Event of the copy; None where there was none.
        lost: (), bool: whether this process's own loss is no finite number.
        clips: Its clips: names, or their indices, (B,).
    """

    step: int
    flags: torch.Tensor
    copied: "torch.cuda.Event | None"
    lost: torch.Tensor
    clips: Any


class Safeguard(Checkpoint):
    """Writes last.ckpt at the ends of epochs, in between, and when a signal asks for the end; see the module.

    Args:
        folder: Where last.ckpt goes.
        settings: How often it is written within an epoch.
        export: Called with trainer and folder when it was written at the end of an epoch.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: CheckpointSettings | None = None,
        export: Callable[[L.Trainer, Path], None] | None = None,
    ):
        self.path = Path(folder) / LAST
        self.settings = settings or CheckpointSettings()
        self.export = export
        self.saved_step = 0  # global step of last.ckpt
        self.run: str | None = None  # see Start
        self.begun: str | None = None  # see Start; None is that of the checkpoint
        self._signals = SignalWatch()
        self._told: deque[_Told] = deque()
        self._latest: _Told | None = None
        self._signal, self._due = 0, False  # agreed on by all processes
        self._validating = False
        self._clock = 0.0
        self._random: list[dict[str, Any]] | None = None

    # What is kept

    def state_dict(self) -> dict[str, Any]:
        return {"random": gathered(random_states()), "begun": self.begun, "run": self.run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random = state_dict["random"]
        self.begun = self.begun or state_dict.get("begun")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.state.fn != "fit":
            return
        self._check_weights(trainer, pl_module)
        settle_progress(checkpoint, self._validating)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.state.fn == "fit":
            self.saved_step = checkpoint["global_step"]

    # Where training is

    def setup(self, trainer, pl_module, stage):
        if stage == "fit":
            self._signals.install(trainer, "stopping as soon as what is being prepared can be kept")

    def teardown(self, trainer, pl_module, stage):
        self.release()

    def release(self) -> None:
        """Gives signals back, as the end of a training does where it is no error."""
        self._signals.restore()

    def between_shards(self) -> None:
        """To be called in long work before the training, where all that was done is kept; the feature cache does.

        Raises:
            Stopped: If this process was told to end. Whoever calls it ends the others with it (`Ranks.gather`).
        """
        if self._signals.received:
            raise Stopped(self._signals.received)

    def on_sanity_check_start(self, trainer, pl_module):
        self._signals.install(trainer)

    def on_train_start(self, trainer, pl_module):
        self._signals.install(trainer)
        self._clock = time.monotonic()
        settle_loops(trainer)
        if self._random is not None:
            set_random_states(self._random[trainer.global_rank % len(self._random)])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._read(trainer, late=reads_late(pl_module.device))
        if (self._signal or self._due) and between_steps(trainer):
            self._save(trainer)
            self._leave()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        lost = ~torch.isfinite(outputs["loss"].detach()).all()
        flags = lost.new_full((3,), 0.0, dtype=torch.float32)
        flags[0], flags[1], flags[2] = lost, self._signals.received, self._is_due(trainer)
        step = trainer.global_step + (not ends_step(trainer))
        self._told.append(_told(step, flags, lost, batch.get("name", batch.get("clip_index"))))
        self._latest = self._told[-1]

    def on_validation_start(self, trainer, pl_module):
        self._validating = trainer.state.fn == "fit" and not trainer.sanity_checking
        if self._validating:
            self._read(trainer)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        # One process may stop here; several take different numbers of batches and stop together after the last.
        alone = trainer.world_size == 1 and trainer.state.fn == "fit"
        if self._signals.received and alone and between_steps(trainer):
            self._signal = self._signals.received
            if self._validating:
                self._save(trainer)
            self._leave()

    def on_validation_end(self, trainer, pl_module):
        self._validating = False

    def on_train_epoch_end(self, trainer, pl_module):
        self._read(trainer)
        old = not self.saved_step or time.monotonic() - self._clock >= YOUNG
        signum, old = _most([self._signals.received, old], trainer)
        self._signal = max(self._signal, int(signum))
        if old or self._due or self._signal or training_ends(trainer):
            self._save(trainer, anew=True)
            if self.export is not None:
                self.export(trainer, self.path.with_suffix(""))
        self._leave()

    def on_test_start(self, trainer, pl_module):
        self._signals.leave_at_once(trainer)

    def on_exception(self, trainer, pl_module, exception):
        """Saves what was reached, where that is the end of a step, and all processes are there."""
        if isinstance(exception, Stopped) and exception.signum == WARNING:
            requeue(trainer)
        ours = isinstance(exception, (Stopped, Diverged))
        together = trainer.world_size == 1 or isinstance(exception, TooManyBadClips)
        if trainer.state.fn == "fit" and not ours and together and between_steps(trainer):
            with suppress(UserError):  # the weights are lost, or the disk is full: the exception tells why it ends
                self._save(trainer)

    # What is done

    def _save(self, trainer: L.Trainer, anew: bool = False) -> None:
        """Writes last.ckpt, unless it is this step's already."""
        self._read(trainer)
        self._due, self._clock = False, time.monotonic()
        if trainer.fast_dev_run or (trainer.global_step == self.saved_step and not anew):
            return
        for logger in trainer.loggers:
            logger.save()  # what is logged up to here will not be logged again
        trainer.save_checkpoint(self.path, weights_only=False)
        self.saved_step = trainer.global_step

    def _leave(self) -> None:
        """Ends the run if a signal asks for it."""
        if self._signal:
            raise Stopped(self._signal)

    def _is_due(self, trainer: L.Trainer) -> bool:
        minutes, steps = self.settings.every_minutes, self.settings.every_n_steps
        by_steps = steps is not None and ends_step(trainer) and trainer.global_step % steps == 0
        return by_steps or (minutes is not None and time.monotonic() - self._clock >= 60 * minutes)

    def _read(self, trainer: L.Trainer, late: bool = False) -> None:
        """Takes in what the batches told; all of them, or all but the last."""
        while len(self._told) > late:
            told = self._told.popleft()
            if told.copied is not None:
                told.copied.synchronize()
            lost, signum, due = told.flags.tolist()
            self._signal, self._due = max(self._signal, int(signum)), self._due or bool(due)
            if lost:
                raise self._diverged(trainer, told, "the loss is NaN or infinite", bool(told.lost))

    def _check_weights(self, trainer: L.Trainer, module: nn.Module) -> None:
        if any(_most([not finite_weights(module)], trainer)):
            raise self._diverged(trainer, self._latest, "a weight is NaN or infinite after the step", True)

    def _diverged(self, trainer: L.Trainer, told: _Told | None, what: str, here: bool) -> Diverged:
        """The error, the same on all processes: it names the clips of those whose loss is meant."""
        names = [name for names in gathered(clip_names(trainer, told) if here and told else []) for name in names]
        kept = f"{self.path} (step {self.saved_step})" if self.saved_step else "none"
        return Diverged(
            f"step {told.step if told else trainer.global_step}: {what}; clips of the batch: "
            f"{preview(names, NAMED_CLIPS)}; last good checkpoint: {kept}; lower model.learning_rate or set "
            "trainer.gradient_clip_val, and look at these clips"
        )


def reads_late(device: torch.device) -> bool:
    """Whether what a step told is read a step later, so that nothing waits for the device."""
    return device.type == "cuda"


def ends_step(trainer: L.Trainer) -> bool:
    """Whether the last batch ended a step of the optimiser: gradients that add up are in no checkpoint."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
    return done % trainer.accumulate_grad_batches == 0 or done >= trainer.num_training_batches


def between_steps(trainer: L.Trainer) -> bool:
    """Whether a checkpoint can be written from which the training goes on as it would have."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current
    # The end of an epoch's last batch, before what follows on it, is a place that Lightning's counters cannot tell.
    closing = batches.completed < batches.processed >= trainer.num_training_batches
    return ends_step(trainer) and batches.started == batches.processed and not closing


def _told(step: int, flags: torch.Tensor, lost: torch.Tensor, clips: Any) -> _Told:
    """Starts the way of a batch's flags to the host."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    host, copied = flags.to("cpu", non_blocking=True), None
    if flags.is_cuda:
        copied = torch.cuda.Event()
        copied.record()
    return _Told(step, host, copied, lost, clips)


def training_ends(trainer: L.Trainer) -> bool:
    """Whether no epoch follows on the one that ends."""
    epochs, most = trainer.fit_loop.epoch_progress.current.processed, trainer.max_epochs
    by_epochs = most not in (None, -1) and epochs >= most
    return by_epochs or trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step


def _most(values: list[float], trainer: L.Trainer) -> list[float]:
    """The maximum of each value over all processes, which wait for each other."""
    tensor = torch.tensor(values, dtype=torch.float32, device=trainer.strategy.root_device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def finite_weights(module: nn.Module) -> bool:
    """Whether all trained weights, or this process's share of them, are finite numbers."""
    trained = (parameter.detach() for parameter in module.parameters() if parameter.requires_grad)
    local = (getattr(weight, "to_local", lambda weight=weight: weight)() for weight in trained)
    checks = [torch.isfinite(weight).all() for weight in local]
    return not checks or bool(torch.stack(checks).all())


def clip_names(trainer: L.Trainer, told: _Told) -> list[str]:
    """What the clips of a batch are called; their numbers where the data module has no table."""
    if told.clips is None:
        return []
    if isinstance(told.clips, list):
        return told.clips
    table = getattr(trainer.datamodule, "train_table", None)
    return [str(index) if table is None else table.name(index) for index in told.clips.tolist()]
