"""The processes of a run: which one this is, and what they tell each other.

`rank_and_world` and `gathered` are for what is told between two steps; `Ranks` is for work in which each process goes
through its own share of the clips.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

from .errors import UserError

T = TypeVar("T")
# Shares take as long as their clips do: the usual limits of minutes are for steps of training.
PATIENCE = timedelta(days=2)


def rank_and_world() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(value: T, group: Any = None) -> list[T]:
    """The value of each process, by rank; all have to call it."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value, group=group)
    return values


@rank_zero_only
def print_once(text: str) -> None:
    """Prints on the first process alone."""
    print(text, flush=True)


class Ranks:
    """The processes of a run, which may be one. Use `running`, since waiting long needs connections of their own."""

    def __init__(self, rank: int = 0, world: int = 1, group: Any = None):
        self.rank, self.world, self._group = rank, world, group

    @classmethod
    @contextmanager
    def running(cls) -> Iterator["Ranks"]:
        """The processes of this run."""
        rank, world = rank_and_world()
        if world == 1:
            yield cls()
            return
        # gloo, which is on the CPU and notices at once when another process ends.
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        try:
            yield cls(rank, world, group)
        finally:
            dist.destroy_process_group(group)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's items."""
        return items[self.rank :: self.world]

    def gather(self, work: Callable[[], T]) -> list[T]:
        """What the work of each process comes to, in all of them; if one fails or wants to end, all raise.

        Raises:
            UserError: If it has failed in another process.
            SystemExit: If another process ends.
        """
        result, error = None, None
        try:
            result = work()
        except (Exception, SystemExit) as failure:  # a signal may end all of them, wherever each of them is
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
        """What the work of the first process comes to, in all of them."""
        return self.gather(lambda: work() if self.rank == 0 else None)[0]
