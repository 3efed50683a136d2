"""`vidprism ablate`: a sweep on small clips, which goes on where it was stopped, and says in one line what is wrong."""

import csv
import gc
import json
import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small import complaint, motion_folder, run_arguments

from vidprism_cli import main
from vidprism_hf import VidPrismConfig
from vidprism_hf.ablation import study as ablation_sweep
from vidprism_hf.ablation.baselines import parameters_of
from vidprism_hf.ablation.grids import GRIDS, grid_rows
from vidprism_hf.ablation.study import HeadModule, parts
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
def sweep(source, tmp_path_factory):
    """Runs a sweep, in a folder of its own with a cache that all share."""
    cache = tmp_path_factory.mktemp("cache")

    def call(output, *more, grid=("interaction",), folds=("--folds=2",)):
        arguments = run_arguments(source, output, *KEPT, f"--data.feature_cache={cache}")[1:]
        return main(["ablate", "--grid", *grid, "--seeds=1", *folds, *arguments, *more])

    return call


def test_a_report_of_what_is_there(sweep, tmp_path, capsys):
    assert sweep(tmp_path, "--report", grid=("position",)) == 1
    assert "cells.jsonl: not all folds of the recipe itself are there" in complaint(capsys)
    assert sweep(tmp_path, grid=("position",)) == 0
    written, trained = (tmp_path / "ablations.csv").read_text(), cells(tmp_path)
    assert sweep(tmp_path, "--report", grid=("position", "gates")) == 0
    rows = table(tmp_path)
    assert [name for name in rows if name[0] == "position"] == [("position", row) for row in GRIDS["position"]]
    assert {grid for grid, _ in rows} == {"position"}  # of the gates only the recipe itself has cells
    assert (tmp_path / "ablations.csv").read_text() == written
    assert cells(tmp_path) == trained


def cells(output):
    return [json.loads(line) for line in (output / "cells.jsonl").read_text().splitlines()]


def table(output):
    with open(output / "ablations.csv", newline="") as lines:
        return {(row["grid"], row["row"]): row for row in csv.DictReader(lines)}


def test_a_sweep_goes_on_where_it_was_stopped(sweep, tmp_path, capsys):
    level = logging.getLogger("lightning.pytorch").level
    assert sweep(tmp_path, grid=("interaction", "readout")) == 0
    assert "14 cells, 14 to train" in capsys.readouterr().out  # both grids have the recipe's own row
    assert logging.getLogger("lightning.pytorch").level == level  # quiet while it runs, and no longer
    rows = table(tmp_path)
    assert list(rows) == [(grid, row) for grid in ("interaction", "readout") for row in GRIDS[grid]]
    assert rows["interaction", "none"]["top1"] == rows["readout", "mean"]["top1"]
    assert {len(cell["right"]) for cell in cells(tmp_path)} == {4}
    before = {cell["key"]: cell["right"] for cell in cells(tmp_path)}
    assert not any(type(left) is HeadModule for left in gc.get_objects())  # with the weights of every cell

    file = tmp_path / "cells.jsonl"
    file.write_bytes(file.read_bytes()[:-10])  # killed while it wrote
    assert sweep(tmp_path, grid=("interaction", "readout")) == 0
    assert "14 cells, 1 to train" in capsys.readouterr().out
    lines = file.read_text().splitlines()
    again = [json.loads(line) for line in lines if line.endswith("}")]
    assert len(lines) == 15
    assert {cell["key"]: cell["right"] for cell in again} == before

    # Another training, of which a probe has nothing; other features; and what no head has anything of.
    others = {"--trainer.max_epochs=1": 8, "--trainer.precision=bf16-mixed": 10, "--model.layer_decay=0.5": 0}
    for other, missing in others.items():
        assert sweep(tmp_path, other) == 0
        assert f"10 cells, {missing} to train" in capsys.readouterr().out


def test_baselines_and_the_sources_own_split(sweep, tmp_path):
    assert sweep(tmp_path, OWN_SPLIT, grid=("baselines",), folds=()) == 0
    rows = table(tmp_path)
    assert [row for _, row in rows] == list(GRIDS["baselines"])
    sizes = {row: int(values["parameters"]) for (_, row), values in rows.items()}
    assert sizes["linear probe on the mean frame"] == 2 * (64 + 1)
    assert len(cells(tmp_path)) == len(rows) - 2  # the model's defaults are the paper's head at the tower's width
    assert not (tmp_path / "folds").exists()


def test_a_folds_list_is_one_of_finetunes(sweep, source, tmp_path):
    assert sweep(tmp_path / "sweep", grid=("position",), folds=("--groups=^([0-9])",)) == 0
    (listing,) = (tmp_path / "sweep" / "folds").glob("*/3.txt")
    assert listing.read_text() == "growing/3.mp4\nshrinking/3.mp4\n"
    run = run_arguments(source, tmp_path / "run", "--trainer.max_epochs=1", f"--data.val_list={listing}")
    assert main(run) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data.feature_cache=null",), "data.feature_cache: name a folder for the features"),
        (("--model.ema_decay=0.9",), "model.ema_decay: is nothing for an ablation"),
        (("--groups=^(.)",), "--folds, --groups: give one of them"),
        ((OWN_SPLIT,), "data.val_fraction: --folds and --groups say what is held out"),
        (("--trainer.max_epochs=0",), "trainer.max_epochs=0: nothing would be trained"),
        (("--folds=9",), "--folds 9: a class has 4 clips"),
        (("--seeds=0",), "--seeds 0: must be at least 1"),
        (("--data.shots=2",), "data.shots: is nothing for an ablation"),
        (("--trainer.limit_train_batches=1",), "trainer.limit_train_batches: is nothing for an ablation"),
        (
            ("--trainer.callbacks=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/top1"),
            "trainer.callbacks: is nothing for an ablation",
        ),
        (("--resume=none",), "resume: a sweep goes on with the cells that are there"),
        (("--trainer.devices=2",), "trainer.devices: cells are trained on one device"),
        (("--data.test_clips=4",), "data.test_clips, data.test_crops: cells are tested in a single view"),
    ],
)
def test_one_line_where_it_cannot_be(sweep, tmp_path, capsys, more, message):
    assert sweep(tmp_path, *more) == 1
    assert message in complaint(capsys)


def test_held_out_clips_have_no_part_in_a_folds_whitening(source, tmp_path, monkeypatch):
    """A clip that differs changes the whitening of the fold that trains with it, and not of that which holds it out."""
    other = shutil.copytree(source, tmp_path / "other")
    shutil.copy(other / "shrinking" / "0.mp4", other / "growing" / "0.mp4")
    whitenings = []

    def spy(model):
        layers = [layer for layer in model.modules() if isinstance(layer, VidPrismFeatureWhitening)]
        whitenings.extend(torch.cat([buffer.flatten() for buffer in layer.buffers()]) for layer in layers)
        return parameters_of(model)

    monkeypatch.setattr(ablation_sweep, "parameters_of", spy)
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
def test_processes_share_a_sweep(source, tmp_path):
    arguments = run_arguments(source, tmp_path / "sweep", *KEPT, f"--data.feature_cache={tmp_path / 'cache'}")[1:]
    command = [sys.executable, "-m", "vidprism_hf", "ablate", "--grid", "interaction", "--seeds=2", "--folds=2"]
    both = [subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    trained = [text.count("seed") for text in said]
    keys = [cell["key"] for cell in cells(tmp_path / "sweep")]
    assert len(keys) == len(set(keys)) == 4 * 2 * 2 + 2  # each once: heads by fold and seed, a probe by fold
    assert sum(trained) == len(keys)
    assert not list((tmp_path / "sweep" / "locks").iterdir())
    assert all("Written to" in text for text in said)


def test_a_clip_that_cannot_be_decoded(tmp_path, capsys):
    clips = motion_folder(tmp_path / "clips", train=4, val=1) / "train"
    (clips / "growing" / "1.mp4").write_bytes(b"no video")
    settings = (*KEPT, f"--data.feature_cache={tmp_path / 'cache'}")
    assert main(["ablate", "--folds=2", *run_arguments(clips, tmp_path / "out", *settings)[1:]]) == 1
    assert "growing/1.mp4: cannot be decoded, as 1 of 8 clips" in complaint(capsys)


def test_clips_that_have_changed(source, tmp_path, capsys):
    clips = shutil.copytree(source, tmp_path / "clips")
    arguments = run_arguments(clips, tmp_path / "out", *KEPT, f"--data.feature_cache={tmp_path / 'cache'}")[1:]
    for expected in (6, 0):
        assert main(["ablate", "--grid", "position", "--seeds=1", "--folds=2", *arguments]) == 0
        assert f"6 cells, {expected} to train" in capsys.readouterr().out
    shutil.copy(clips / "shrinking" / "0.mp4", clips / "growing" / "0.mp4")
    assert main(["ablate", "--grid", "position", "--seeds=1", "--folds=2", *arguments]) == 0
    assert "6 cells, 6 to train" in capsys.readouterr().out


def test_ctrl_c_ends_with_a_whole_cell(sweep, tmp_path, capsys, monkeypatch):
    train = ablation_sweep.Sweep._train

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return train(*arguments)

    monkeypatch.setattr(ablation_sweep.Sweep, "_train", interrupted)
    with pytest.raises(SystemExit) as stopped:
        sweep(tmp_path, grid=("position",))
    assert stopped.value.code == 130
    assert "Stopped with 1 of 6 cells: the same command goes on" in capsys.readouterr().out
    monkeypatch.undo()
    assert sweep(tmp_path, "--report", grid=("position",)) == 1
    assert sweep(tmp_path, grid=("position",)) == 0
    assert "6 cells, 5 to train" in capsys.readouterr().out


@pytest.mark.parametrize("grid", GRIDS)
def test_rows_are_heads_that_there_are(grid):
    rows = GRIDS[grid]
    configs = []
    for changes in rows.values():
        changed, training = parts(changes)
        check_config(RECIPE | changed, 16)
        config = VidPrismConfig(num_frames=16, **RECIPE | changed).to_dict()
        configs.append(json.dumps([changes.get("baseline"), training, config]))
    assert len(set(configs)) == len(rows)  # no two are the same
    if grid not in ("losses", "merging", "gates"):  # they vary parts that the recipe lacks
        assert json.dumps([None, {}, VidPrismConfig(num_frames=16, **RECIPE).to_dict()]) in configs


def test_all_is_every_grid():
    assert {grid for grid, _, _ in grid_rows(["all"])} == set(GRIDS)
    assert grid_rows(["experts", "experts"]) == grid_rows(["experts"])
