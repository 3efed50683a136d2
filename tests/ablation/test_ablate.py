"""`vidprism ablate`: a study of small videos, which resumes, and reports bad input in one line."""

import csv
import gc
import json
import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from small import NUM_FRAMES, complaint, motion_folder, run_arguments

from vidprism_cli import main
from vidprism_hf import VideoDataModule, VidPrismConfig, VidPrismLightningModule
from vidprism_hf.ablation import study as study_module
from vidprism_hf.ablation.baselines import num_trainable
from vidprism_hf.ablation.grids import GRIDS, grid_rows
from vidprism_hf.ablation.heads import HeadModule, TrainerSettings
from vidprism_hf.ablation.study import MODULE_SETTINGS, Study
from vidprism_hf.errors import UserError
from vidprism_hf.model.temporal_vidprism import VidPrismFeatureWhitening
from vidprism_hf.training.module import check_config

RECIPE = yaml.safe_load((Path(__file__).parents[2] / "recipes/ablations/head.yaml").read_text())["model"]["config"]
KEPT = ("--model.freeze_backbone=true", "--data.train_views=1")
OWN_SPLIT = "--data.val_fraction=0.5"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two classes of four clips each."""
    return motion_folder(tmp_path_factory.mktemp("clips"), train=4, val=1) / "train"


@pytest.fixture(scope="module")
def study(source, tmp_path_factory):
    """Runs a study, in a folder of its own with a cache that all share."""
    cache = tmp_path_factory.mktemp("cache")

    def call(output, *more, grid=("interaction",), folds=("--folds=2",)):
        arguments = run_arguments(source, output, *KEPT, f"--data.feature_cache={cache}")[1:]
        return main(["ablate", "--grid", *grid, "--seeds=1", *folds, *arguments, *more])

    return call


def test_the_command_and_a_python_study_run_the_same_trials(source, tmp_path, capsys):
    """The whole way once: features, trials, report; then the same by objects, which finds all of it finished."""
    output, cache = tmp_path / "study", str(tmp_path / "cache")
    recipe = run_arguments(source, output, *KEPT, OWN_SPLIT, f"--data.feature_cache={cache}")[1:]
    assert main(["ablate", "--grid=position", "--seeds=1", *recipe]) == 0
    assert "3 trials, 3 to train" in capsys.readouterr().out
    assert [name for name in table(output) if name[0] == "position"] == [("position", row) for row in GRIDS["position"]]

    data = VideoDataModule(
        str(source), "data", "tiny", NUM_FRAMES, 4, 0, val_fraction=0.5, train_views=1, feature_cache=cache
    )
    model = VidPrismLightningModule(
        "tiny",
        id2label=data.id2label,
        num_frames=NUM_FRAMES,
        freeze_backbone=True,
        learning_rate=1e-3,
        warmup_epochs=1.0,
    )
    L.seed_everything(0)  # as the command does: this tower has random weights
    study = Study(data, model, output, trainer=TrainerSettings("cpu", max_epochs=2))
    study.run(["position"], seeds=1)
    assert "3 trials, 0 to train" in capsys.readouterr().out
    results = study.results(["position"], seeds=1)
    assert [str(result.top1.mean) for result in results] == [row["top1"] for row in table(output).values()]
    assert study.report(["position"], seeds=1)[1] == output / "ablations.csv"


def test_a_study_of_a_tower_that_is_trained(source, tmp_path):
    data = VideoDataModule(str(source), val_fraction=0.5, feature_cache=str(tmp_path / "cache"), train_views=1)
    with pytest.raises(UserError, match="freeze_backbone"):
        Study(data, VidPrismLightningModule("tiny", id2label=data.id2label), tmp_path)


@pytest.mark.slow
def test_a_report_of_what_is_there(study, tmp_path, capsys):
    assert study(tmp_path, "--report", grid=("position",)) == 1
    assert "trials.jsonl: the recipe itself is not finished on all folds" in complaint(capsys)
    assert study(tmp_path, grid=("position",)) == 0
    written, trained = (tmp_path / "ablations.csv").read_text(), trials(tmp_path)
    assert study(tmp_path, "--report", grid=("position", "gates")) == 0
    rows = table(tmp_path)
    assert [name for name in rows if name[0] == "position"] == [("position", row) for row in GRIDS["position"]]
    assert {grid for grid, _ in rows} == {"position"}  # of the gates only the recipe itself has trials
    assert (tmp_path / "ablations.csv").read_text() == written
    assert trials(tmp_path) == trained


def trials(output):
    return [json.loads(line) for line in (output / "trials.jsonl").read_text().splitlines()]


def table(output):
    with open(output / "ablations.csv", newline="") as lines:
        return {(row["grid"], row["row"]): row for row in csv.DictReader(lines)}


@pytest.mark.slow
def test_a_study_resumes(study, tmp_path, capsys):
    level = logging.getLogger("lightning.pytorch").level
    assert study(tmp_path, grid=("interaction", "readout")) == 0
    assert "14 trials, 14 to train" in capsys.readouterr().out  # both grids have the recipe's own row
    assert logging.getLogger("lightning.pytorch").level == level  # quiet while it runs, and no longer
    rows = table(tmp_path)
    assert list(rows) == [(grid, row) for grid in ("interaction", "readout") for row in GRIDS[grid]]
    assert rows["interaction", "none"]["top1"] == rows["readout", "mean"]["top1"]
    assert {len(trial["correct"]) for trial in trials(tmp_path)} == {4}
    before = {trial["key"]: trial["correct"] for trial in trials(tmp_path)}
    assert not any(type(left) is HeadModule for left in gc.get_objects())  # with the weights of every trial

    file = tmp_path / "trials.jsonl"
    file.write_bytes(file.read_bytes()[:-10])  # killed while it wrote
    assert study(tmp_path, grid=("interaction", "readout")) == 0
    assert "14 trials, 1 to train" in capsys.readouterr().out
    lines = file.read_text().splitlines()
    again = [json.loads(line) for line in lines if line.endswith("}")]
    assert len(lines) == 15
    assert {trial["key"]: trial["correct"] for trial in again} == before

    # Another training, of which a probe has nothing; other features; and what no head has anything of.
    others = {"--trainer.max_epochs=1": 8, "--trainer.precision=bf16-mixed": 10, "--model.layer_decay=0.5": 0}
    for other, missing in others.items():
        assert study(tmp_path, other) == 0
        assert f"10 trials, {missing} to train" in capsys.readouterr().out


@pytest.mark.slow
def test_baselines_and_the_sources_own_split(study, tmp_path):
    assert study(tmp_path, OWN_SPLIT, grid=("baselines",), folds=()) == 0
    rows = table(tmp_path)
    assert [row for _, row in rows] == list(GRIDS["baselines"])
    sizes = {row: int(values["parameters"]) for (_, row), values in rows.items()}
    assert sizes["linear probe on the mean frame"] == 2 * (64 + 1)
    assert len(trials(tmp_path)) == len(rows) - 2  # the model's defaults are the paper's head at the tower's width
    assert not (tmp_path / "folds").exists()


@pytest.mark.slow
def test_a_folds_list_is_one_of_finetunes(study, source, tmp_path):
    assert study(tmp_path / "study", grid=("position",), folds=("--groups=^([0-9])",)) == 0
    (listing,) = (tmp_path / "study" / "folds").glob("*/3.txt")
    assert listing.read_text() == "growing/3.mp4\nshrinking/3.mp4\n"
    run = run_arguments(source, tmp_path / "run", "--trainer.max_epochs=1", f"--data.val_list={listing}")
    assert main(run) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data.feature_cache=null",), "data.feature_cache: name a folder for the features"),
        (("--model.ema_decay=0.9",), "model.ema_decay: is not supported in an ablation"),
        (("--groups=^(.)",), "folds, groups: give one of them"),
        ((OWN_SPLIT,), "data.val_fraction: conflicts with --folds and --groups"),
        (("--trainer.max_epochs=0",), "trainer.max_epochs=0: nothing would be trained"),
        (("--folds=9",), "folds=9: a class has 4 videos"),
        (("--seeds=0",), "--seeds 0: must be at least 1"),
        (("--data.shots=2",), "data.shots: is not supported in an ablation"),
        (("--trainer.limit_train_batches=1",), "trainer.limit_train_batches: is not supported in an ablation"),
        (
            ("--trainer.callbacks=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/top1"),
            "trainer.callbacks: is not supported in an ablation",
        ),
        (("--resume=none",), "resume: a study always resumes"),
        (("--trainer.devices=2",), "trainer.devices: trials run on one device"),
        (("--data.test_clips=4",), "data.test_clips, data.test_crops: an ablation tests a single view"),
    ],
)
def test_one_line_where_it_cannot_be(study, tmp_path, capsys, more, message):
    assert study(tmp_path, *more) == 1
    assert message in complaint(capsys)


@pytest.mark.slow
def test_held_out_clips_have_no_part_in_a_folds_whitening(source, tmp_path, monkeypatch):
    """A clip that differs changes the whitening of the fold that trains with it, and not of that which holds it out."""
    other = shutil.copytree(source, tmp_path / "other")
    shutil.copy(other / "shrinking" / "0.mp4", other / "growing" / "0.mp4")
    whitenings = []

    def spy(model):
        layers = [layer for layer in model.modules() if isinstance(layer, VidPrismFeatureWhitening)]
        whitenings.extend(torch.cat([buffer.flatten() for buffer in layer.buffers()]) for layer in layers)
        return num_trainable(model)

    monkeypatch.setattr(study_module, "num_trainable", spy)
    settings = (*KEPT, '--model.config={"feature_norm": "whitened"}')
    for clips in (source, other):
        folder = tmp_path / f"of_{clips.name}"
        arguments = run_arguments(clips, folder, *settings, f"--data.feature_cache={folder / 'cache'}")[1:]
        assert main(["ablate", "--grid", "position", "--seeds=1", "--folds=2", *arguments]) == 0
    (held_out, trained), (other_held_out, other_trained) = whitenings[0:2], whitenings[4:6]
    assert len(whitenings) == 8  # two rows of two folds, twice
    assert torch.equal(held_out, other_held_out)
    assert not torch.allclose(trained, other_trained)


@pytest.mark.slow
def test_processes_share_a_study(source, tmp_path):
    arguments = run_arguments(source, tmp_path / "study", *KEPT, f"--data.feature_cache={tmp_path / 'cache'}")[1:]
    command = [sys.executable, "-m", "vidprism_hf", "ablate", "--grid", "interaction", "--seeds=2", "--folds=2"]
    both = [subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    trained = [text.count("seed") for text in said]
    keys = [trial["key"] for trial in trials(tmp_path / "study")]
    assert len(keys) == len(set(keys)) == 4 * 2 * 2 + 2  # each once: heads by fold and seed, a probe by fold
    assert sum(trained) == len(keys)
    assert not list((tmp_path / "study" / "locks").iterdir())
    assert all("Written to" in text for text in said)


def test_a_clip_that_cannot_be_decoded(tmp_path, capsys):
    clips = motion_folder(tmp_path / "clips", train=4, val=1) / "train"
    (clips / "growing" / "1.mp4").write_bytes(b"no video")
    settings = (*KEPT, f"--data.feature_cache={tmp_path / 'cache'}")
    assert main(["ablate", "--folds=2", *run_arguments(clips, tmp_path / "out", *settings)[1:]]) == 1
    assert "growing/1.mp4: cannot be decoded, like 1 of 8 videos" in complaint(capsys)


@pytest.mark.slow
def test_clips_that_have_changed(source, tmp_path, capsys):
    clips = shutil.copytree(source, tmp_path / "clips")
    arguments = run_arguments(clips, tmp_path / "out", *KEPT, f"--data.feature_cache={tmp_path / 'cache'}")[1:]
    for expected in (6, 0):
        assert main(["ablate", "--grid", "position", "--seeds=1", "--folds=2", *arguments]) == 0
        assert f"6 trials, {expected} to train" in capsys.readouterr().out
    shutil.copy(clips / "shrinking" / "0.mp4", clips / "growing" / "0.mp4")
    assert main(["ablate", "--grid", "position", "--seeds=1", "--folds=2", *arguments]) == 0
    assert "6 trials, 6 to train" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_ends_after_a_whole_trial(study, tmp_path, capsys, monkeypatch):
    train = Study._run_trial

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return train(*arguments)

    monkeypatch.setattr(Study, "_run_trial", interrupted)
    with pytest.raises(SystemExit) as stopped:
        study(tmp_path, grid=("position",))
    assert stopped.value.code == 130
    assert "Stopped with 1 of 6 trials: run the same command to resume" in capsys.readouterr().out
    monkeypatch.undo()
    assert study(tmp_path, "--report", grid=("position",)) == 1
    assert study(tmp_path, grid=("position",)) == 0
    assert "6 trials, 5 to train" in capsys.readouterr().out


@pytest.mark.parametrize("grid", GRIDS)
def test_rows_are_heads_that_there_are(grid):
    rows, configs = grid_rows([grid]), []
    for row in rows:
        changed = {name: value for name, value in row.changes.items() if name not in MODULE_SETTINGS}
        training = {name: value for name, value in row.changes.items() if name in MODULE_SETTINGS}
        check_config(RECIPE | changed, 16)
        config = VidPrismConfig(num_frames=16, **RECIPE | changed).to_dict()
        configs.append(json.dumps([row.baseline, training, config]))
    assert len(set(configs)) == len(rows)  # no two are the same
    if grid not in ("losses", "merging", "gates"):  # they vary parts that the recipe lacks
        assert json.dumps([None, {}, VidPrismConfig(num_frames=16, **RECIPE).to_dict()]) in configs


def test_all_is_every_grid():
    assert {row.grid for row in grid_rows(["all"])} == set(GRIDS)
    assert grid_rows(["experts", "experts"]) == grid_rows(["experts"])
    with pytest.raises(UserError, match="grids: no grid expert; there are baselines, "):
        grid_rows(["expert"])


def test_the_command_without_scikit_learn(study, tmp_path, capsys, monkeypatch):
    for module in ("study", "probes"):
        monkeypatch.delitem(sys.modules, f"vidprism_hf.ablation.{module}")
    for module in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, module, None)
    assert study(tmp_path) == 1
    assert complaint(capsys) == 'vidprism ablate: needs scikit-learn: pip install "vidprism_hf[ablate]"'
