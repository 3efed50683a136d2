"""Loader processes: how they start, what they take over, and what is said when one is lost."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import pytest
from small import complaint, run_arguments
from torch.utils.data import Dataset

from vidprism_cli import main
from vidprism_hf.data.loading import dataset
from vidprism_hf.workers import LostWorkers, clip_loader, start_server

ROOT = Path(__file__).parents[1]
IDLE = """
import os, sys, time
sys.path.insert(0, "tests")
from test_workers import Calls, collate
from vidprism_hf.workers import clip_loader
batches = iter(clip_loader(Calls(os.getpid), 2, collate, batch_size=1))
print(*[worker.pid for worker in batches._workers], flush=True)
next(batches)
time.sleep(600)
"""
KILLED = "a loader process was killed, probably out of memory: give the job more"
FULL = r"shared memory \(/dev/shm\) is full: give the container more \(docker run --shm-size=8g\)"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes and signals as Linux has them")


class Calls(Dataset):
    """Items are what a function returns in the worker."""

    def __init__(self, call):
        self.call = call

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.call() if index == 3 else None


def collate(items):
    return tuple(items)


def last(call, workers=2, **settings):
    """What a function returns in a worker."""
    return list(clip_loader(Calls(call), workers, collate, batch_size=1, **settings))[-1][0]


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(60)


def fill_shared_memory():
    raise RuntimeError("unable to write to file </torch_12_34>: No space left on device (28)")


def unpicklable():
    return threading.Lock()


class FailsWhenSent:
    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_workers_have_the_environment_of_now(monkeypatch):
    start_server()
    monkeypatch.setenv("SET_LATER", "1")
    assert last(partial(os.getenv, "SET_LATER")) == "1"
    monkeypatch.delenv("SET_LATER")
    assert last(partial(os.getenv, "SET_LATER")) is None


@linux
def test_the_server_has_one_thread_and_leaves_signals_alone():
    start_server()
    server = forkserver._forkserver._forkserver_pid
    assert last(os.getppid) == server
    assert len(os.listdir(f"/proc/{server}/task")) == 1
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        os.kill(server, getattr(signal, name))
    assert last(os.getppid) == server


@linux
@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", IDLE], stdout=subprocess.PIPE, text=True, cwd=ROOT) as run:
        workers = [int(number) for number in run.stdout.readline().split()]
        assert len(workers) == 2
        run.kill()
    deadline = time.monotonic() + 100
    while any(Path(f"/proc/{number}").exists() for number in workers):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@linux
@pytest.mark.parametrize(
    ("call", "line"),
    [
        (fill_shared_memory, FULL),
        pytest.param(partial(send, signal.SIGKILL), KILLED, marks=pytest.mark.slow),
        pytest.param(partial(send, signal.SIGBUS), FULL, marks=pytest.mark.slow),
        pytest.param(FailsWhenSent, FULL, marks=pytest.mark.slow),
        pytest.param(unpicklable, r"a loader process ended \(exit status 77\)", marks=pytest.mark.slow),
        pytest.param(partial(sys.exit, 3), r"a loader process ended \(exit status 3\)", marks=pytest.mark.slow),
    ],
    ids=["shared memory is full", "killed", "bus error", "full when a batch is sent", "no pickle", "exit"],
)
def test_a_lost_worker_ends_the_loader_with_a_line(call, line):
    with pytest.raises(LostWorkers, match=f"^{line}.*lower data.num_workers, or set it to 0") as error:
        last(call, timeout=100)
    assert "\n" not in str(error.value)


def test_a_worker_that_hangs_is_not_waited_for():
    with pytest.raises(LostWorkers, match=r"no batch came within 1 s: .*; raise data\.worker_timeout"):
        last(partial(time.sleep, 600), timeout=1)


def test_an_error_of_a_clip_is_raised_as_it_is():
    with pytest.raises(ZeroDivisionError):
        last(partial(divmod, 1, 0))
    with pytest.raises(RuntimeError, match="unable to write"):  # of this process: there are no workers
        last(fill_shared_memory, workers=0)


def test_clips_that_do_not_pickle():
    with pytest.raises(ValueError, match=r"clips cannot be sent to loader processes \(.*\): define what they need in"):
        last(lambda: 1)


class LostInTheSecondEpoch:
    """Batches clips, until one is of the second epoch."""

    def __init__(self, number):
        self.number, self.batches = number, 0

    def __call__(self, items):
        self.batches += 1
        if self.batches == 3 and len(items) == 4:
            send(self.number)
        return dataset.collate(items)


@linux
@pytest.mark.slow
def test_a_run_keeps_its_checkpoint_when_a_worker_is_killed(motion_clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vidprism_hf.data.datamodule.collate", LostInTheSecondEpoch(signal.SIGKILL))
    more = ("--data.num_workers=1", "--trainer.max_epochs=4", "--trainer.num_sanity_val_steps=0")
    assert main(run_arguments(motion_clips, tmp_path / "run", *more)) == 1
    assert "vidprism finetune: a loader process was killed" in complaint(capsys)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


SCRIPT = """
import sys
print("started", __name__)
from vidprism_hf import VideoDataModule
data = VideoDataModule(source=sys.argv[1], processor="tiny", num_frames=8, num_workers=2, batch_size=4)
print(sum(len(batch["labels"]) for batch in data.val_dataloader()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("given", ["file", "standard input"])
def test_a_script_without_a_guard(motion_clips, tmp_path, given):
    """Workers do not run it again."""
    (tmp_path / "script.py").write_text(SCRIPT)
    name, text = (str(tmp_path / "script.py"), None) if given == "file" else ("-", SCRIPT)
    command = [sys.executable, name, str(motion_clips)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["started __main__", "4"]
    assert "leaked" not in done.stderr


@linux
@pytest.mark.slow
def test_a_full_dev_shm(motion_clips, exported, tmp_path):
    """A real one, of a megabyte."""
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=100k tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    predict = ["predict", str(exported), str(motion_clips), "--workers=2", "--batch-size=4", "--device=cpu"]
    train = run_arguments(motion_clips, tmp_path / "run", "--data.num_workers=2")
    for words, setting in ((predict, "--workers"), (train, "data.num_workers")):
        command = [*small, sys.executable, "-m", "vidprism_hf", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert done.returncode == 1, done.stderr
        said = done.stderr.splitlines()[-1]
        assert said.startswith(f"vidprism {words[0]}: shared memory (/dev/shm) is full"), done.stderr
        assert f"lower {setting}" in said


@linux
def test_a_fork_of_a_process_with_threads_is_noted(tmp_path):
    """What fails every other test here that leads to one."""
    code = (
        "import os, threading, time\n"
        "threading.Thread(target=time.sleep, args=(3,), daemon=True).start()\n"
        "os.waitpid(os.fork() or os._exit(0), 0)"
    )
    env = {**os.environ, "VIDPRISM_FORKS": str(tmp_path / "forks")}
    assert "fork_watch_site" in env["PYTHONPATH"]
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
    assert "forks with 2 threads" in (tmp_path / "forks").read_text()
    code = "import os; os.waitpid(os.fork() or os._exit(0), 0)"
    subprocess.run([sys.executable, "-c", code], env=env | {"VIDPRISM_FORKS": str(tmp_path / "none")}, check=True)
    assert not (tmp_path / "none").exists()
