"""The recipes of the benchmarks, run by the Makefile as a user does, on toy copies in the layouts of the true ones."""

import json
import re
import subprocess

import pytest
from benchmark_layouts import REPOSITORIES, local_copy, published
from hub_server import Hub

from vidprism_hf import VidPrismForVideoClassification
from vidprism_hf.data.sources.benchmarks import BENCHMARKS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# What a true run does not set: toy counts, two CPU cores, and an end after a few steps.
TOY = (
    "--data.verify_counts false --data.num_workers 1 --data.batch_size 2 --trainer.precision 32 "
    "--trainer.accelerator cpu --trainer.devices 1 --trainer.max_steps 2 --trainer.num_sanity_val_steps 0"
)


def make(clone, *words, env=None):
    finished = subprocess.run(["make", *words], cwd=clone, capture_output=True, text=True, timeout=800, env=env)
    assert finished.returncode == 0, f"{finished.stdout[-2000:]}\n{finished.stderr[-3000:]}"
    return finished.stdout


@pytest.mark.parametrize(("name", "frames"), [("hmdb51", 8), ("k400", 32), ("ssv2", 8)])
def test_a_local_copy(clone, tmp_path, name, frames):
    local_copy(name, tmp_path / "data", train=2, val=1)
    variables = [f"DATASET={name}", f"DATA_ROOT={tmp_path / 'data'}", "BACKBONE=tiny", f"FRAMES={frames}"]
    printed = make(clone, "finetune", *variables, f"OUT={tmp_path / 'run'}", f"ARGS={TOY}")
    assert re.search(r"Held-out top-1 \S+ on 2 clips", printed)
    model = VidPrismForVideoClassification.from_pretrained(tmp_path / "run" / "export")
    assert (model.config.num_labels, model.config.num_frames) == (2, frames)
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert f"| dataset | {BENCHMARKS[name].title} |" in card
    assert f"{frames} frames x {'3 crops x 4 clips' if name == 'k400' else '1 crop x 1 clip'}" in card


def test_one_that_is_fetched_from_the_hub(clone, tmp_path):
    with Hub() as hub:
        hub.add_dataset(REPOSITORIES["ucf101"], published("ucf101", tmp_path / "published", train=2, val=1))
        variables = ["DATASET=ucf101", f"DATA_ROOT={tmp_path / 'data'}", "BACKBONE=tiny", "FRAMES=8"]
        env = hub.environment(tmp_path / "home")
        printed = make(clone, "finetune", *variables, f"OUT={tmp_path / 'run'}", f"ARGS={TOY}", env=env)
        assert re.search(r"Held-out top-1 \S+ on 2 clips", printed)
        asked = len(hub.requests)
        # What is there is not fetched again.
        make(clone, "finetune", *variables, f"OUT={tmp_path / 'again'}", f"ARGS={TOY}", env=env)
        assert len(hub.requests) == asked
    assert (tmp_path / "data" / "ucf101" / "manifest.json").is_file()


def test_few_shot_over_splits(clone, tmp_path):
    local_copy("hmdb51", tmp_path / "data", train=3, val=1)
    variables = ["DATASET=hmdb51", "K=2", "SPLITS=1 2", f"DATA_ROOT={tmp_path / 'data'}", "BACKBONE=tiny", "FRAMES=8"]
    printed = make(clone, "fewshot", *variables, f"OUT={tmp_path / 'run'}", f"ARGS={TOY}")
    summary = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert list(summary["splits"]) == ["1", "2"]
    top1 = [metrics["top1"] for metrics in summary["splits"].values()]
    assert summary["mean"]["top1"] == pytest.approx(sum(top1) / 2)
    assert "mean" in printed
    assert summary["splits"]["1"]["clips"]["val"] == {"expected": 2, "missing": 0, "undecodable": 0, "evaluated": 2}
    for split in (1, 2):
        run = tmp_path / "run" / f"split{split}"
        names = (run / "train_clips.txt").read_text().splitlines()
        assert len(names) == 4  # two of each of two classes
        card = (run / "export" / "README.md").read_text()
        assert f"official split {split}; 2 training clips a class" in card
        assert "sha256 of the training list" in card
