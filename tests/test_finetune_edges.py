"""Runs off the usual path: no validation, another run's checkpoint, several processes, a model's own frame count."""

import json
import re
import subprocess
import sys

import pytest
import torch
from small import LABELS, NUM_FRAMES, run_arguments, tiny_export

from vidprism_hf.cli import main

pytestmark = pytest.mark.slow


def test_a_run_without_validation_ends_with_its_last_checkpoint(motion_clips, tmp_path, capsys):
    more = ("--trainer.check_val_every_n_epoch=5", "--trainer.num_sanity_val_steps=0")
    assert main(run_arguments(motion_clips, tmp_path / "run", *more)) == 0
    assert "No epoch was validated" in capsys.readouterr().out
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


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


def test_callbacks_of_the_recipe_are_added(motion_clips, tmp_path):
    stop = "--trainer.callbacks+=EarlyStopping"
    more = (stop, "--trainer.callbacks.monitor=val/nope", "--trainer.max_epochs=1")
    with pytest.raises(RuntimeError, match="val/nope"):
        main(run_arguments(motion_clips, tmp_path / "run", *more))


def test_a_long_warm_up_is_shortened_and_said(motion_clips, tmp_path):
    with pytest.warns(UserWarning, match="is the whole run"):
        assert main(run_arguments(motion_clips, tmp_path / "run", "--model.warmup_epochs=9")) == 0


def test_two_processes_give_what_one_gives(motion_clips, tmp_path):
    """DDP on the CPU: the gate loss is that of the whole batch, every held-out clip counts once."""
    results = []
    for devices, batch in ((1, 4), (2, 2)):
        output = tmp_path / str(devices)
        more = (
            f"--trainer.devices={devices}",
            f"--trainer.strategy={'ddp' if devices > 1 else 'auto'}",
            f"--data.batch_size={batch}",
            "--model.config.gate_loss_weight=5.0",
            # No stream of a single frame: its attention has no gradient but rounding, as key biases, which Adam
            # takes to its own scale.
            "--model.config.rates=[2,4]",
            "--trainer.max_epochs=1",
        )
        command = [sys.executable, "-m", "vidprism_hf.cli", *run_arguments(motion_clips, output, *more)]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert finished.returncode == 0, finished.stderr[-3000:]
        count = len(LABELS) * 2
        assert re.search(rf"Held-out top-1 \S+ on {count} clips", finished.stdout)
        state = torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        results.append((json.loads((output / "metrics.json").read_text()), state))
    (one, weights), (two, other) = results
    assert one.pop("clips") == two.pop("clips")
    assert one == pytest.approx(two)
    for name, value in weights.items():
        if name.endswith(("k_proj.bias", "qkv.bias", "key_value_proj.bias")):
            continue
        torch.testing.assert_close(
            value, other[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name} {text}"
        )
