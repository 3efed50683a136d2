"""The README's promises: its commands run as written, in order, in a copy of the tree, and do what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from small import motion_folder

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(command, folder):
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_runs_as_written(clone):
    outputs = {}
    for language, block in BLOCKS:
        commands = [["bash", "-c", line] for line in block.splitlines()] if language == "bash" else [None]
        for command in commands:
            if command == ["bash", "-c", "make test"]:
                continue  # this very test
            finished = run(command or [sys.executable, "-c", block], clone)
            text = block if command is None else command[-1]
            assert finished.returncode == 0, f"{text}\n{finished.stdout}\n{finished.stderr[-3000:]}"
            outputs[text] = finished.stdout
    trained = re.search(r"Held-out top-1 (\S+) on", outputs["make finetune"])
    assert float(trained[1]) >= 0.9
    evaluated = next(text for command, text in outputs.items() if " evaluate " in command)
    assert re.search(r"top1\s+(\S+)", evaluated)[1] == trained[1]
    assert "moving_left" in next(text for command, text in outputs.items() if " predict " in command)
    assert any("expert weights" in text for text in outputs.values())


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


def test_files_it_names_exist():
    assert "@@" not in README  # a place that was to be filled with printed output
    for name in re.findall(r"`((?:vidprism_hf|tests|recipes)/[\w/.]*)`", README):
        assert (ROOT / name).exists(), name
