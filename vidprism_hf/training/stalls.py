"""A run of several processes of which one waits too long for another: each says what it does, and all end.

In a collective operation a process waits for all others, without a word: the one that hangs may be any of them. So
each has a thread that notes where it is in the store by which they have found each other. Where one has been at the
same place for too long its thread says where all of them are, and ends the process; the others' threads see it and do
the same, whatever their main threads wait for. Nothing is lost but the steps since the last checkpoint.
"""

import json
import os
import threading
import time
from typing import Any

import lightning as L
import torch.distributed as dist

from ..data.ranks import rank_and_world
from ..errors import UserError, first_line

LOOK_SECONDS = 2.0
LONG = 2  # times the limit: to write checkpoints and exports, while the others wait
FAILED_SECONDS = 10.0  # of another process: most errors are those of all, which end by themselves
GAVE_UP = "gave up"


def check_timeout(seconds: float) -> None:
    """Looks whether a limit can be one.

    Raises:
        UserError: If it cannot.
    """
    if not 1 <= seconds < float("inf"):
        raise UserError(f"collective_timeout={seconds}: must be a number of seconds, at least 1")


class StallWatch(L.Callback):
    """Ends a run of several processes that wait for each other.

    Args:
        seconds: How long a step of training, validation or test may take on one of them, with the data for the next;
            twice as long what comes between epochs.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._place, self._since, self._limit = "", 0.0, float("inf")
        self._stop: threading.Event | None = None

    def note(self, place: str, limit: float | None = None) -> None:
        """Says where this process is, and for how long it may be there at most."""
        self._place, self._since, self._limit = place, time.monotonic(), self.seconds if limit is None else limit

    def setup(self, trainer, pl_module, stage):
        if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
            return
        # Caches are filled, and a stopped run's clips are passed over, before the first batch.
        self.note("before its first batch", float("inf"))
        self._end()
        # A connection of its own: the main thread may wait on the other one.
        store = dist.PrefixStore("vidprism/places", dist.distributed_c10d._get_default_store().clone())
        self._stop = threading.Event()
        children = getattr(trainer.strategy.launcher, "procs", [])
        arguments = (store, self._stop, children)
        threading.Thread(target=self._watch, args=arguments, name="stall watch", daemon=True).start()

    def teardown(self, trainer, pl_module, stage):
        self._end()

    def _end(self) -> None:
        if self._stop is not None:
            self._stop.set()
            self._stop = None

    def on_sanity_check_end(self, trainer, pl_module):
        self.note("before its first batch", float("inf"))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.note(f"in step {trainer.global_step + 1} (epoch {trainer.current_epoch})")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note(f"waiting for the batch after step {trainer.global_step} (epoch {trainer.current_epoch})")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.note(f"in batch {batch_idx + 1} of the {'test' if trainer.testing else 'validation'}")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.note(f"waiting for batch {batch_idx + 2} of the {'test' if trainer.testing else 'validation'}")

    on_test_batch_start, on_test_batch_end = on_validation_batch_start, on_validation_batch_end

    def on_validation_end(self, trainer, pl_module):
        self.note("after the validation", LONG * self.seconds)

    def on_train_epoch_end(self, trainer, pl_module):
        self.note(f"at the end of epoch {trainer.current_epoch}", LONG * self.seconds)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.note(f"writing the checkpoint of step {trainer.global_step}", LONG * self.seconds)

    def on_exception(self, trainer, pl_module, exception):
        self.note(f"ending ({type(exception).__name__}: {first_line(exception)})", float("inf"))

    def _watch(self, store: Any, stop: threading.Event, children: list) -> None:
        rank, world = rank_and_world()
        look = min(LOOK_SECONDS, self.seconds / 4)
        while not stop.wait(look):
            waited, limit, place = time.monotonic() - self._since, self._limit, self._place
            try:
                store.set(str(rank), json.dumps([place, time.time() - waited]))
                other = store.get(GAVE_UP).decode() if store.check([GAVE_UP]) else ""
                if waited > limit and not other:
                    store.set(GAVE_UP, str(rank))
                    others = "; ".join(_told(store, number) for number in range(world) if number != rank)
                    self._leave(rank, f"has waited too long, {place} for {waited:.0f} s; {others}", look, children)
                elif other and other != str(rank) and place:
                    why = f"ends because rank {other} has waited too long; it was {place} for {waited:.0f} s"
                    self._leave(rank, why, look, children)
            except (RuntimeError, OSError):  # the process that keeps the store is gone
                if waited > min(limit, FAILED_SECONDS + look) and not stop.is_set():
                    why = f"ends because rank 0 has ended; it was {place} for {waited:.0f} s"
                    self._leave(rank, why, 0.0, children)

    def _leave(self, rank: int, why: str, look: float, children: list) -> None:
        hint = (
            f"collective_timeout is {self.seconds:g} s: raise it if that is how long it takes, else look at the rank "
            "that waits for its data or has noted nothing; the same command resumes from the last checkpoint"
        )
        os.write(2, f"\nvidprism: rank {rank} {why}. {hint}\n".encode())
        # The others must see that this one gave up; the first one keeps the store, and so is the last.
        time.sleep((4 if rank == 0 else 2) * look)
        for child in children:
            child.kill()
        os._exit(1)


def _told(store: Any, rank: int) -> str:
    """What a process has last noted."""
    if not store.check([str(rank)]):
        return f"rank {rank} has noted nothing"
    place, since = json.loads(store.get(str(rank)))
    return f"rank {rank} was {place} for {time.time() - since:.0f} s"
