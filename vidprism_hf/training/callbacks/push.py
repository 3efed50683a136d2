"""Publishes a run's best weights during training, and its final export.

The weights are exported on the training thread, right after their validation and before they change. The push is a
separate process: no time-out, lock or setting of the Hub's client affects the run, and a hung push can be killed. A
thread waits for it.
"""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from huggingface_hub import get_token
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ...errors import first_line, one_line_or_traceback

logger = logging.getLogger(__name__)
Push = Callable[[Path], str]  # pushes an export and returns one line with its URL; raises PushFailed
FOLDER = "push"  # in the run's folder


class PushFailed(Exception):
    """A push failed; the message is one line."""


class PushToHub(L.Callback):
    """Pushes the best weights in the background. A failed push is logged and retried when training ends.

    A failure neither stops nor delays the run. If several exports are waiting, only the newest is pushed. An export is
    deleted once published; an unpublished one stays in `<run's folder>/push`, where a resumed run finds it. `vidprism
    finetune` also pushes its final export, which is not deleted.

    Args:
        repo: `org/name`; created if it does not exist.
        private: Whether a new repository is private.
        revision: Branch; main if None.
        every_n_epochs: Minimum number of epochs between pushes; the best weights in between wait for the next one.
        monitor: Metric that selects the best weights.
        mode: "max" or "min".
        export: Writes the module's current weights: called with trainer, module and folder on every rank. Set by the
            run.
        wait: Seconds that the end of training waits for a push when there are several ranks: the others are idle
            meanwhile and time out after ten minutes. The push continues in the background.
        limit: Time limit of one push in seconds.

    Attributes:
        best: Metric of the last exported weights; restored on resume.
        stays_open: Whether `finish` is called after training; if not, the end of training calls it.
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
        self.export, self.wait, self.stays_open = export, wait, False
        self.options = ["--repo", repo, *(["--private"] if private else [])]
        self.options += ["--revision", revision] if revision else []
        self.messages: dict[Path, str] = {}  # commit messages by export
        self.push = PushProcess(self.options, limit, self.messages)
        self.best: float | None = None
        self._ready: Path | None = None  # exported, not due yet
        self._uploader: Uploader | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_fit_start(self, trainer, pl_module):
        if self.export is None:
            raise MisconfigurationException("PushToHub: export is not set")
        if trainer.is_global_zero:
            if isinstance(self.push, PushProcess) and get_token() is None:
                logger.warning("No token: pushes to %s will fail; run `hf auth login` or set HF_TOKEN", self.repo)
            self._uploader = Uploader(self.push, Path(trainer.default_root_dir) / FOLDER, self.options)
            if self.best is not None:  # a resumed run
                self._uploader.take_over()

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        epoch = trainer.current_epoch
        # One decision for all ranks: gathering the weights is a collective.
        better = trainer.strategy.broadcast(self._improvement(trainer))
        if better is not None:
            folder = Path(trainer.default_root_dir) / FOLDER / f"epoch-{epoch}-step-{trainer.global_step}"
            # A failed export does not raise the bar for the next one.
            if trainer.strategy.broadcast(self._export(trainer, pl_module, folder)):
                self.best = better
                what = f"Epoch {epoch + 1}, step {trainer.global_step}"
                self.messages[folder] = f"{what}: {self.monitor} {better:.4f}"
        if self._ready is not None and (epoch + 1) % self.every_n_epochs == 0:
            self._submit()

    def on_fit_end(self, trainer, pl_module):
        if self._ready is not None:
            self._submit()
        if not self.stays_open:
            self.finish(timeout=self.wait if trainer.world_size > 1 else None)

    def on_exception(self, trainer, pl_module, exception):
        self.stop()

    def finish(self, export: Path | None = None, timeout: float | None = None) -> None:
        """Pushes the run's final export, or retries a failed push, and waits for it.

        Args:
            export: Final export, which is not deleted; it replaces all unpublished ones.
            timeout: Seconds to wait; the push continues in the background.

        Raises:
            SystemExit: After Ctrl-C, as Lightning does.
        """
        if self._uploader is None:
            return
        try:
            self._uploader.close(export)
            ended = self._uploader.join(timeout)
        except KeyboardInterrupt:
            self.stop()
            raise SystemExit(1) from None
        if not ended:
            logger.warning("The push to %s continues in the background", self.repo)
        elif self._uploader.folder.is_dir() and not any(self._uploader.folder.iterdir()):
            self._uploader.folder.rmdir()

    def stop(self) -> None:
        """Stops a push at once; unpublished exports are kept, and their location is logged."""
        if self._uploader is not None:
            self._uploader.stop(self._ready)
            self._ready = None

    def _improvement(self, trainer: L.Trainer) -> float | None:
        """Returns the metric if it is better than every export's; None otherwise."""
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            logger.warning("Not pushed: the run has no metric %s to select the best weights; set monitor", self.monitor)
            return None
        value = float(value)
        beaten = self.best is None or (value > self.best if self.mode == "max" else value < self.best)
        return value if beaten and value == value else None

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> bool:
        """Exports the current weights and returns whether that succeeded."""
        try:
            self.export(trainer, pl_module, folder)
        except Exception as error:
            # A full disk or an invalid card must not end the run.
            warnings.warn(f"{folder}: not exported for a push: {one_line_or_traceback(error)}", stacklevel=2)
            return False
        if trainer.is_global_zero:
            if self._ready is not None:
                shutil.rmtree(self._ready, ignore_errors=True)
            self._ready = folder
        return True

    def _submit(self) -> None:
        self._uploader.submit(self._ready)
        self._ready = None


@contextmanager
def push_open(trainer: L.Trainer) -> Iterator[Callable[[Path], None]]:
    """Keeps a trainer's push open after training, for the final export.

    Yields a function that publishes an export and waits for it; without a PushToHub callback it does nothing. If the
    block fails, a running push is stopped and unpublished exports are logged.
    """
    callbacks = [callback for callback in trainer.callbacks if isinstance(callback, PushToHub)]
    for callback in callbacks:
        callback.stays_open = True

    def publish(export: Path) -> None:
        top1 = trainer.callback_metrics.get("test/top1")
        for callback in callbacks:
            callback.messages[export] = "Final export" + ("" if top1 is None else f": held-out top-1 {top1:.4f}")
            callback.finish(export)

    try:
        yield publish
    except BaseException:
        for callback in callbacks:
            callback.stop()
        raise


class PushProcess:
    """Runs `vidprism push` as a separate process; `stop` kills it.

    Args:
        options: Arguments of `vidprism push` besides the folder.
        limit: Time limit of a push in seconds.
        messages: Commit messages by export; others get the default message.
    """

    def __init__(self, options: list[str], limit: float, messages: dict[Path, str] | None = None):
        self.options, self.limit, self.messages = options, limit, {} if messages is None else messages
        self._process: subprocess.Popen | None = None
        self._noted: set[str] = set()  # notes already logged

    def __call__(self, folder: Path) -> str:
        """Pushes an export and returns the last line of the output: URL and commit."""
        command = [sys.executable, "-m", "vidprism_hf", "push", str(folder), *self.options]
        command += ["--message", self.messages[folder]] if folder in self.messages else []
        environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # A new session: Ctrl-C reaches the run only, which then stops this process.
        settings = {"text": True, "errors": "replace", "start_new_session": True}
        self._process = subprocess.Popen(command, env=environment, **pipes, **settings)
        try:
            out, err = self._process.communicate(timeout=self.limit)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise PushFailed(f"not done within {self.limit:.0f} s") from None
        if self._process.returncode != 0:
            lines = err.strip().splitlines() or [f"ended with status {self._process.returncode}"]
            raise PushFailed(lines[-1].removeprefix("vidprism push: "))
        *told, last = out.strip().splitlines()
        for line in told:
            if line.startswith("note: ") and line not in self._noted:
                self._noted.add(line)
                logger.warning("Pushed to the Hub; %s", line)
        return last

    def stop(self) -> None:
        """Kills a running push; the next push resumes from there."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()


class Uploader:
    """Pushes exports one at a time on a thread; of the waiting ones only the newest.

    Exports directly in `folder` are deleted once published or superseded; others are kept. The thread runs only while
    there is something to push. It is not a daemon: the interpreter waits for a push that was not stopped.

    Args:
        push: Publishes an export.
        folder: Folder of exports that were written only to be pushed.
        options: Arguments of `vidprism push`, for the command that pushes by hand.
    """

    def __init__(self, push: Push, folder: Path, options: list[str]):
        self.push, self.folder, self.options = push, folder, options
        self._waiting: Path | None = None
        self._failed: Path | None = None  # retried at the end unless a newer one comes
        self._told: str | None = None  # last logged cause; each is logged once
        self._closed = self._stopped = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None  # while there is something to push

    def take_over(self) -> None:
        """Queues the newest export of a stopped run for a retry and deletes older ones."""
        left = sorted(self.folder.glob("epoch-*-step-*"), key=lambda path: path.stat().st_mtime_ns)
        for old in left[:-1]:
            self._remove(old)
        if left:
            self._failed = left[-1]
            logger.warning("Not pushed before: %s; tried again at the end of training", self._failed)

    def submit(self, export: Path) -> None:
        """Queues an export; deletes an older one that is waiting or has failed."""
        with self._changed:
            outdated = {self._waiting, self._failed} - {None, export}
            self._waiting, self._failed = export, None
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._work, name="push to the Hub")
                self._thread.start()
        for old in outdated:
            self._remove(old)

    def close(self, final: Path | None = None) -> None:
        """Closes the queue after a final export; without one, retries a failed push."""
        with self._changed:
            self._closed = True
            if (last := final or self._failed) is not None:
                self.submit(last)

    def join(self, timeout: float | None = None) -> bool:
        """Waits for all submitted pushes and returns whether they ended in time."""
        # Not Thread.join: before Python 3.13 it reports a thread as ended after Ctrl-C.
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, timeout)

    def stop(self, ready: Path | None = None) -> None:
        """Stops at once; unpublished exports, `ready` included, are kept and logged."""
        with self._changed:
            self._stopped = True
            if ready is not None:
                self.submit(ready)
        end = getattr(self.push, "stop", lambda: None)
        end()
        while not self.join(0.1):
            end()  # it may have been about to start
        with self._changed:
            left, self._waiting, self._failed = self._waiting or self._failed, None, None
        if left is not None:
            logger.warning("Not pushed: the run ended first; push it by hand: %s", self._by_hand(left))

    def _work(self) -> None:
        try:
            while (taken := self._next()) is not None:
                self._try(*taken)
        finally:
            with self._changed:
                if self._thread is threading.current_thread():
                    self._end()

    def _next(self) -> tuple[Path, bool] | None:
        """Returns the newest export and whether this is its last attempt; None if nothing is waiting."""
        with self._changed:
            if self._waiting is None or self._stopped:
                self._end()
                return None
            export, self._waiting = self._waiting, None
            return export, self._closed

    def _end(self) -> None:
        self._thread = None
        self._changed.notify_all()

    def _try(self, export: Path, last: bool) -> None:
        try:
            told = self.push(export)
        except Exception as error:
            self._fail(export, first_line(error), last)
        else:
            self._told = None
            print(f"Pushed: {told}", flush=True)
            self._remove(export)

    def _fail(self, export: Path, cause: str, last: bool) -> None:
        with self._changed:
            newer, stopped = self._waiting is not None, self._stopped
            if newer:
                self._remove(export)
            elif stopped or not self._closed:
                self._failed = export
            elif not last:
                self._waiting = export  # training has ended meanwhile: retry now
        if stopped:
            return  # `stop` logs it
        if last:
            print(f"Not pushed: {cause}; push it by hand: {self._by_hand(export)}", flush=True)
        elif cause != self._told:
            self._told = cause
            after = "a newer one follows" if newer else "tried again at the end of training"
            logger.warning("Not pushed: %s; %s", cause, after)

    def _by_hand(self, export: Path) -> str:
        return shlex.join(["vidprism", "push", str(export), *self.options])

    def _remove(self, export: Path) -> None:
        if export.parent == self.folder:
            shutil.rmtree(export, ignore_errors=True)
