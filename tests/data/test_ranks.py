"""What processes tell each other: answers, failures, and that one of them ends."""

from functools import partial

import pytest
import torch.distributed as dist

from vidprism_hf.data.ranks import Ranks, gathered, rank_and_world
from vidprism_hf.errors import UserError
from vidprism_hf.workers import CONTEXT

WORLD = 2


def together(tmp_path, work):
    """What `work(ranks)` returns or raises in each of two processes."""
    answers = CONTEXT.Queue()
    arguments = (tmp_path / "store", work, answers)
    processes = [CONTEXT.Process(target=one_of_two, args=(rank, *arguments)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    return [found[rank] for rank in range(WORLD)]


def one_of_two(rank, store, work, answers):
    dist.init_process_group("gloo", store=dist.FileStore(str(store), WORLD), rank=rank, world_size=WORLD)
    try:
        with Ranks.running() as ranks:
            found = work(ranks)
    except (Exception, SystemExit) as error:
        found = type(error).__name__, str(error)
    answers.put((rank, found))
    dist.barrier()


def answers_of_all(ranks):
    told = gathered(rank_and_world()), ranks.gather(lambda: ranks.rank), ranks.first(lambda: ranks.rank)
    return [*told, list(ranks.share(range(5)))]


def test_answers_by_rank(tmp_path):
    both = [[(0, 2), (1, 2)], [0, 1], 0]
    assert together(tmp_path, answers_of_all) == [[*both, [0, 2, 4]], [*both, [1, 3]]]


def fail_on_second(error, ranks):
    def fail():
        if ranks.rank == 1:
            raise error

    return ranks.gather(fail)


@pytest.mark.parametrize(
    ("error", "own", "others"),
    [
        (SystemExit(143), ("SystemExit", "143"), ("SystemExit", "143")),
        (OSError(5, "broken"), ("OSError", "[Errno 5] broken"), ("UserError", "[Errno 5] broken")),
    ],
)
def test_what_one_process_raises_all_raise(tmp_path, error, own, others):
    assert together(tmp_path, partial(fail_on_second, error)) == [others, own]


def test_one_process_raises_as_it_is():
    def fail():
        raise UserError("wrong")

    with Ranks.running() as ranks, pytest.raises(UserError, match="wrong"):
        ranks.gather(fail)
    assert gathered(7) == [7]
    assert rank_and_world() == (0, 1)
