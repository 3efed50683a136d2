"""Processes that read clips beside this one: how they start, what they make of signals, and what is said of lost ones.

This process has threads (Arrow's, gloo's, the tokeniser's), any of which may hold a lock: a fork would copy the lock
and not the thread, and hang. So a server, which imports once what a worker needs and has a single thread, forks
instead; where it could not have one (macOS, Windows) each process imports anew.
"""

import errno
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import context, forkserver, parent_process, queues, resource_tracker
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from .errors import UserError, first_line

LOOK_SECONDS = 5.0  # between two looks at whether the training process is still there
FORKS = sys.platform not in ("darwin", "win32")  # Apple's libraries start threads when they are imported
# With these no library starts a thread when the server imports it: OpenBLAS, MKL, OpenMP, Arrow's jemalloc.
ONE_THREAD = {
    **dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1"),
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
# What workers import, as far as this process has imported it.
OF_WORKERS = (
    "vidprism_hf",
    *(
        f"vidprism_hf.{name}"
        for name in (
            "data.datamodule",
            "data.inspection",
            "data.hub_tables",
            "data.streamed_rows",
            "evaluation.predict",
        )
    ),
)
SHARED_MEMORY_FULL = re.compile(r"shared memory|</torch_|torch_shm_manager")
NO_BATCH = 77  # exit status of a worker that could not hand its batch over, having said why


class _Environment:
    """The variables of this process, for the one that it is unpickled in: the server has those of its start."""

    def __reduce__(self) -> tuple:
        return _set_environment, (dict(os.environ),)


def _set_environment(variables: dict[str, str]) -> None:
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


class _Process(context.ForkServerProcess if FORKS else context.SpawnProcess):
    """A process that takes over the environment, and does not run a script again that would start all over."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        # Pickled first, and so there before anything else is imported.
        process_obj.__dict__ = {"_environment": _Environment(), **process_obj.__dict__}
        start_server()
        with _importable_main():
            return super(_Process, _Process)._Popen(process_obj)


class _Context(context.ForkServerContext if FORKS else context.SpawnContext):
    Process = _Process


CONTEXT = _Context()


def start_server() -> None:
    """Starts the server that forks workers, unless it runs; it imports what they need beside this process.

    Signals to a whole job leave it alone: it ends with this process.
    """
    if not FORKS:
        return
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    with _blocked({signal.SIGUSR1}):
        resource_tracker.ensure_running()  # unblocks the others when it starts
    CONTEXT.set_forkserver_preload([name for name in OF_WORKERS if name in sys.modules])
    kept = {name: os.environ.get(name) for name in ONE_THREAD}
    with _blocked(signals):
        os.environ.update(ONE_THREAD)
        try:
            forkserver.ensure_running()
        finally:
            for name, value in kept.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _blocked(signals: set[signal.Signals]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _importable_main() -> Iterator[None]:
    """Hides a script that cannot be imported without running it: workers would import it, to find its classes."""
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None or _is_guarded(Path(path)):
        yield
        return
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _is_guarded(script: Path) -> bool:
    with suppress(OSError):
        return re.search(rb"^if\b.*__name__", script.read_bytes(), re.MULTILINE) is not None
    return False  # of standard input, or a file that is gone


# --- what a worker does


def shield_worker(worker_id: int) -> None:
    """Lets a loader process live on when its job is told to stop, as `worker_init_fn` of a DataLoader.

    Clusters and terminals signal all processes of a job. The training process finishes its step, for which it needs
    its loaders, and ends them itself.
    """
    queues.Queue._on_queue_feeder_error = staticmethod(_end_without_batch)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux: it tells who sent the signal
        # In this thread, and so in all that it starts: the one that waits gets each SIGTERM.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(parent_process(),), daemon=True).start()


def _obey(parent: Any) -> None:
    told = None
    # Not by whose child this is: the server lives as long as any of its workers.
    while parent.is_alive() and (told is None or told.si_pid != parent.pid):
        told = signal.sigtimedwait({signal.SIGTERM}, LOOK_SECONDS)
    os._exit(0)


def _end_without_batch(error: Exception, batch: Any) -> None:
    """Ends a worker whose thread cannot hand a batch over, which would otherwise be waited for without end."""
    full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or SHARED_MEMORY_FULL.search(str(error))
    if not full:
        traceback.print_exception(error)
        sys.stderr.flush()
    os._exit(errno.ENOSPC if full else NO_BATCH)


class _Collate:
    """Batches items, in shared memory as soon as they are batched: here an error reaches the process that waits."""

    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __call__(self, items: list) -> Any:
        batch = self.collate(items)
        if get_worker_info() is not None:
            for value in batch.values() if isinstance(batch, dict) else batch:
                if isinstance(value, torch.Tensor):
                    value.share_memory_()
        return batch


# --- the process that waits for them


class LostWorkers(UserError):
    """Loader processes that have ended, or give no batch."""


class ClipLoader(DataLoader):
    """A DataLoader whose lost workers end it with one line that says what to do. Made by `clip_loader`."""

    setting = "data.num_workers"  # what their number is called where the user sets it

    def _get_iterator(self) -> Iterator[Any]:
        if not self.num_workers:
            return super()._get_iterator()
        try:
            return _Workers(self)
        except (pickle.PicklingError, TypeError, AttributeError) as error:  # as the version of Python will have it
            if "pickle" not in str(error):
                raise
            raise UserError(
                f"clips cannot be handed to loader processes ({first_line(error)}): define what they need in a module, "
                f"or put what the script runs below `if __name__ == '__main__':`, or set {self.setting} to 0"
            ) from error
        except OSError as error:
            if said := lost(error, [], self.setting):
                raise LostWorkers(said) from error
            raise


class _Workers(_MultiProcessingDataLoaderIter):
    """The batches of worker processes."""

    def __init__(self, loader: ClipLoader):
        self._setting = loader.setting
        super().__init__(loader)

    def _try_get_data(self, timeout: float = MP_STATUS_CHECK_INTERVAL) -> tuple[bool, Any]:
        # torch looks whether workers are alive at the end of the time limit alone.
        end = time.monotonic() + timeout
        while not (got := super()._try_get_data(min(timeout, MP_STATUS_CHECK_INTERVAL)))[0]:
            if time.monotonic() >= end:
                break
        return got

    def _get_data(self) -> Any:
        with self._explained():
            return super()._get_data()

    def _process_data(self, *data: Any) -> Any:
        with self._explained():
            return super()._process_data(*data)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            codes = [worker.exitcode for worker in self._workers]
            if said := lost(error, codes, self._setting):
                raise LostWorkers(said) from error
            raise


def clip_loader(
    dataset: Dataset, num_workers: int, collate_fn: Callable[[list], Any], timeout: float | None = None, **settings: Any
) -> ClipLoader:
    """A loader of clips; its workers, if it has any, are started as this module says.

    Args:
        dataset: The clips; it is pickled for each worker.
        num_workers: Processes; 0 loads in this one.
        collate_fn: Makes a batch, a dict or a tuple of tensors and others.
        timeout: Seconds to wait for a batch; None is no limit.
        settings: Those of DataLoader.
    """
    if num_workers:
        settings |= {"multiprocessing_context": CONTEXT, "worker_init_fn": shield_worker, "timeout": timeout or 0}
    return ClipLoader(dataset, num_workers=num_workers, collate_fn=_Collate(collate_fn), **settings)


def lost(error: Exception, codes: list[int | None], setting: str) -> str | None:
    """What to say of an error that a lost worker leads to, in a line; None of any other.

    Args:
        error: What the loader raised.
        codes: Exit statuses of its workers.
        setting: What the number of workers is called.
    """
    text, fewer = str(error), f"lower {setting}, or set it to 0 to load in the main process"
    ended = [code for code in codes if code is not None and code != 0]
    full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or SHARED_MEMORY_FULL.search(text)
    if full or {errno.ENOSPC, -getattr(signal, "SIGBUS", 0)}.intersection(ended):
        return f"shared memory (/dev/shm) is full: give the container more (docker run --shm-size=8g), {fewer}"
    if text.startswith("DataLoader timed out"):
        seconds = text.split()[4]
        return (
            f"no batch came within {seconds} s: a loader process hangs, or the disk or network is that slow; raise "
            "data.worker_timeout, or lower data.batch_size or data.clip_time_limit"
        )
    if (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)) or "ancdata" in text:
        return f"too many open files for the batches of the loader processes: raise the limit (ulimit -n), or {fewer}"
    if not ended and "DataLoader worker (pid" not in text:
        return None
    if -getattr(signal, "SIGKILL", 0) in ended:
        return f"a loader process was killed, most often for want of memory: give the job more, {fewer}"
    how = ", ".join(sorted({signal.strsignal(-code) if code < 0 else f"exit status {code}" for code in ended}))
    return f"a loader process ended ({how or first_line(error)}); what it printed above says why; else {fewer}"
