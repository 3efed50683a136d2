"""Publishes the best weights of a run while it goes on.

The weights are exported on the training's own thread, at the only moment when they are those that were validated.
The push is another process: no time-out, lock or setting of the Hub's client touches the run, and what hangs can be
ended. A thread waits for it.
"""

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from huggingface_hub import get_token
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ..errors import first_line

logger = logging.getLogger(__name__)
Push = Callable[[Path], str]  # an export to the line that tells where it is now; raises PushFailed
FOLDER = "push"  # in the run's folder


class PushFailed(Exception):
    """A push that did not end well; its message is one line."""


class PushToHub(L.Callback):
    """Pushes the best weights in the background; a push that fails is told, and tried again when training ends.

    No failure stops the run or holds it up. Where several exports wait, the newest is pushed. An export goes when it
    is published; one that is not published stays in `<run's folder>/push`.

    Args:
        repo: `org/name`; made if it is not there.
        private: Whether a new repository is private.
        revision: Branch; main if None.
        every_n_epochs: Epochs between two pushes at least; the best weights in between are kept for the next.
        monitor: Metric that tells the best.
        mode: "max" or "min".
        export: Writes the module's present weights to a folder: called with trainer, module and folder, on every
            process. The run sets it.
        wait: Seconds that the end of training waits for a push where several processes train: the others stand
            still meanwhile and give up after ten minutes. The push goes on behind it.
        limit: Seconds that one push may take.
    """

    def __init__(
        self,
        repo: str,
        private: bool | None = None,
        revision: str | None = None,
        every_n_epochs: int = 1,
        monitor: str = "val/top1",
        mode: str = "max",
        export: Callable[[L.Trainer, L.LightningModule, Path], Any] | None = None,
        wait: float = 240.0,
        limit: float = 6 * 3600.0,
    ):
        if mode not in ("max", "min"):
            raise MisconfigurationException(f"PushToHub: mode is max or min, not {mode!r}")
        if every_n_epochs < 1:
            raise MisconfigurationException("PushToHub: every_n_epochs is 1 or more")
        self.repo, self.every_n_epochs, self.monitor, self.mode = repo, every_n_epochs, monitor, mode
        self.export, self.wait = export, wait
        self.push = PushProcess(repo, private, revision, limit)
        self.best: float | None = None
        self._ready: Path | None = None  # exported, and not yet due
        self._resumed: str | None = None  # the name of what was that when the run was stopped
        self._uploader: Uploader | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "ready": self._ready.name if self._ready else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        self._resumed = state_dict.get("ready")

    def on_fit_start(self, trainer, pl_module):
        if self._resumed and (folder := Path(trainer.default_root_dir) / FOLDER / self._resumed).is_dir():
            self._ready = folder
        if self.export is None:
            raise MisconfigurationException("PushToHub: export is not set")
        if trainer.is_global_zero:
            if isinstance(self.push, PushProcess) and get_token() is None:
                logger.warning("No token: pushes to %s will fail; run `hf auth login` or set HF_TOKEN", self.repo)
            self._uploader = Uploader(self.push)

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        epoch = trainer.current_epoch
        # One decision for all processes: gathering the weights is the work of all.
        if trainer.strategy.broadcast(self._is_better(trainer)):
            self._export(trainer, pl_module, Path(trainer.default_root_dir) / FOLDER / f"epoch-{epoch}")
        if self._ready is not None and (epoch + 1) % self.every_n_epochs == 0:
            self._submit()

    def on_fit_end(self, trainer, pl_module):
        if self._uploader is None:
            return
        if self._ready is not None:
            self._submit()
        self._uploader.close()
        if not self._uploader.join(self.wait if trainer.world_size > 1 else None):
            logger.warning("The push to %s goes on while the run does", self.repo)

    def on_exception(self, trainer, pl_module, exception):
        if self._uploader is not None:
            if self._ready is not None:
                self._submit()
            self._uploader.stop()

    def _is_better(self, trainer: L.Trainer) -> bool:
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            logger.warning("Nothing is pushed: the run has no metric %s", self.monitor)
            return False
        value = float(value)
        if value != value or (self.best is not None and not self._beats(value)):
            return False
        self.best = value
        return True

    def _beats(self, value: float) -> bool:
        return value > self.best if self.mode == "max" else value < self.best

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> None:
        try:
            self.export(trainer, pl_module, folder)
        except Exception as error:
            # A full disk is no reason to lose the run.
            logger.warning("%s: not exported for a push (%s)", folder, first_line(error))
            return
        if trainer.is_global_zero:
            if self._ready is not None:
                shutil.rmtree(self._ready, ignore_errors=True)
            self._ready = folder

    def _submit(self) -> None:
        self._uploader.submit(self._ready)
        self._ready = None


class PushProcess:
    """`vidprism push` as a process of its own; `stop` ends it."""

    def __init__(self, repo: str, private: bool | None, revision: str | None, limit: float):
        self.limit, self._process, self._stopped = limit, None, False
        self.options = ["--repo", repo, *(["--private"] if private else [])]
        self.options += ["--revision", revision] if revision else []

    def __call__(self, folder: Path) -> str:
        """Pushes, and gives the last line: URL and commit."""
        command = [sys.executable, "-m", "vidprism_hf.hub.push", str(folder), *self.options]
        environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # A session of its own: Ctrl-C ends the run, which then ends this.
        settings = {"text": True, "errors": "replace", "start_new_session": True}
        self._process = subprocess.Popen(command, env=environment, **pipes, **settings)
        if self._stopped:
            self._process.kill()
        try:
            out, err = self._process.communicate(timeout=self.limit)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise PushFailed(f"not done within {self.limit:.0f} s") from None
        if self._process.returncode != 0:
            lines = err.strip().splitlines() or [f"ended with status {self._process.returncode}"]
            raise PushFailed(lines[-1].removeprefix("vidprism push: "))
        return out.strip().splitlines()[-1]

    def stop(self) -> None:
        """Ends a push that is under way, or just starting; pushing again goes on from there."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.kill()


class Uploader:
    """Pushes folders one after another on a thread; of those that wait only the newest.

    The thread is no daemon: an interpreter that ends waits for a push that was not told to stop.
    """

    def __init__(self, push: Push):
        self.push = push
        self._waiting: Path | None = None
        self._failed: Path | None = None
        self._closed = self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="push to the Hub")
        self._thread.start()

    def submit(self, folder: Path) -> None:
        """Takes an export over; an older one that still waits, or has failed, goes."""
        with self._changed:
            outdated = [old for old in (self._waiting, self._failed) if old is not None and old != folder]
            self._waiting, self._failed = folder, None
            self._changed.notify()
        for old in outdated:
            shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        """Says that nothing more comes: what waits is pushed, and what failed is tried once more."""
        with self._changed:
            self._closed = True
            if self._waiting is None:
                self._waiting, self._failed = self._failed, None
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the end, and tells whether it has come."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Ends at once; exports that were not published stay."""
        with self._changed:
            self._stopped = self._closed = True
            self._changed.notify()
        getattr(self.push, "stop", lambda: None)()
        self.join()

    def _work(self) -> None:
        while (folder := self._next()) is not None:
            last = self._closed  # there is no other try
            try:
                told = self.push(folder)
            except Exception as error:
                self._fail(folder, first_line(error), last)
            else:
                print(f"Pushed: {told}", flush=True)
                shutil.rmtree(folder, ignore_errors=True)

    def _next(self) -> Path | None:
        """The newest export, when there is one; nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closed)
            folder, self._waiting = self._waiting, None
            if self._stopped:
                if folder is not None:
                    logger.warning("Not pushed: %s; push it with `vidprism push`", folder)
                return None
            return folder

    def _fail(self, folder: Path, cause: str, last: bool) -> None:
        with self._changed:
            newer, last = self._waiting is not None, last or self._stopped
            if not newer and not last:
                # Training may have ended meanwhile: then the other try is due now.
                self._failed, self._waiting = (None, folder) if self._closed else (folder, None)
        if newer and not last:
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning("Not pushed: %s; a newer one follows", cause)
        elif last:
            logger.warning("Not pushed: %s; the export stays: vidprism push %s", cause, folder)
        else:
            logger.warning("Not pushed: %s; tried again at the end of training", cause)
