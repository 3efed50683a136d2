"""What a process makes of signals, but for its end."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest

from vidprism_hf.training.signals import STOPPING, SignalWatch


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
