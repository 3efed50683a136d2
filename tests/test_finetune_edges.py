"""Runs off the usual path: no validation, another run's checkpoint, a model's own frame count."""

import pytest
import torch
from file_modes import modes, umask
from small import NUM_FRAMES, complaint, run_arguments, tiny_export

from vidprism_hf.cli import main

pytestmark = pytest.mark.slow


def test_a_run_without_validation_ends_with_its_last_checkpoint(motion_clips, tmp_path, capsys):
    more = ("--trainer.check_val_every_n_epoch=5", "--trainer.num_sanity_val_steps=0")
    assert main(run_arguments(motion_clips, tmp_path / "run", *more)) == 0
    assert "No epoch was validated" in capsys.readouterr().out
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_a_run_by_steps(motion_clips, tmp_path, capsys):
    assert main(run_arguments(motion_clips, tmp_path / "run", "--trainer.max_epochs=-1", "--trainer.max_steps=3")) == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert checkpoint["lr_schedulers"][0]["_last_lr"][0] == pytest.approx(0)  # the schedule has come to its end
    capsys.readouterr()
    assert main(run_arguments(motion_clips, tmp_path / "endless", "--trainer.max_epochs=-1")) == 1
    assert "set trainer.max_steps, too" in complaint(capsys)


def test_another_runs_checkpoint_is_refused(motion_clips, tmp_path, capsys):
    assert main(run_arguments(motion_clips, tmp_path / "one")) == 0
    last = tmp_path / "one" / "checkpoints" / "last.ckpt"
    assert main(run_arguments(motion_clips, tmp_path / "two", f"--resume={last}")) == 1
    assert "set output to the folder of its run" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def test_evaluate_takes_the_models_own_number_of_frames(motion_clips, tmp_path, capsys, monkeypatch):
    export = tiny_export(tmp_path / "export")
    seen = []
    forward = torch.nn.Module.__call__

    def spy(self, *args, **kwargs):
        if type(self).__name__ == "VidPrismForVideoClassification":
            seen.append(args[0].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", spy)
    settings = ["--data.source", str(motion_clips), "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    assert main(["evaluate", str(export), *settings]) == 0
    assert set(seen) == {NUM_FRAMES}


def test_callbacks_of_the_recipe_are_added(motion_clips, tmp_path, capsys):
    stop = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/nope", "--trust-recipe")
    assert main(run_arguments(motion_clips, tmp_path / "run", *stop, "--trainer.max_epochs=1")) == 1
    assert "Early stopping conditioned on metric `val/nope`" in complaint(capsys)


def test_a_long_warm_up_is_shortened_and_said(motion_clips, tmp_path):
    with pytest.warns(UserWarning, match="is the whole run"):
        assert main(run_arguments(motion_clips, tmp_path / "run", "--model.warmup_epochs=9")) == 0


@pytest.mark.slow
def test_the_files_of_a_run_have_the_modes_of_new_files(motion_clips, tmp_path):
    cache = f"--data.feature_cache={tmp_path / 'cache'}"
    cpu = ("--trainer.accelerator=cpu", "--data.num_workers=0")
    with umask(0o027):
        assert main(run_arguments(motion_clips, tmp_path / "run")) == 0
        assert (
            main(
                run_arguments(
                    motion_clips, tmp_path / "kept", "--model.freeze_backbone=true", "--data.train_views=2", cache
                )
            )
            == 0
        )
        assert main(["evaluate", str(tmp_path / "run" / "export"), f"--data.source={motion_clips}", *cpu]) == 0
    found = {path: mode for path, mode in modes(tmp_path).items() if path}
    assert any(path.endswith("last.ckpt") for path in found)
    assert any(path.startswith("cache/") for path in found)
    assert any(path.endswith("evaluation.json") for path in found)
    wrong = {path for path, mode in found.items() if mode != (0o750 if (tmp_path / path).is_dir() else 0o640)}
    assert wrong == set()
