"""Whole runs over folders with bad clips: they end, they say which clips, and their totals are honest."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small import motion_folder, run_arguments, tiny_export
from synthetic import trainer

from vidprism_cli import main
from vidprism_hf.data import ClipSampler

pytestmark = pytest.mark.slow
BAD_TRAIN, BAD_VAL = "train/growing/1.mp4", "val/shrinking/0.mp4"


@pytest.fixture
def source(tmp_path):
    """Eight training and four held-out clips, one of each split no video."""
    root = motion_folder(tmp_path / "clips")
    for name in (BAD_TRAIN, BAD_VAL):
        (root / name).write_bytes((root / name).read_bytes()[:200])
    return root


def listed(output: Path) -> list[list[str]]:
    with open(output / "bad_clips.csv", newline="") as file:
        return list(csv.reader(file))[1:]


def test_a_run_goes_on_and_lists_them(source, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(run_arguments(source, output, "--data.max_bad_fraction=0.2")) == 0
    printed = capsys.readouterr().out
    assert [row[:3] for row in listed(output)] == [["train", BAD_TRAIN, "growing"], ["val", BAD_VAL, "shrinking"]]
    # Once each, whatever the number of epochs.
    for name in (BAD_TRAIN, BAD_VAL):
        assert len(re.findall(rf"Bad clip .*: {re.escape(name)}: ", printed)) == 1
    assert "on 3 of 4 clips (1 undecodable)" in printed
    card = (output / "export" / "README.md").read_text()
    assert "| training clips | 7 of 8 (1 undecodable) |" in card
    assert "| held-out clips | 3 of 4 (1 undecodable) |" in card
    assert f"- val: {BAD_VAL}: " in card
    # The bad clip counts: of four clips at most three are right.
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["top1"] in (0.0, 0.25, 0.5, 0.75)
    assert metrics["clips"]["val"] == {"expected": 4, "missing": 0, "undecodable": 1, "evaluated": 4}


def test_too_many_stop_it_with_the_table(source, tmp_path, capsys):
    assert main(run_arguments(source, tmp_path / "run")) == 1
    said = capsys.readouterr()
    assert BAD_TRAIN in said.out  # the table
    (line,) = [line for line in said.err.splitlines() if line.startswith("vidprism finetune:")]
    assert re.search(r"1 of 8 training clips cannot be decoded, more than data\.max_bad_fraction=0\.01", line)
    assert not (tmp_path / "run" / "export").exists()


def test_evaluation_counts_them_as_wrong(source, tmp_path, capsys):
    export = tiny_export(tmp_path / "export")
    settings = ["--data.num_workers", "0", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert main(["evaluate", str(export), "--data.source", str(source), *settings]) == 0
    damaged = capsys.readouterr().out
    good = motion_folder(tmp_path / "good")
    assert main(["evaluate", str(export), "--data.source", str(good), *settings]) == 0
    whole = capsys.readouterr().out
    assert "on 3 of 4 held-out clips (1 undecodable)" in damaged
    assert "on 4 held-out clips" in whole
    assert BAD_VAL in damaged


def test_the_look_within_an_epoch_stops_it(source, tmp_path):
    """The first batch holds the bad clip or not; a run with a look at every step ends with the batch that does."""
    from vidprism_hf import VidPrismLightningModule
    from vidprism_hf.data import VideoDataModule
    from vidprism_hf.data.bad_videos import TooManyBadClips
    from vidprism_hf.training.callbacks.bad_videos import BadClipReport

    data = VideoDataModule(str(source), processor="tiny", num_frames=8, batch_size=1, num_workers=0)
    model = VidPrismLightningModule(backbone="tiny", id2label=data.id2label, num_frames=8)
    report = BadClipReport(tmp_path, interval=1)
    fit = trainer(tmp_path, callbacks=[report], num_sanity_val_steps=0)
    with pytest.raises(TooManyBadClips, match="1 of 8 training clips"):
        fit.fit(model, datamodule=data)
    sampler = data.train_dataloader().sampler
    place = [data.train_table.name(index) for _, index in sampler].index(BAD_TRAIN)
    assert fit.global_step == place + 1
    assert listed(tmp_path) == [["train", BAD_TRAIN, "growing", listed(tmp_path)[0][3]]]


def test_a_mended_clip_lets_a_stopped_run_go_on(source, tmp_path):
    arguments = run_arguments(source, tmp_path / "run")
    assert main(arguments) == 1
    shutil.copy(source / "train/growing/0.mp4", source / BAD_TRAIN)
    assert main([*arguments, f"--resume={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"]) == 0


@pytest.mark.parametrize("name", ["odd\udce9\t`name`.mp4"])
def test_names_that_are_no_text(source, tmp_path, name):
    for folder in ("train/growing", "val/growing"):
        (source / folder / name).write_bytes(b"no video")
    assert main(run_arguments(source, tmp_path / "run", "--data.max_bad_fraction=0.5")) == 0
    assert "odd" in (tmp_path / "run" / "export" / "README.md").read_text()


@pytest.mark.timeout(600)
def test_two_processes_of_which_one_meets_bad_clips(tmp_path):
    """All bad clips fall to the second process; neither raises nor waits alone."""
    root = motion_folder(tmp_path / "clips", train=8)
    names = sorted(str(path.relative_to(root)) for path in (root / "train").glob("*/*.mp4"))
    sampler = ClipSampler(len(names), training=True)
    # Every other clip of the order is the second process's.
    bad = {names[index] for _, index in list(sampler)[1::2][:6]}
    for name in bad:
        (root / name).write_text("no video")
    (root / "val" / "growing" / "0.mp4").write_bytes(b"")
    for fraction, status in ((0.5, 0), (0.2, 1)):
        output = tmp_path / f"run{status}"
        more = ("--trainer.devices=2", "--trainer.strategy=ddp", f"--data.max_bad_fraction={fraction}")
        # One epoch: in the next one the order gives other clips to each.
        arguments = run_arguments(root, output, *more, "--trainer.max_epochs=1")
        finished = subprocess.run(
            [sys.executable, "-m", "vidprism_hf", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=280,
            cwd=Path(__file__).parents[2],
        )
        assert finished.returncode == status, finished.stderr[-3000:]
        # What the second process met is in the first one's list.
        assert {row[1] for row in listed(output) if row[0] == "train"} == bad
        if status == 0:
            assert "val/growing/0.mp4" in {row[1] for row in listed(output)}
            assert "3 of 4 clips (1 undecodable)" in finished.stdout
        else:
            assert "6 of 16 training clips cannot be decoded" in finished.stderr
