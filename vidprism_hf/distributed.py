"""The ranks of a run and their communication.

Use `rank_and_world` and `gathered` between steps, and `Ranks` for long work in which each rank processes its own part
of the videos.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

from .errors import UserError

T = TypeVar("T")
# A rank's part of the work may take hours; the usual timeouts of minutes are for training steps.
PATIENCE = timedelta(days=2)


def rank_and_world() -> tuple[int, int]:
    """Returns this process's rank and the world size."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(value: T, group: Any = None) -> list[T]:
    """Returns the value of each rank, in order; all ranks must call it."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value, group=group)
    return values


@rank_zero_only
def print_once(text: str) -> None:
    """Prints on rank 0 only."""
    print(text, flush=True)


class Ranks:
    """The ranks of a run, possibly one. Made by `running`, which opens a group with a long timeout."""

    def __init__(self, rank: int = 0, world: int = 1, group: Any = None):
        self.rank, self.world, self._group = rank, world, group

    @classmethod
    @contextmanager
    def running(cls) -> Iterator["Ranks"]:
        """Yields the ranks of this run."""
        rank, world = rank_and_world()
        if world == 1:
            yield cls()
            return
        # gloo runs on the CPU and notices at once when another rank ends.
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        try:
            yield cls(rank, world, group)
        finally:
            dist.destroy_process_group(group)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this rank's items."""
        return items[self.rank :: self.world]

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Runs work on each rank and returns all results on all ranks; if one fails or exits, all raise.

        Raises:
            UserError: If another rank failed.
            SystemExit: If another rank exits.
        """
        result, error = None, None
        try:
            result = work()
        except (Exception, SystemExit) as failure:  # SystemExit: a signal may end all ranks at any point
            error = failure
        if self.world == 1:
            if error is not None:
                raise error
            return [result]
        told = error if error is None or isinstance(error, SystemExit) else UserError(str(error))
        answers = gathered((result, told), self._group)
        for failure in (error, *(told for _, told in answers)):
            if failure is not None:
                raise failure
        return [result for result, _ in answers]

    def first(self, work: Callable[[], T]) -> T:
        """Runs work on rank 0 and returns its result on all ranks."""
        return self.gather(lambda: work() if self.rank == 0 else None)[0]
