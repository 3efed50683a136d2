"""A callback that writes last.ckpt, stops on signals, and aborts a run that diverges.

All three decisions are made between two steps, alike on all ranks. After each step the ranks all-reduce (max) three
flags: non-finite loss, signal received, checkpoint due. On a GPU the result is copied to the host asynchronously and
read one step later, so that nothing waits for the device and decisions come one step late. Before a checkpoint is
written, pending flags are read and the weights are checked: no file contains NaN or infinite weights.
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

from ...data.bad_videos import TooManyBadClips
from ...distributed import gathered
from ...errors import UserError
from ...signals import WARNING, SignalWatch, Stopped, requeue
from ...util import preview
from .files import LAST, CheckpointSettings
from .resume import random_states, set_random_states, settle_loops, settle_progress

NAMED_CLIPS = 16  # at most, in the message of a run that diverges
YOUNG = 60.0  # seconds: not every shorter epoch writes last.ckpt, which may take longer than the epoch


class Diverged(UserError):
    """The loss or a weight of the run became NaN or infinite."""


class _Told(NamedTuple):
    """Flags of a batch.

    Attributes:
        step: Optimiser step of the batch, from 1.
        flags: (3,) float32 on the host, see the module. On a GPU, valid only after `copied`.
        copied: Event of the copy from the GPU; None on a CPU.
        lost: (), bool: whether this rank's own loss is not finite.
        clips: Names of its clips, or their indices, (B,).
    """

    step: int
    flags: torch.Tensor
    copied: "torch.cuda.Event | None"
    lost: torch.Tensor
    clips: Any


class Safeguard(Checkpoint):
    """Writes last.ckpt at the end of epochs, in between, and when a signal stops the run; see the module.

    Args:
        folder: Folder of last.ckpt.
        settings: How often last.ckpt is written within an epoch.
        export: Called with trainer and folder after last.ckpt is written at the end of an epoch.
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
        self.begun: str | None = None  # see Start; None takes the checkpoint's
        self._signals = SignalWatch()
        self._told: deque[_Told] = deque()
        self._latest: _Told | None = None
        self._signal, self._due = 0, False  # the same on all ranks
        self._validating = False
        self._clock = 0.0
        self._random: list[dict[str, Any]] | None = None

    # State

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

    # Hooks

    def setup(self, trainer, pl_module, stage):
        if stage == "fit":
            self._signals.install(trainer, "stopping as soon as the work in progress can be saved")

    def teardown(self, trainer, pl_module, stage):
        self.release()

    def release(self) -> None:
        """Restores the signal handlers, as the end of training does unless an error ended it."""
        self._signals.restore()

    def between_shards(self) -> None:
        """Stops if a signal arrived. Long work before training, such as the feature cache, calls it at safe points.

        Raises:
            Stopped: If this rank received a signal. The caller has to stop the other ranks (`Ranks.gather`).
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
        # A single rank may stop here; several have different numbers of batches and stop together after the last.
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
        """Saves the progress if a step has just ended and all ranks are here."""
        if isinstance(exception, Stopped) and exception.signum == WARNING:
            requeue(trainer)
        ours = isinstance(exception, (Stopped, Diverged))
        together = trainer.world_size == 1 or isinstance(exception, TooManyBadClips)
        if trainer.state.fn == "fit" and not ours and together and between_steps(trainer):
            with suppress(UserError):  # non-finite weights or a full disk: the original exception is the one to report
                self._save(trainer)

    # Actions

    def _save(self, trainer: L.Trainer, anew: bool = False) -> None:
        """Writes last.ckpt, unless this step's is already written."""
        self._read(trainer)
        self._due, self._clock = False, time.monotonic()
        if trainer.fast_dev_run or (trainer.global_step == self.saved_step and not anew):
            return
        for logger in trainer.loggers:
            logger.save()  # a resumed run does not repeat what was logged up to here
        trainer.save_checkpoint(self.path, weights_only=False)
        self.saved_step = trainer.global_step

    def _leave(self) -> None:
        """Stops the run if a signal was received."""
        if self._signal:
            raise Stopped(self._signal)

    def _is_due(self, trainer: L.Trainer) -> bool:
        minutes, steps = self.settings.every_minutes, self.settings.every_n_steps
        by_steps = steps is not None and ends_step(trainer) and trainer.global_step % steps == 0
        return by_steps or (minutes is not None and time.monotonic() - self._clock >= 60 * minutes)

    def _read(self, trainer: L.Trainer, late: bool = False) -> None:
        """Reads the flags of all pending batches; with `late`, all but the last."""
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
        """Returns the error, the same on all ranks, with the clips of the ranks that diverged."""
        names = [name for names in gathered(clip_names(trainer, told) if here and told else []) for name in names]
        kept = f"{self.path} (step {self.saved_step})" if self.saved_step else "none"
        return Diverged(
            f"step {told.step if told else trainer.global_step}: {what}; clips of the batch: "
            f"{preview(names, NAMED_CLIPS)}; last good checkpoint: {kept}; lower model.learning_rate or set "
            "trainer.gradient_clip_val, and check these clips"
        )


def reads_late(device: torch.device) -> bool:
    """Returns whether flags are read one step late, so that nothing waits for the device."""
    return device.type == "cuda"


def ends_step(trainer: L.Trainer) -> bool:
    """Returns whether the last batch ended an optimiser step; checkpoints do not contain accumulated gradients."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
    return done % trainer.accumulate_grad_batches == 0 or done >= trainer.num_training_batches


def between_steps(trainer: L.Trainer) -> bool:
    """Returns whether a checkpoint written now resumes exactly."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current
    # Lightning's counters cannot represent the moment after an epoch's last batch, before its end-of-epoch work.
    closing = batches.completed < batches.processed >= trainer.num_training_batches
    return ends_step(trainer) and batches.started == batches.processed and not closing


def _told(step: int, flags: torch.Tensor, lost: torch.Tensor, clips: Any) -> _Told:
    """Starts the all-reduce of a batch's flags and their copy to the host."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    host, copied = flags.to("cpu", non_blocking=True), None
    if flags.is_cuda:
        copied = torch.cuda.Event()
        copied.record()
    return _Told(step, host, copied, lost, clips)


def training_ends(trainer: L.Trainer) -> bool:
    """Returns whether the ending epoch is the last."""
    epochs, most = trainer.fit_loop.epoch_progress.current.processed, trainer.max_epochs
    by_epochs = most not in (None, -1) and epochs >= most
    return by_epochs or trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step


def _most(values: list[float], trainer: L.Trainer) -> list[float]:
    """Returns the maximum of each value over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float32, device=trainer.strategy.root_device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def finite_weights(module: nn.Module) -> bool:
    """Returns whether all trainable parameters, or this rank's shard of them, are finite."""
    trained = (parameter.detach() for parameter in module.parameters() if parameter.requires_grad)
    local = (getattr(weight, "to_local", lambda weight=weight: weight)() for weight in trained)
    checks = [torch.isfinite(weight).all() for weight in local]
    return not checks or bool(torch.stack(checks).all())


def clip_names(trainer: L.Trainer, told: _Told) -> list[str]:
    """Returns the names of a batch's clips, or their indices if the data module has no table."""
    if told.clips is None:
        return []
    if isinstance(told.clips, list):
        return told.clips
    table = getattr(trainer.datamodule, "train_table", None)
    return [str(index) if table is None else table.name(index) for index in told.clips.tolist()]
