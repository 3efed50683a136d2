"""Signal handling: the first signal stops a run after its step with a checkpoint, the second ends it at once.

The exit status is 128 + the signal's number: 130 after Ctrl-C (SIGINT), 143 after SIGTERM, 138 after SIGUSR1, with
which SLURM announces the end of a job's time (`#SBATCH --signal=USR1@120`). Under SLURM, SIGUSR1 also requeues the job,
whose command then resumes from the checkpoint.

Lightning's own handlers are replaced, because they write checkpoints in the middle of a step and run collective
operations inside a signal handler.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment

from .errors import first_line

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
WARNING = getattr(signal, "SIGUSR1", None)  # an early warning: the signal that follows does not count as the second
SAME_SIGNAL_SECONDS = 1.0  # launchers forward a signal to processes that already have it


class Stopped(SystemExit):
    """Exits a run that a signal stopped, after its checkpoint was written.

    Attributes:
        code: The exit status, 128 + the signal's number.
    """

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum

    def __reduce__(self):  # so that it can be sent to other ranks
        return type(self), (self.signum,)


class SignalWatch:
    """Records signals that ask a run to stop.

    Attributes:
        received: Number of the signal received; 0 if none.
    """

    def __init__(self):
        self.received = 0
        self._time = 0.0
        self._multiple = False
        self._loud = True
        self._what = ""
        self._before: dict[int, Any] = {}  # handlers to restore

    def install(self, trainer: Trainer, what: str = "stopping after this step, with a checkpoint") -> None:
        """Installs the handlers until `restore`.

        Args:
            trainer: The run's trainer.
            what: The announced reaction to a signal.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        self._multiple, self._loud, self._what = trainer.world_size > 1, trainer.is_global_zero, what
        self._before = self._before or {signum: signal.getsignal(signum) for signum in STOPPING}
        for signum in STOPPING:
            signal.signal(signum, self._note)

    def restore(self) -> None:
        """Restores the previous handlers, which Lightning does only for handlers that it installed."""
        if threading.current_thread() is threading.main_thread():
            for signum, handler in self._before.items():
                signal.signal(signum, handler)
            self._before = {}

    def leave_at_once(self, trainer: Trainer) -> None:
        """Makes the first signal end the process, when there is nothing to save. Ctrl-C is left to Lightning."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in set(STOPPING) - {signal.SIGINT}:
            signal.signal(signum, partial(_requeue_and_end, trainer) if signum == WARNING else signal.SIG_DFL)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now, before = time.monotonic(), self._time
        if self.received in (0, WARNING) and signum != self.received:
            self.received, self._time = signum, now
            if self._loud:  # not print, which may be what was interrupted
                name = signal.Signals(signum).name
                text = f"\n{name}: {self._what}; a second signal ends at once\n"
                os.write(2, text.encode())
        elif not (self._multiple and now - before < SAME_SIGNAL_SECONDS):
            _end(signum)


def _end(signum: int) -> None:
    """Ends the process with the signal's default action."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def _requeue_and_end(trainer: Trainer, signum: int, frame: FrameType | None) -> None:
    requeue(trainer)
    _end(signum)


def requeue(trainer: Trainer) -> None:
    """Requeues this run's job, if it runs under SLURM and Lightning's `auto_requeue` is on."""
    environment = trainer._accelerator_connector.cluster_environment
    if not (trainer.is_global_zero and isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
        return
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], stdin=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"Job {job} could not be requeued: {first_line(error)}", file=sys.stderr, flush=True)
    else:
        print(f"Job {job} was requeued", flush=True)
