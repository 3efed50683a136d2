"""What processes tell each other: answers, failures, and that one of them ends."""

import multiprocessing
import sys

import pytest
import torch.distributed as dist

from vidprism_hf.distributed import Ranks, gathered, rank_and_world
from vidprism_hf.errors import UserError

WORLD = 2
fork = pytest.mark.skipif(sys.platform != "linux", reason="processes that are forked")


def together(tmp_path, work):
    """What `work(ranks)` returns or raises in each of two processes."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def run(rank):
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), WORLD), rank=rank, world_size=2)
        try:
            with Ranks.running() as ranks:
                found = work(ranks)
        except (Exception, SystemExit) as error:
            found = type(error).__name__, str(error)
        answers.put((rank, found))
        dist.barrier()

    processes = [context.Process(target=run, args=(rank,)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    return [found[rank] for rank in range(WORLD)]


@fork
def test_answers_by_rank(tmp_path):
    def work(ranks):
        told = gathered(rank_and_world()), ranks.gather(lambda: ranks.rank), ranks.first(lambda: ranks.rank)
        return [*told, list(ranks.share(range(5)))]

    both = [[(0, 2), (1, 2)], [0, 1], 0]
    assert together(tmp_path, work) == [[*both, [0, 2, 4]], [*both, [1, 3]]]


@fork
@pytest.mark.parametrize(
    ("error", "own", "others"),
    [
        (SystemExit(143), ("SystemExit", "143"), ("SystemExit", "143")),
        (OSError(5, "broken"), ("OSError", "[Errno 5] broken"), ("UserError", "[Errno 5] broken")),
    ],
)
def test_what_one_process_raises_all_raise(tmp_path, error, own, others):
    def fail(ranks):
        if ranks.rank == 1:
            raise error

    assert together(tmp_path, lambda ranks: ranks.gather(lambda: fail(ranks))) == [others, own]


def test_one_process_raises_as_it_is():
    def fail():
        raise UserError("wrong")

    with Ranks.running() as ranks, pytest.raises(UserError, match="wrong"):
        ranks.gather(fail)
    assert gathered(7) == [7]
    assert rank_and_world() == (0, 1)
