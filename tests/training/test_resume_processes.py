"""Runs that are killed, signalled, or in several processes: what they leave, and that they go on the same."""

import os
import random
import signal
import socket
import stat
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from run_server import RunServer
from same_runs import arguments, assert_same_runs, checkpoint, differences, logged
from small import LABELS, motion_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SOURCE = "org/motions"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return motion_folder(tmp_path_factory.mktemp("data") / "clips", train=5)


@pytest.fixture(scope="module")
def server(source, tmp_path_factory):
    """A server of runs that know a Hub with the clips as a dataset of three files, in which one is no video."""
    from datasets import ClassLabel, Dataset, Features, Video

    folder = tmp_path_factory.mktemp("hub") / "dataset"
    (folder / "data").mkdir(parents=True)
    features = Features({"video": Video(decode=False), "label": ClassLabel(names=list(LABELS))})
    for split, shards in (("train", 3), ("validation", 1)):
        paths = sorted((source / split.removesuffix("idation")).glob("*/*.mp4"))
        rows = [
            {"video": {"bytes": path.read_bytes(), "path": path.name}, "label": LABELS.index(path.parent.name)}
            for path in paths
        ]
        if split == "train":
            rows[3]["video"]["bytes"] = b"no video"
        table = Dataset.from_list(rows, features=features)
        for shard in range(shards):
            part = table.shard(shards, shard)
            part.to_parquet(folder / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet")
    with Hub() as hub:
        hub.add_dataset(SOURCE, folder)
        with RunServer(tmp_path_factory.mktemp("logs"), hub.environment(folder.parent / "home")) as server:
            yield server


OFTEN = "--checkpoint.every_n_steps=1"


def random_ends(seed: int) -> list[dict]:
    """Twenty moments: in steps, in what goes before and between them, and in the writing of checkpoints."""
    draw = random.Random(seed)
    ends = [{"calls": draw.randrange(60_000), "step": draw.choice((1, 1, 2))} for _ in range(9)]
    ends += [{"calls": draw.randrange(150_000), "step": 0} for _ in range(3)]
    ends += [{"written": draw.random(), "file": draw.choice((1, 2))} for _ in range(4)]
    ends += [{"renamed": rename, "file": 2} for rename in (1, 2, 2, 3)]
    draw.shuffle(ends)
    return ends


def test_twenty_kills_change_nothing(source, server, tmp_path):
    """Each kill comes within two steps of where the run went on, at the latest; every other one has loaders."""
    longer = (OFTEN, "--trainer.max_epochs=6")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert server.run(arguments(source, whole, *longer))[0] == 0
    ends = random_ends(seed=5)
    assert len(ends) == 20
    for number, end in enumerate(ends):
        loaders = f"--data.num_workers={2 * (number % 2)}"
        status, log = server.run(arguments(source, killed, *longer, loaders), end)
        assert status == -signal.SIGKILL, (number, end, log[-3000:])
    status, log = server.run(arguments(source, killed, *longer))
    assert status == 0, log[-3000:]
    assert "Going on with the run" in log
    assert_same_runs(whole, killed)
    assert not list(killed.rglob("*.tmp"))


def test_a_signal_to_all_processes_of_a_run(source, server, tmp_path):
    """SIGTERM, as clusters send it: the loaders live until the step is done."""
    output = tmp_path / "run"
    words = arguments(source, output, "--data.num_workers=2")
    status, log = server.run(words, {"signals": ["SIGTERM"], "step": 2, "to": "group"})
    assert status == 143, log[-3000:]
    assert "SIGTERM: stopping after this step, with a checkpoint; a second signal ends at once" in log
    assert "Traceback" not in log
    assert checkpoint(output)["global_step"] == 2


@pytest.mark.parametrize(("names", "status"), [(["SIGUSR1"], 138), (["SIGINT"], 130), (["SIGUSR1", "SIGTERM"], 143)])
def test_statuses(source, server, tmp_path, names, status):
    """SIGTERM after SIGUSR1, which warns of it, is no second signal."""
    output = tmp_path / "run"
    found, log = server.run(arguments(source, output), {"signals": names, "step": 1})
    assert found == status, log[-3000:]
    assert "Stopped after step 1. Go on with: vidprism finetune" in log
    assert checkpoint(output)["global_step"] == 1


def test_a_second_signal_ends_at_once(source, server, tmp_path):
    plan = {"signals": ["SIGTERM", "SIGTERM"], "step": 3}
    assert server.run(arguments(source, tmp_path / "run"), plan)[0] == -signal.SIGTERM
    assert not list(tmp_path.rglob("*.ckpt*"))


@pytest.mark.parametrize("array", [False, True])
def test_slurm_requeues_the_job(source, server, tmp_path, array):
    output, called = tmp_path / "run", tmp_path / "called"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {called}; ls {output}/checkpoints >> {called}\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "41", "SLURM_JOB_NAME": "train", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job |= {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2"} if array else {}
    status, log = server.run(arguments(source, output), {"signals": ["SIGUSR1"], "step": 2}, **job)
    assert status == 138, log[-3000:]
    assert called.read_text().splitlines() == [f"requeue {'40_2' if array else '41'}", "last.ckpt"]
    assert not list(output.glob("hpc_ckpt*"))


def test_a_stream_goes_on_within_an_epoch(server, tmp_path):
    """With two loaders. One of its ten clips cannot be decoded: what stands in for it is the same too."""

    def words(name: str) -> list[str]:
        own = (f"--data.source={SOURCE}", "--data.streaming=true", f"--data.root={tmp_path / 'data'}")
        more = ("--data.max_bad_fraction=0.1", "--data.num_workers=2", OFTEN)
        return arguments(Path("unused"), tmp_path / name, *own, *more)

    status, log = server.run(words("whole"))
    assert status == 0, log[-3000:]
    ends = ({"signals": ["SIGTERM"], "step": 2}, {"calls": 9000, "step": 2}, {"written": 0.5, "file": 2})
    for end, expected in zip(ends, (143, -signal.SIGKILL, -signal.SIGKILL), strict=True):
        status, log = server.run(words("stopped"), end)
        assert status == expected, log[-3000:]
    assert server.run(words("stopped"))[0] == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "stopped")
    for name in ("whole", "stopped"):
        assert len((tmp_path / name / "bad_clips.csv").read_text().splitlines()) == 2
        assert "9 of 10 (1 undecodable)" in (tmp_path / name / "export" / "README.md").read_text()


def two_processes(server, words: list[str], plans: tuple[dict, dict] = ({}, {})) -> list[tuple[int, str]]:
    """Status and output of each of two processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    words = [*words, "--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=1"]
    started = [server.start(words, plan, LOCAL_RANK=str(rank), **place) for rank, plan in enumerate(plans)]
    return [(server.wait(pid), log.read_text(errors="replace")) for pid, log in started]


def test_two_processes_stop_and_go_on_together(source, server, tmp_path):
    """Only the second one gets the signal. Each has its own random state, as dropout shows."""
    whole, stopped = (arguments(source, tmp_path / name) for name in ("whole", "stopped"))
    assert [status for status, _ in two_processes(server, whole)] == [0, 0]
    ended = two_processes(server, stopped, ({}, {"signals": ["SIGTERM"], "step": 2}))
    assert [status for status, _ in ended] == [143, 143], [log[-3000:] for _, log in ended]
    kept = checkpoint(tmp_path / "stopped")
    assert kept["global_step"] == 2
    assert len(kept["callbacks"]["Safeguard"]["random"]) == 2
    assert [status for status, _ in two_processes(server, stopped)] == [0, 0]
    one, other = (tmp_path / name for name in ("whole", "stopped"))
    assert logged(one).keys() == logged(other).keys()
    one, other = checkpoint(one), checkpoint(other)
    for name in ("state_dict", "lr_schedulers", "loops"):
        assert differences(one[name], other[name]) == []
    assert differences(one["optimizer_states"], other["optimizer_states"]) == []


def test_two_processes_diverge_together(source, server, tmp_path):
    """The loss of one is lost: both name its clip, and neither waits for the other."""
    ended = two_processes(server, arguments(source, tmp_path / "run", OFTEN), ({}, {"lost": 3}))
    assert [status for status, _ in ended] == [1, 1], [log[-3000:] for _, log in ended]
    lines = [log.strip().splitlines()[-1] for _, log in ended]
    assert lines[0] == lines[1]
    assert "step 3: the loss is NaN or infinite; clips of the batch: train/" in lines[0]
    assert "last.ckpt (step 2)" in lines[0]
    kept = checkpoint(tmp_path / "run")["state_dict"]
    assert all(torch.isfinite(value).all() for value in kept.values())
