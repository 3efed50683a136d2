"""Loader processes and signals: a signal to a whole job is for the training process to answer."""

import os
import signal
import threading
from multiprocessing import parent_process

LOOK_SECONDS = 5.0  # between two looks at whether the training process is still there


def shield_worker(worker_id: int) -> None:
    """Lets a loader process live on when its job is told to stop, as `worker_init_fn` of a DataLoader.

    Clusters and terminals signal all processes of a job. The training process finishes its step, for which it needs
    its loaders, and ends them itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux: it tells who sent the signal
        # In this thread, and so in all that it starts: the one that waits gets each SIGTERM.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(parent_process().pid,), daemon=True).start()


def _obey(parent: int) -> None:
    started_by, told = os.getppid(), None
    while os.getppid() == started_by and (told is None or told.si_pid != parent):
        told = signal.sigtimedwait({signal.SIGTERM}, LOOK_SECONDS)
    os._exit(0)
