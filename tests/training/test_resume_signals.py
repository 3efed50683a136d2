"""What a process makes of signals, but for its end."""

import os
import signal
import threading
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from vidprism_hf.data.ranks import Ranks
from vidprism_hf.training.safeguard import Safeguard
from vidprism_hf.training.signals import STOPPING, SignalWatch, Stopped
from vidprism_hf.workers import CONTEXT


@pytest.fixture(autouse=True)
def handlers():
    before = {signum: signal.getsignal(signum) for signum in STOPPING}
    yield before
    for signum, handler in before.items():
        signal.signal(signum, handler)


def watch(world_size: int) -> SignalWatch:
    watch = SignalWatch()
    watch.install(SimpleNamespace(world_size=world_size, is_global_zero=world_size == 1))
    return watch


@pytest.mark.parametrize("signum", STOPPING)
def test_a_signal_is_noted(signum, capfd):
    noted = watch(1)
    assert noted.received == 0
    signal.raise_signal(signum)
    assert noted.received == signum
    assert f"{signal.Signals(signum).name}: stopping after this step" in capfd.readouterr().err


def test_work_before_the_training_ends_at_a_signal(handlers, tmp_path, capfd):
    """As the feature cache does between two of its shards, when Lightning sets the run up."""
    guard, shards = Safeguard(tmp_path), []

    class Working(L.LightningModule):
        def training_step(self, batch):
            raise AssertionError

        def configure_optimizers(self):
            for shard in range(3):
                shards.append(shard)
                if shard == 1:
                    signal.raise_signal(signal.SIGUSR1)
                guard.between_shards()

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[guard])
    with pytest.raises(Stopped) as ended:
        trainer.fit(Working(), [0])
    assert shards == [0, 1]
    assert ended.value.code == 128 + signal.SIGUSR1
    assert "SIGUSR1: stopping as soon as what is being prepared can be kept" in capfd.readouterr().err
    guard.release()
    assert {signum: signal.getsignal(signum) for signum in STOPPING} == handlers


def _work(rank: int, address: str) -> None:
    """Of two processes that share some work: the second one is told to stop when the first waits for it."""
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    guard = Safeguard("unused")
    guard._signals.received = rank * signal.SIGTERM
    try:
        with Ranks.running() as ranks:
            ranks.gather(guard.between_shards if rank else lambda: None)
    except Stopped as stopped:
        os._exit(stopped.code)


def test_processes_end_together(tmp_path):
    processes = [CONTEXT.Process(target=_work, args=(rank, f"file://{tmp_path}/store")) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [143, 143]


def test_launchers_pass_a_signal_on_to_processes_that_have_it(capfd):
    noted = watch(2)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert noted.received == signal.SIGTERM
    assert capfd.readouterr().err == "", "the first process tells"


def test_a_thread_leaves_signals_alone(handlers):
    thread = threading.Thread(target=watch, args=(1,))
    thread.start()
    thread.join()
    assert {signum: signal.getsignal(signum) for signum in STOPPING} == handlers
