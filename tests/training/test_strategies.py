"""One process, DDP and FSDP2 train the same weights, find the same metrics and write the same files."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import strategy_runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from small import LABELS, NUM_FRAMES, complaint, files_of, motion_folder, run_arguments
from strategy_runs import RUNS, STRATEGIES, run, run_all

from vidprism_cli import main
from vidprism_hf import VidPrismLightningModule
from vidprism_hf.cli.recipe import parse, trainer_settings
from vidprism_hf.training.distributed import named_strategy
from vidprism_hf.training.trainer import training_trainer

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "recipes" / "launch"


@settings(max_examples=30, deadline=None)
@given(
    freeze=st.booleans(),
    num_frames=st.sampled_from([1, 5, NUM_FRAMES]),
    config=st.fixed_dictionaries(
        {
            "readout": st.sampled_from(["query", "mean", "max"]),
            "aggregation": st.sampled_from(["rgsta", "stride", "mean", "max"]),
            "interaction": st.sampled_from(["both", "slow_to_fast", "fast_to_slow", "none"]),
            "interaction_pairs": st.sampled_from(["all", "slow_fast"]),
            "interaction_gates": st.sampled_from(["pair", "edge"]),
            "interaction_update": st.sampled_from(["sum", "last"]),
            "gate_threshold": st.sampled_from([0.3, 2.0]),  # the latter closes all gates
            "merge_normalization": st.sampled_from(["kept", "rest"]),
            "kept_per_window": st.sampled_from([1, 2]),
            "rates": st.sampled_from([[2, 4, 8], [1, 1], [4]]),
            "time_position": st.sampled_from(["none", "learned"]),
            "projection_head": st.booleans(),
            "hidden_size": st.sampled_from([None, 32]),
            "gate_loss_weight": st.sampled_from([0.0, 0.01]),
        }
    ),
)
def test_every_trained_parameter_gets_a_gradient_whatever_the_configuration(freeze, num_frames, config):
    """DDP need not look for unused parameters, and its graph is static."""
    module = VidPrismLightningModule(
        "tiny", id2label=dict(enumerate(LABELS)), num_frames=num_frames, freeze_backbone=freeze, config=config
    )
    module.configure_model()
    module(torch.randn(2, num_frames, 3, 32, 32), torch.tensor([0, 1])).loss.backward()
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    assert trained
    assert [name for name, value in trained.items() if value.grad is None] == []


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with what one process, and two under each strategy, have left of every run."""
    folder = tmp_path_factory.mktemp("strategies")
    motion_folder(folder / "clips", train=4, val=3)
    (folder / "clips" / "val" / "growing" / "2.mp4").unlink()  # five held-out clips, of which processes get 3 and 2
    for name, count in (("eleven", 6), ("nine", 5)):
        motion_folder(folder / name, train=count, val=1)
        (folder / name / "train" / "growing" / "0.mp4").unlink()
    run_all(folder)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    start([*launcher, str(Path(__file__).with_name("strategy_runs.py")), str(folder)])
    return folder


def start(command: list[str], **env: str) -> None:
    """Runs a command to its good end, with this environment's programs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path, **env}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def first_weights(name: str) -> dict[str, torch.Tensor]:
    """Those that one of RUNS begins with."""
    module = strategy_runs.module(name)
    module.configure_model()
    return module.state_dict()


def largest_difference(one: dict, other: dict) -> float:
    """Of two models' weights."""
    assert list(one) == list(other)
    return max((one[name] - other[name]).abs().max().item() for name in one)


both = pytest.mark.parametrize("strategy", STRATEGIES)
exact = pytest.mark.parametrize("name", [name for name in RUNS if name != "half"])


@pytest.mark.slow
@both
@exact
def test_two_processes_train_what_one_does(results, name, strategy):
    """The same global batches, uneven ones too: gradients, also clipped by their common norm, the balance of all clips,
    and AdamW.
    """
    alone, shared = (weights(results / f"{name}-{kind}.ckpt") for kind in ("auto", strategy))
    assert largest_difference(alone, shared) < 1e-5 < 1e-4 < largest_difference(alone, first_weights(name))


@pytest.mark.slow
@both
def test_half_precision_of_two_processes(results, strategy):
    """Rounded otherwise, but the same step; the weights themselves stay whole."""
    alone, shared = (weights(results / f"half-{kind}.ckpt") for kind in ("auto", strategy))
    before, alone, shared = (
        torch.cat([value.flatten() for value in state.values()]) for state in (first_weights("half"), alone, shared)
    )
    assert shared.dtype == torch.float32
    assert (shared - alone).norm() < 0.1 * (alone - before).norm()


@pytest.mark.slow
@both
@exact
def test_two_processes_find_the_same_metrics(results, name, strategy):
    """Of held-out clips that do not divide evenly each counts once, in means as in accuracies; so in the last step's
    losses.
    """
    alone, shared = (json.loads((results / f"{name}-{kind}.json").read_text()) for kind in ("auto", strategy))
    for of_batches in ("val/gate_loss", "val/loss"):  # which are others
        alone.pop(of_batches), shared.pop(of_batches)
    assert {"val/top1", "val/classification_loss", "val/rank_loss", "val/expert_1_rate_4_weight"} <= alone.keys()
    assert {"train/loss", "train/classification_loss", "train/gate_loss"} <= alone.keys()
    assert shared == pytest.approx(alone, abs=1e-4)


@pytest.mark.slow
def test_one_process_goes_on_from_any_checkpoint(results, tmp_path):
    """The file is the same one, with the optimiser's state, whoever wrote it."""
    (tmp_path / "clips").symlink_to(results / "clips")
    ends = []
    for kind in ("auto", *STRATEGIES):
        ends.append(weights(run("adamw-resumed", tmp_path, start=results / f"adamw-resumed-{kind}.ckpt", max_epochs=3)))
    assert all(largest_difference(ends[0], end) < 1e-5 for end in ends[1:])
    assert largest_difference(ends[0], weights(results / "adamw-resumed-auto.ckpt")) > 1e-4


@pytest.mark.slow
@both
@pytest.mark.parametrize("place", ["export", "checkpoints/best", "checkpoints/last"])
def test_the_same_weights_give_the_same_files(results, place, strategy):
    """At the end of a run and for each kept checkpoint: all but what names the strategy."""
    alone, shared = (files_of(results / f"run-{kind}" / place) for kind in ("auto", strategy))
    assert alone.keys() == shared.keys() >= {"model.safetensors", "config.json"}
    named = {"README.md", "recipe.yaml"}  # the number of processes, time and memory
    drawn = {"figures/curves.png", "figures/experts.png"}  # sums of other orders
    assert {name for name in alone if alone[name] != shared[name]} <= named | drawn
    assert b"2 x CPU" in shared["README.md"]
    assert (results / f"run-{strategy}" / "metrics.json").read_text() == (results / "run-auto/metrics.json").read_text()


@pytest.mark.slow
def test_torchrun_script(results, tmp_path):
    """FSDP2 by the script, on a folder of clips: what is tested and exported is the best checkpoint."""
    # So little that the accuracy stays as it is: the first epoch is the best.
    words = run_arguments(results / "clips", tmp_path / "run", "--model.learning_rate=1e-7", "--data.batch_size=2")
    recipe = str(ROOT / "recipes" / "folder.yaml")
    start(["bash", str(LAUNCH / "torchrun.sh"), *words[1:]], RECIPE=recipe, DEVICES="2", STRATEGY="fsdp")
    best, last = (weights(tmp_path / "run" / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    exported = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert all(torch.equal(tensor, best[f"model.{name}"]) for name, tensor in exported.items())
    assert any(not torch.equal(tensor, best[name]) for name, tensor in last.items())


@pytest.mark.parametrize(
    ("script", "nodes"), [("lightning.sh", 1), ("torchrun.sh", 3), ("slurm.sh", 3)], ids=lambda value: str(value)
)
def test_a_launch_scripts_command(motion_clips, tmp_path, monkeypatch, script, nodes):
    """It parses as it is, and its trainer takes the processes that the launcher starts."""
    written = tmp_path / "words"
    for program in ("vidprism", "torchrun", "srun"):
        (tmp_path / program).write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {written}\n")
        (tmp_path / program).chmod(0o755)
    job = {"NTASKS": 6, "NTASKS_PER_NODE": 2, "NNODES": 3, "JOB_NUM_NODES": 3, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    job = {f"SLURM_{name}": str(value) for name, value in job.items()}
    env = {**os.environ, **job, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "DEVICES": "2", "NODES": "3"}
    env |= {"RECIPE": str(ROOT / "recipes" / "folder.yaml")}
    subprocess.run(["bash", str(LAUNCH / script), f"--data.source={motion_clips}"], env=env, cwd=tmp_path, check=True)
    if script == "slurm.sh":
        options = re.findall(r"^#SBATCH (.*)", (LAUNCH / script).read_text(), flags=re.MULTILINE)
        assert {"--signal=USR1@120", "--requeue", "--open-mode=append"} <= set(options)
    words = written.read_text().splitlines()
    cli = parse([*words[words.index("finetune") + 1 :], "--trainer.accelerator=cpu"])
    if script == "slurm.sh":
        for name, value in job.items():
            monkeypatch.setenv(name, value)
    trainer = training_trainer(trainer_settings(cli), logger=False)
    assert isinstance(trainer.strategy, DDPStrategy)
    assert (trainer.world_size, trainer.num_nodes) == (2 * nodes, nodes)


def test_the_makefiles_variables(motion_clips, monkeypatch):
    variables = {"devices": "2", "num_nodes": "3", "strategy": "fsdp", "precision": "bf16-mixed"}
    words = [f"DATASET={motion_clips}", *(f"{name.upper()}={value}" for name, value in variables.items())]
    printed = subprocess.run(["make", "-n", "finetune", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    command = shlex.split(printed.stdout.splitlines()[-1])
    monkeypatch.chdir(ROOT)
    given = parse(command[command.index("finetune") + 1 :]).config.trainer
    assert {name: str(given[name]) for name in variables} == variables


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_that_is_not_installed(motion_clips, tmp_path, capsys):
    assert main(run_arguments(motion_clips, tmp_path / "run", "--trainer.strategy=deepspeed")) == 1
    assert "pip install -U deepspeed" in complaint(capsys)


def test_refuses_processes_whose_results_are_lost(motion_clips, tmp_path, capsys):
    arguments = run_arguments(motion_clips, tmp_path / "run", "--trainer.strategy=ddp_spawn", "--trainer.devices=2")
    assert main(arguments) == 1
    assert "trainer.strategy=ddp_spawn: its processes do not return their results; use ddp" in complaint(capsys)


def test_fsdp_refuses_a_precision_that_it_has_not(motion_clips, tmp_path, capsys):
    more = ("--trainer.strategy=fsdp", "--trainer.precision=16-mixed")
    assert main(run_arguments(motion_clips, tmp_path / "run", *more)) == 1
    assert "Choose a different precision among: 32-true, bf16-mixed" in complaint(capsys)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_several_devices_take_ddp_by_themselves(motion_clips, tmp_path, accumulate):
    """In the form in which it is asked for."""
    more = ("--trainer.devices=2", f"--trainer.accumulate_grad_batches={accumulate}")
    words = run_arguments(motion_clips, tmp_path / "run", *more)[1:]
    auto, asked = (
        training_trainer(trainer_settings(parse([*words, f"--trainer.strategy={name}"])), logger=False).strategy
        for name in ("auto", "ddp")
    )
    assert type(auto) is type(asked) is DDPStrategy
    assert auto._ddp_kwargs == asked._ddp_kwargs


def test_strategies_by_name(motion_clips, tmp_path, capsys):
    assert isinstance(named_strategy("fsdp"), ModelParallelStrategy)
    assert named_strategy("auto") == "auto"
    given = DDPStrategy()
    assert named_strategy(given) is given
    assert main(run_arguments(motion_clips, tmp_path / "run", "--trainer.strategy=deepspeed_stage_3")) == 1
    assert complaint(capsys).startswith("vidprism finetune: trainer.strategy=deepspeed_stage_3: ")
