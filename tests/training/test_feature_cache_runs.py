"""Runs with a feature cache: the same numbers, without a look at the videos, and one line where it cannot be."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors import safe_open
from same_runs import assert_same_runs, checkpoint
from small import complaint, motion_folder, run_arguments

from vidprism_hf import VidPrismLightningModule
from vidprism_hf.cli import main
from vidprism_hf.data import VideoDataModule
from vidprism_hf.errors import UserError
from vidprism_hf.model.modeling_vidprism import VidPrismForVideoClassification, VidPrismVisionTower

ROOT = Path(__file__).parents[2]
FROZEN = ("--model.freeze_backbone=true", "--data.train_views=2", "--trainer.max_epochs=3")


@pytest.fixture
def source(tmp_path):
    """Eight training and four held-out clips."""
    return motion_folder(tmp_path / "clips")


@pytest.fixture
def tower_clips(monkeypatch):
    """The number of clips that went through the tower, call by call."""
    seen = []
    forward = VidPrismVisionTower.forward

    def counted(self, pixel_values_videos):
        if not pixel_values_videos.is_meta:  # the card's count of multiply-adds
            seen.append(len(pixel_values_videos))
        return forward(self, pixel_values_videos)

    monkeypatch.setattr(VidPrismVisionTower, "forward", counted)
    return seen


@pytest.fixture
def no_videos(monkeypatch):
    """From when it is called, clips can no longer be decoded."""

    def call(*args, **kwargs):
        raise AssertionError("a video was decoded")

    return lambda: monkeypatch.setattr("vidprism_hf.data.dataset.decode_video", call)


def losses(output: Path) -> list[list[str]]:
    """Losses and accuracies, line by line."""
    (file,) = (output / "logs" / "csv").glob("metrics.csv")
    with open(file, newline="") as lines:
        return [
            [f"{name}={value}" for name, value in row.items() if "/" in name and value] for row in csv.DictReader(lines)
        ]


def state(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_the_numbers_are_those_of_a_run_without_it(source, tmp_path, tower_clips, no_videos, precision):
    # Every step is logged; the batch is the whole split, so that the tower rounds alike.
    settings = (*FROZEN, f"--trainer.precision={precision}", "--trainer.log_every_n_steps=1", "--data.batch_size=8")
    cache = f"--data.feature_cache={tmp_path / 'cache'}"
    assert main(run_arguments(source, tmp_path / "without", *settings)) == 0
    tower_clips.clear()
    assert main(run_arguments(source, tmp_path / "filling", *settings, cache)) == 0
    # Eight clips in two views, four held-out ones, and a clip of zeros for each.
    assert sum(tower_clips) == 2 * 8 + 4 + 2
    no_videos()
    tower_clips.clear()
    assert main(run_arguments(source, tmp_path / "reading", *settings, cache)) == 0
    assert tower_clips == []
    for name in ("filling", "reading"):
        assert losses(tmp_path / name) == losses(tmp_path / "without")
        metrics = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in (name, "without")]
        assert metrics[0] == metrics[1]
        for one, two in zip(state(tmp_path / name).values(), state(tmp_path / "without").values(), strict=True):
            assert torch.equal(one, two)


def test_logits_of_an_evaluation_in_several_views(source, tmp_path, monkeypatch, no_videos):
    """Of an exported model, whose tower is the run's; a bad clip among them."""
    (source / "val" / "growing" / "1.mp4").write_bytes(b"no video")
    settings = (*FROZEN, "--trainer.max_epochs=1", "--data.test_clips=2", "--data.test_crops=3")
    cache = f"--data.feature_cache={tmp_path / 'cache'}"
    assert main(run_arguments(source, tmp_path / "run", *settings, cache)) == 0
    forward, logits = VidPrismForVideoClassification.forward, []

    def recorded(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if not output.logits.is_meta:  # where its cost is counted
            logits[-1].append(output.logits)
        return output

    monkeypatch.setattr(VidPrismForVideoClassification, "forward", recorded)
    evaluate = ["evaluate", str(tmp_path / "run" / "export"), "--config", str(tmp_path / "run" / "config.yaml")]
    for more in (["--data.feature_cache=null"], []):
        logits.append([])
        assert main([*evaluate, *more]) == 0
        (source / "val" / "growing" / "1.mp4").touch()
    assert len(logits[0]) == len(logits[1]) > 1
    assert all(torch.equal(one, two) for one, two in zip(*logits, strict=True))


def test_without_augmentation_a_clip_goes_through_the_tower_once(source, tmp_path, tower_clips):
    settings = ("--model.freeze_backbone=true", "--data.augment=false", "--data.batch_size=8")
    cache = f"--data.feature_cache={tmp_path / 'cache'}"
    assert main(run_arguments(source, tmp_path / "without", *settings)) == 0
    tower_clips.clear()
    assert main(run_arguments(source, tmp_path / "with", *settings, cache)) == 0
    assert sum(tower_clips) == 8 + 4 + 2  # and a clip of zeros for each part
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    tower_clips.clear()
    # What was trained on may be held out: the features are the same.
    (source / "val").rename(tmp_path / "val")
    (source / "train").rename(source / "val")
    (tmp_path / "val").rename(source / "train")
    assert main(run_arguments(source, tmp_path / "other way round", *settings, cache)) == 0
    assert tower_clips == []


def test_bad_clips_are_counted_and_listed_as_without_it(source, tmp_path, capsys):
    for name in ("train/growing/1.mp4", "val/shrinking/0.mp4"):
        (source / name).write_bytes(b"no video")
    settings = (*FROZEN, "--data.max_bad_fraction=0.2")
    printed = []
    for name, more in (("without", ()), ("with", (f"--data.feature_cache={tmp_path / 'cache'}",))):
        assert main(run_arguments(source, tmp_path / name, *settings, *more)) == 0
        printed.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("Bad clip")])
    assert sorted(printed[0]) == sorted(printed[1])
    assert len(printed[0]) == 2
    for file in ("bad_clips.csv", "metrics.json"):
        assert (tmp_path / "with" / file).read_text() == (tmp_path / "without" / file).read_text()
    assert main(run_arguments(source, tmp_path / "strict", *FROZEN, f"--data.feature_cache={tmp_path / 'cache'}")) == 1
    assert "1 of 8 training clips cannot be decoded" in complaint(capsys)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--data.train_views=2",), "data.feature_cache: a tower that learns has no features to keep"),
        (("--model.freeze_backbone=true",), "data.feature_cache: needs data.train_views"),
        ((*FROZEN, "--data.feature_cache_limit=10KB"), "data.feature_cache_limit=10KB: too little for train 8 clips"),
    ],
)
def test_one_line_where_it_cannot_be(motion_clips, tmp_path, capsys, settings, message):
    cache = f"--data.feature_cache={tmp_path / 'cache'}"
    assert main(run_arguments(motion_clips, tmp_path / "run", cache, *settings)) == 1
    assert message in complaint(capsys)


def test_it_needs_a_trainer(motion_clips, tmp_path):
    data = VideoDataModule(str(motion_clips), processor="tiny", train_views=1, feature_cache=str(tmp_path))
    with pytest.raises(ValueError, match="needs the tower"):
        data.train_dataloader()


def test_a_tower_that_is_unfrozen_on_the_way_ends_the_run(motion_clips, tmp_path):
    class Unfreeze(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.model.vidprism.vision_tower.requires_grad_(trainer.current_epoch == 1)

    settings = {"feature_cache": str(tmp_path / "cache"), "train_views": 1, "processor": "tiny", "num_workers": 0}
    data = VideoDataModule(str(motion_clips), num_frames=8, batch_size=4, **settings)
    labels = {0: "growing", 1: "shrinking"}
    module = VidPrismLightningModule(id2label=labels, backbone="tiny", num_frames=8, freeze_backbone=True)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=[Unfreeze()], **quiet)
    with pytest.raises(UserError, match=r"data.feature_cache: a tower that learns has no features to keep"):
        trainer.fit(module, data)
    assert trainer.current_epoch == 1


def test_views_repeat_after_their_number(motion_clips):
    data = VideoDataModule(str(motion_clips), processor="tiny", num_frames=8, train_views=2, num_workers=0)
    data.setup("fit")
    clips = data.train_dataloader().dataset
    pixels = [clips[epoch, 0]["pixel_values_videos"] for epoch in range(4)]
    assert torch.equal(pixels[0], pixels[2])
    assert torch.equal(pixels[1], pixels[3])
    assert not torch.equal(pixels[0], pixels[1])


@pytest.mark.slow
def test_a_run_that_is_stopped_within_an_epoch_goes_on_bit_for_bit(source, tmp_path, monkeypatch):
    """With dropout, an average of the weights, and gradients that add up."""
    settings = ("--model.freeze_backbone=true", "--data.train_views=2", f"--data.feature_cache={tmp_path / 'cache'}")
    settings += ("--data.batch_size=1", "--trainer.accumulate_grad_batches=2", "--trainer.log_every_n_steps=1")
    settings += ("--model.config.head_dropout=0.5", "--model.ema_decay=0.9")
    assert main(run_arguments(source, tmp_path / "whole", *settings)) == 0
    step = VidPrismLightningModule.training_step

    def stopped(module, batch, batch_idx):
        if (module.current_epoch, batch_idx) == (1, 2):
            signal.raise_signal(signal.SIGTERM)
        return step(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(VidPrismLightningModule, "training_step", stopped)
        with pytest.raises(SystemExit):
            main(run_arguments(source, tmp_path / "stopped", *settings))
    assert checkpoint(tmp_path / "stopped")["VideoDataModule"]["batches"] == 4
    assert main(run_arguments(source, tmp_path / "stopped", *settings)) == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "stopped")


def test_a_callback_may_end_the_run_between_shards(source, tmp_path, monkeypatch):
    monkeypatch.setattr("vidprism_hf.data.feature_cache.SHARD_SECONDS", 0.0)

    class Ends(L.Callback):
        calls = 0

        def between_shards(self):
            self.calls += 1
            if self.calls == 3:
                raise SystemExit(138)

    ends = Ends()
    cache = {"train_views": 2, "feature_cache": str(tmp_path / "cache")}
    data = VideoDataModule(str(source), processor="tiny", num_frames=8, batch_size=4, num_workers=0, **cache)
    module = VidPrismLightningModule("tiny", id2label=data.id2label, num_frames=8, freeze_backbone=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[ends], default_root_dir=tmp_path, **quiet)
    with pytest.raises(SystemExit) as ended:
        trainer.fit(module, datamodule=data)
    assert ended.value.code == 138
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == ends.calls == 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_fill_it_together(source, tmp_path, no_videos):
    cache = f"--data.feature_cache={tmp_path / 'cache'}"
    more = (*FROZEN, cache, "--trainer.devices=2", "--trainer.strategy=ddp")
    (source / "train" / "growing" / "1.mp4").write_bytes(b"no video")
    finished = subprocess.run(
        [sys.executable, "-m", "vidprism_hf.cli", *run_arguments(source, tmp_path / "two", *more)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
    )
    assert finished.returncode == 1
    assert "1 of 8 training clips cannot be decoded" in finished.stderr
    keys = []
    for shard in (tmp_path / "cache").rglob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            keys += file.metadata()["keys"].split()
    # Seven clips in two views, four held-out ones, and a clip of zeros for each; none twice.
    assert len(keys) == 2 * 7 + 4 + 2
    assert len(set(keys)) == len(keys) - 1
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4
    (source / "train" / "growing" / "1.mp4").unlink()
    no_videos()
    assert main(run_arguments(source, tmp_path / "one", *FROZEN, cache)) == 0


def test_one_variable_of_make_does_it():
    settings = ["DATASET=hmdb51", "FEATURES=some where", "VIEWS=2"]
    printed = subprocess.run(["make", "-n", "fewshot", *settings], cwd=ROOT, capture_output=True, text=True).stdout
    for option in ('--data.feature_cache "some where"', "--model.freeze_backbone true", '--data.train_views "2"'):
        assert option in printed
    printed = subprocess.run(["make", "-n", "fewshot", settings[0]], cwd=ROOT, capture_output=True, text=True).stdout
    assert "splits" in printed
    assert "feature_cache" not in printed


@pytest.mark.parametrize(("variable", "option"), [("VIEWS=2", "data.train_views 2"), ("K=2", "data.shots 2")])
def test_a_variable_that_would_do_nothing_is_refused(variable, option):
    finished = subprocess.run(["make", "-n", "finetune", variable], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    assert f'ARGS="--{option}"' in finished.stderr
