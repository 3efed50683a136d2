"""The README's promises: its commands run as written, in order, in a copy of the tree, and do what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub
from small import LABELS, motion_folder

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(command, folder, env=None):
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_runs_as_written(clone, tmp_path):
    outputs = {}
    with Hub() as hub:
        env = hub.environment(tmp_path / "home", hub.user("alice", orgs={"org": "write"}))
        for language, block in BLOCKS:
            for command in block.splitlines() if language == "bash" else [block]:
                if command == "make test":
                    continue  # this very test
                finished = run([*(["bash"] if language == "bash" else [sys.executable]), "-c", command], clone, env)
                assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr[-3000:]}"
                outputs[command] = finished.stdout
        last = outputs["make push REPO=org/vidprism-demo"].splitlines()[-1]
        commit = hub.repositories["model", "org/vidprism-demo"].commit("main").oid
        assert last == f"{hub.url}/org/vidprism-demo {commit}"
    trained = re.search(r"Held-out top-1 (\S+) on", outputs["make finetune"])
    assert float(trained[1]) >= 0.9
    evaluated = next(text for command, text in outputs.items() if " evaluate " in command)
    assert re.search(r"top1\s+(\S+)", evaluated)[1] == trained[1]
    assert "moving_left" in next(text for command, text in outputs.items() if " predict " in command)
    assert any("expert weights" in text for text in outputs.values())
    by_stranger = next(text for command, text in outputs.items() if '"org/vidprism-demo", trust_remote' in command)
    assert "'label': 'shrinking'" in by_stranger


@pytest.mark.slow
def test_make_prints_help_and_installs_nothing_twice(clone):
    text = run(["make"], clone).stdout
    for target in ("setup", "finetune", "test", "lint"):
        assert re.search(rf"^  {target} ", text, re.MULTILINE)
    assert "pip install" not in run(["make", "-n", "setup"], clone).stdout


@pytest.mark.slow
def test_own_clips_train_by_the_same_word(clone, tmp_path):
    source = motion_folder(tmp_path / "my clips")
    variables = [f"DATASET={source}", "BACKBONE=tiny", "EPOCHS=1", f"OUT={tmp_path / 'run'}", "DEVICES=1"]
    finished = run(["make", "finetune", *variables, "ARGS=--model.num_frames 8 --trainer.accelerator cpu"], clone)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def dataset_of(clips: Path, folder: Path) -> Path:
    """A dataset repository's files: parquet with embedded videos."""
    from datasets import ClassLabel, Dataset, Features, Video

    features = Features({"video": Video(decode=False), "label": ClassLabel(names=list(LABELS))})
    for split, name in (("train", "train"), ("val", "validation")):
        rows = [
            {"video": {"bytes": path.read_bytes(), "path": path.name}, "label": LABELS.index(path.parent.name)}
            for path in sorted((clips / split).rglob("*.mp4"))
        ]
        Dataset.from_list(rows, features=features).to_parquet(folder / "data" / f"{name}.parquet")
    return folder


@pytest.mark.slow
def test_a_dataset_of_the_hub_trains_and_its_model_is_pushed_by_one_word_each(clone, motion_clips, tmp_path):
    output = tmp_path / "run"
    with Hub() as hub:
        hub.add_dataset("org/motions", dataset_of(motion_clips, tmp_path / "dataset"))
        env = hub.environment(tmp_path / "home", hub.user("alice"))
        named = ["DATASET=org/motions", f"OUT={output}"]
        variables = [f"DATA_ROOT={tmp_path / 'data'}", "BACKBONE=tiny", "FRAMES=8", "EPOCHS=1", "DEVICES=1"]
        refused = run(["make", "push", *named, "REPO=alice/motions"], clone, env)
        assert refused.returncode == 2
        assert f"{output}/export is not there" in refused.stderr
        trained = run(["make", "finetune", *named, *variables, "ARGS=--trainer.accelerator cpu"], clone, env)
        assert trained.returncode == 0, trained.stderr[-3000:]
        assert "Held-out top-1 " in trained.stdout
        # The same variables name what is pushed.
        pushed = run(["make", "push", *named, "REPO=alice/motions", "ARGS=--dry-run"], clone, env)
        assert pushed.returncode == 0, pushed.stderr[-3000:]
        assert hub.repositories.keys() == {("dataset", "org/motions")}
    size = (output / "export" / "model.safetensors").stat().st_size
    assert re.search(rf"^new +{size:,} bytes  model\.safetensors$", pushed.stdout, re.MULTILINE)
    assert "- org/motions\n" in pushed.stdout  # the card, whose metadata names the dataset
    assert pushed.stdout.splitlines()[-1].startswith(f"{hub.url}/alice/motions ")


def test_files_it_names_exist():
    assert "@@" not in README  # a place that was to be filled with printed output
    for name in re.findall(r"`((?:vidprism_hf|tests|recipes)/[\w/.]*)`", README):
        assert (ROOT / name).exists(), name
