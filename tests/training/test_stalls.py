"""Processes that wait for each other: what is said of it, and that all end."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from small import complaint, run_arguments

from vidprism_hf.cli import main
from vidprism_hf.training.recipe import parse
from vidprism_hf.training.stalls import StallWatch
from vidprism_hf.workers import CONTEXT

ROOT = Path(__file__).parents[2]


def one_of_two(rank: int, folder: Path, sleeper: int) -> None:
    """A process that trains two steps; one of the two never has the data of the second."""
    os.dup2(os.open(folder / f"said{rank}", os.O_WRONLY | os.O_CREAT), 2)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    trainer = SimpleNamespace(world_size=2, global_step=0, current_epoch=0, strategy=SimpleNamespace(launcher=None))
    watch = StallWatch(2.0)
    watch.setup(trainer, None, "fit")
    for step in range(2):
        trainer.global_step = step
        if step and rank == sleeper:
            time.sleep(600)
        watch.on_train_batch_start(trainer, None, None, step)
        dist.all_reduce(torch.zeros(1))
        trainer.global_step = step + 1
        watch.on_train_batch_end(trainer, None, None, None, step)


@pytest.mark.slow
@pytest.mark.parametrize("sleeper", [0, 1])
def test_a_process_that_waits_too_long_says_for_what_and_all_end(tmp_path, sleeper):
    processes = [CONTEXT.Process(target=one_of_two, args=(rank, tmp_path, sleeper)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [1, 1]
    said = [(tmp_path / f"said{rank}").read_text() for rank in range(2)]
    assert all(text.count("vidprism: rank") == 1 for text in said)
    assert f"rank {sleeper} " in said[sleeper]
    assert "waiting for the batch after step 1 (epoch 0) for" in said[sleeper]
    assert "in step 2 (epoch 0) for" in said[1 - sleeper]
    assert any("has waited too long" in text and "resumes from the last checkpoint" in text for text in said)


SCRIPT = """
import os, sys, time
from vidprism_hf.cli import main
from vidprism_hf.data.dataset import ClipReader

read, count = ClipReader.__call__, 0
def slow(*args):
    global count
    count += 1
    if os.environ.get("LOCAL_RANK") == "1" and count > 4:
        time.sleep(600)
    return read(*args)

ClipReader.__call__ = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_of_two_processes_one_of_which_hangs_in_its_data(motion_clips, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    more = ("--trainer.devices=2", "--trainer.strategy=ddp", "--collective_timeout=15", "--data.batch_size=2")
    command = [sys.executable, str(tmp_path / "script.py"), *run_arguments(motion_clips, tmp_path / "run", *more)]
    more = ("--data.clip_time_limit=null", "--trainer.num_sanity_val_steps=0")
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode not in (0, None)
    assert "vidprism: rank" in done.stderr
    assert "collective_timeout is 15 s" in done.stderr


def test_the_limit_of_the_process_group(motion_clips, tmp_path):
    words = run_arguments(motion_clips, tmp_path, "--trainer.devices=2", "--collective_timeout=100")[1:]
    for name in ("auto", "ddp", "fsdp"):
        trainer = parse([*words, f"--trainer.strategy={name}"]).instantiate_trainer(logger=False)
        assert trainer.strategy._timeout.total_seconds() == 200


@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_limit_that_is_none(motion_clips, tmp_path, capsys, value):
    assert main(run_arguments(motion_clips, tmp_path / "run", f"--collective_timeout={value}")) == 1
    assert f"collective_timeout={float(value)}: must be a number of seconds" in complaint(capsys)
