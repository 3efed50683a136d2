"""Settings of the trainer and of the module that no run can have: one line, before the run's folder is made."""

import shutil

import pytest
from small import complaint, run_arguments

from vidprism_hf.cli import main
from vidprism_hf.evaluation.intervals import wilson_interval
from vidprism_hf.training.finetune import FEW_CLIPS


def callback(name: str, **settings) -> list[str]:
    """The command line's words for a callback."""
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{key}={value}" for key, value in settings.items())]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.fast_dev_run=true"], "trainer.fast_dev_run=True: it keeps no checkpoints; for a trial set"),
        (["--trainer.fast_dev_run=3"], "trainer.fast_dev_run=3: it keeps no checkpoints"),
        (["--trainer.enable_checkpointing=false"], "trainer.enable_checkpointing=False: a run keeps checkpoints"),
        (["--trainer.barebones=true"], "barebones"),
        (["--trainer.limit_train_batches=0"], "trainer.limit_train_batches=0: nothing would be trained"),
        (["--trainer.val_check_interval=0"], "trainer.val_check_interval=0"),
        (["--trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch=0: must be at least 1"),
        (["--trainer.num_sanity_val_steps=-2"], "trainer.num_sanity_val_steps=-2: must be at least -1"),
        (["--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val=-1: must be at least 0"),
        (["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0: must be at least 1"),
        (["--trainer.log_every_n_steps=-1"], "trainer.log_every_n_steps=-1"),
        (["--trainer.max_epochs=0"], "trainer.max_epochs=0: nothing would be trained"),
        (["--model.learning_rate=-1"], "model.learning_rate=-1.0: must be a number of at least 0"),
        (["--model.learning_rate=.nan"], "model.learning_rate=nan"),
        (["--model.weight_decay=-0.1"], "model.weight_decay=-0.1"),
        (["--model.warmup_epochs=-1"], "model.warmup_epochs=-1.0"),
        (["--model.backbone_lr_scale=.inf"], "model.backbone_lr_scale=inf"),
        (["--model.freeze_layers=-1"], "model.freeze_layers=-1"),
        (["--data.mixup_alpha=.inf"], "data.mixup_alpha=inf"),
        (["--data.clip_time_limit=.nan"], "data.clip_time_limit=nan"),
        (["--checkpoint.every_minutes=.nan"], "checkpoint.every_minutes=nan"),
        (["--export.max_shard_size=large"], "export.max_shard_size=large: is no size"),
        (["--seed_everything=-1"], "seed_everything=-1: must be from 0"),
        (
            callback("EarlyStopping", monitor="val/nope"),
            "EarlyStopping's monitor=val/nope: no such metric; there are val/top1",
        ),
        (callback("EarlyStopping", monitor="val/top5"), "EarlyStopping's monitor=val/top5: no such metric"),
        (callback("EarlyStopping", monitor="val/top1", mode="up"), "trainer: `mode` can be min, max, got up"),
        (callback("ModelCheckpoint", monitor="top1"), "ModelCheckpoint's monitor=top1: no such metric"),
        (
            callback("vidprism_hf.training.push_callback.PushToHub", repo="a/b", monitor="top1"),
            "PushToHub's monitor=top1: no such metric",
        ),
        (callback("StochasticWeightAveraging", swa_lrs=0.1), "StochasticWeightAveraging does not go with a run: "),
        (callback("ModelPruning", pruning_fn="l1_unstructured"), "ModelPruning does not go with a run: "),
        (callback("ModelPruning", pruning_fn="nope"), "trainer: The provided `pruning_fn` nope isn't available"),
        (callback("BackboneFinetuning"), "BackboneFinetuning does not go with a run: set model.freeze_layers"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_no_run_can_have_is_one_line_before_its_folder_is_made(motion_clips, tmp_path, capsys, words, said):
    assert main(run_arguments(motion_clips, tmp_path / "run", *words)) == 1
    assert said in complaint(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.val_check_interval=100"], "trainer: `val_check_interval` (100) must be less than"),
        (["--trainer.limit_train_batches=0.01"], "trainer: You requested to check 0.01 of the `train_dataloader`"),
        ([*callback("EarlyStopping", monitor="val/nope"), "--trust-recipe"], "trainer: Early stopping conditioned on"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_lightning_finds_as_it_runs_is_one_line(motion_clips, tmp_path, capsys, words, said):
    assert main(run_arguments(motion_clips, tmp_path / "run", *words)) == 1
    assert said in complaint(capsys)


@pytest.mark.slow
def test_a_run_on_few_clips_ends_with_a_caution(motion_clips, tmp_path, capsys):
    assert main(run_arguments(motion_clips, tmp_path / "run", "--trainer.max_epochs=1")) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Held-out top-1"))
    assert " on 4 clips (caution: so few say little, the 95 % interval is 0." in line


def test_few_clips_are_those_with_a_wide_interval():
    low, high = wilson_interval(0.5, FEW_CLIPS)
    assert 0.25 < high - low <= 0.3


@pytest.mark.slow
def test_the_checkpoint_of_another_run_is_refused(motion_clips, tmp_path, capsys):
    for name, epochs in (("one", 1), ("two", 2)):
        assert main(run_arguments(motion_clips, tmp_path / name, f"--trainer.max_epochs={epochs}")) == 0
    two = tmp_path / "two"
    (two / "metrics.json").unlink()  # as if it had been stopped
    own = (two / "checkpoints" / "last.ckpt").read_bytes()
    shutil.copy(tmp_path / "one" / "checkpoints" / "last.ckpt", two / "checkpoints")
    capsys.readouterr()
    again = run_arguments(motion_clips, two, "--trainer.max_epochs=2")
    for words in (again, [*again, f"--resume={two / 'checkpoints' / 'last.ckpt'}"]):
        assert main(words) == 1
        assert "last.ckpt: is of another run than" in complaint(capsys)
    (two / "checkpoints" / "last.ckpt").write_bytes(own)
    moved = two.rename(tmp_path / "moved")
    assert main(run_arguments(motion_clips, moved, "--trainer.max_epochs=2")) == 0
    assert "Going on with the run" in capsys.readouterr().out
