"""`vidprism ablate`: a sweep on small clips, which goes on where it was stopped, and says in one line what is wrong."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from small import complaint, motion_folder, run_arguments

from vidprism_hf import VidPrismConfig
from vidprism_hf.cli import main
from vidprism_hf.evaluation.ablate import parts
from vidprism_hf.evaluation.ablation_grids import GRIDS, grid_rows
from vidprism_hf.training.module import check_config

RECIPE = yaml.safe_load((Path(__file__).parents[2] / "recipes/ablations/head.yaml").read_text())["model"]["config"]
KEPT = ("--model.freeze_backbone=true", "--data.train_views=1", "--data.val_fraction=0.5")


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
    assert sweep(tmp_path, grid=("interaction", "readout")) == 0
    assert "12 cells, 12 to train" in capsys.readouterr().out  # both grids have the recipe's own row
    rows = table(tmp_path)
    assert list(rows) == [(grid, row) for grid in ("interaction", "readout") for row in GRIDS[grid]]
    assert rows["interaction", "none"]["top1"] == rows["readout", "mean"]["top1"]
    assert {len(cell["right"]) for cell in cells(tmp_path)} == {4}
    before = {cell["key"]: cell["right"] for cell in cells(tmp_path)}

    file = tmp_path / "cells.jsonl"
    file.write_bytes(file.read_bytes()[:-10])  # killed while it wrote
    assert sweep(tmp_path, grid=("interaction", "readout")) == 0
    assert "12 cells, 1 to train" in capsys.readouterr().out
    lines = file.read_text().splitlines()
    again = [json.loads(line) for line in lines if line.endswith("}")]
    assert len(lines) == 13
    assert {cell["key"]: cell["right"] for cell in again} == before

    for other in ("--trainer.max_epochs=1", "--trainer.precision=bf16-mixed"):  # another training, other features
        assert sweep(tmp_path, other) == 0
        assert "8 cells, 8 to train" in capsys.readouterr().out


def test_baselines_and_the_sources_own_split(sweep, tmp_path):
    assert sweep(tmp_path, grid=("baselines",), folds=()) == 0
    rows = table(tmp_path)
    assert [row for _, row in rows] == list(GRIDS["baselines"])
    sizes = {row: int(values["parameters"]) for (_, row), values in rows.items()}
    assert sizes["linear probe on the mean frame"] == 2 * (64 + 1)
    assert len(cells(tmp_path)) == len(rows) - 2  # the model's defaults are the paper's head at the tower's width
    assert not (tmp_path / "folds").exists()


def test_a_folds_list_is_one_of_finetunes(sweep, source, tmp_path):
    assert sweep(tmp_path / "sweep", grid=("position",), folds=("--groups=^([0-9])",)) == 0
    listing = tmp_path / "sweep" / "folds" / "3.txt"
    assert listing.read_text() == "growing/3.mp4\nshrinking/3.mp4\n"
    run = run_arguments(source, tmp_path / "run", "--trainer.max_epochs=1", f"--data.val_list={listing}")
    assert main(run) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data.feature_cache=null",), "data.feature_cache: name a folder for the features"),
        (("--model.ema_decay=0.9",), "model.ema_decay: is nothing for an ablation"),
        (("--groups=^(.)",), "--folds, --groups: give one of them"),
        (("--folds=9",), "--folds 9: a class has 4 clips"),
        (("--seeds=0",), "--seeds 0: must be at least 1"),
        (("--data.shots=2",), "data.shots: is nothing for an ablation"),
        (("--trainer.limit_train_batches=1",), "trainer.limit_train_batches: is nothing for an ablation"),
    ],
)
def test_one_line_where_it_cannot_be(sweep, tmp_path, capsys, more, message):
    assert sweep(tmp_path, *more) == 1
    assert message in complaint(capsys)


def test_a_clip_that_cannot_be_decoded(tmp_path, capsys):
    clips = motion_folder(tmp_path / "clips", train=4, val=1) / "train"
    (clips / "growing" / "1.mp4").write_bytes(b"no video")
    settings = (*KEPT, f"--data.feature_cache={tmp_path / 'cache'}")
    assert main(["ablate", "--folds=2", *run_arguments(clips, tmp_path / "out", *settings)[1:]]) == 1
    assert "growing/1.mp4: cannot be decoded" in complaint(capsys)


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
