"""What a run writes with its weights: cards that say what was measured of which weights, and a recipe for others."""

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from lightning.pytorch.strategies import SingleDeviceStrategy
from small import complaint, run_arguments

from vidprism_cli import main
from vidprism_hf import VidPrismLightningModule
from vidprism_hf.training.exporting import portable


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("/home/me/clips", "clips"),
        ("~/clips", "clips"),
        ("~me/deep/clips/", "clips"),
        ("C:\\Users\\me\\clips", "clips"),
        ("d:/clips/few", "few"),
        (r"\\server\share\me\clips", "clips"),
        (["/home/me/a.mp4", "b.mp4"], ["a.mp4", "b.mp4"]),
        ("runs/demo", "runs/demo"),
        ("org/name", "org/name"),
        ("C:no", "C:no"),
        ("", ""),
        (0.5, 0.5),
        (None, None),
        (True, True),
    ],
)
def test_paths_of_this_machine_keep_their_last_part(value, kept):
    assert portable({"a": {"b": value}}) == {"a": {"b": kept}}


def test_a_pattern_is_no_path():
    assert portable({"val_pattern": "/eli_"}) == {"val_pattern": "/eli_"}


@pytest.mark.parametrize(
    "name", ["token", "hf_token", "password", "client_secret", "api_key", "apikey", "WANDB_API_KEY", "credentials"]
)
def test_secrets_are_left_out(name):
    assert portable({name: "x"}) == {name: None}
    assert portable({name: {"user": "me", "keys": ["x"], "tries": 3}}) == {
        name: {"user": None, "keys": [None], "tries": 3}
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"num_tokens": 5, "token": 3, "password": None, "secret": True},
        {"tokenizer": "bpe", "max_tokens": "auto", "keys": "all", "key_frames": "first", "monitor": "val/top1"},
    ],
)
def test_what_is_no_secret_stays(settings):
    assert portable(settings) == settings


@pytest.mark.parametrize(
    "value", ["hf_" + "a" * 30, "https://me:word@example.org/x", "https://key@example.org/x", "--token=hf_" + "B" * 34]
)
def test_secrets_in_other_settings_are_left_out(value):
    assert portable({"args": [value, "x"]}) == {"args": [None, "x"]}
    assert portable({"url": "https://example.org/me@home:1"}) == {"url": "https://example.org/me@home:1"}


def evaluation(folder: Path) -> str:
    """The words of a card on how its weights were measured."""
    return re.search(r"## Evaluation\n\n(.*?)\n\n", (folder / "README.md").read_text())[1]


@pytest.mark.slow
def test_cards_of_a_run_and_of_its_resumption(motion_clips, tmp_path):
    """Four steps an epoch, a validation every other epoch, and half of the held-out clips."""
    limits = ("--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1", "--trainer.check_val_every_n_epoch=2")
    export = ("--export.checkpoints=true", "--export.license=mit", "--export.dtype=bfloat16")
    settings = ("--data.batch_size=2", *limits, *export)
    output = tmp_path / "run"
    assert main(run_arguments(motion_clips, output, *settings, "--trainer.max_epochs=3")) == 0
    best, last = (output / "checkpoints" / name for name in ("best", "last"))
    half = "8 frames x 1 crop x 1 clip. A clip that cannot be decoded counts as wrong. Measured before the weights "
    half += "were rounded to bfloat16. Only 2 of the 4 held-out clips were evaluated."
    kept = "Kept as the best so far: the same clips choose the checkpoint, so the figure is optimistic."
    assert evaluation(best) == f"Validation after epoch 2 (step 8); {half} {kept}"
    assert evaluation(output / "export") == f"The only validated checkpoint, after epoch 2 (step 8); {half}"
    found = ModelCard.load(best / "README.md").data.eval_results[0].metric_value
    assert evaluation(last) == (
        "Not evaluated as they are, after epoch 3 (step 12). "
        f"The last validation, after epoch 2 (step 8), found top1 {found:.4f}."
    )
    assert ModelCard.load(last / "README.md").data.eval_results is None
    for folder, epochs, steps in ((best, "2 of 3", 8), (last, 3, 12), (output / "export", 3, 12)):
        text = (folder / "README.md").read_text()
        assert f"| epochs | {epochs} |\n| steps | {steps} |\n" in text
        assert ("Wilson" in text) == (folder != last)
        assert folder == last or "is that of 2 clips" in text
        assert ModelCard.load(folder / "README.md").data.license == "mit"
    more = ("--trainer.max_epochs=4", f"--resume={output / 'checkpoints' / 'last.ckpt'}")
    assert main(run_arguments(motion_clips, output, *settings, *more)) == 0
    assert re.fullmatch(
        r"Best of 2 validated checkpoints by held-out top-1, after epoch (2 \(step 8\)|4 \(step 16\)); "
        + re.escape(f"{half} The same clips chose the checkpoint: the figure is optimistic."),
        evaluation(output / "export"),
    )
    recipe = yaml.safe_load((output / "export" / "recipe.yaml").read_text())
    assert "resume" not in recipe  # others have not got the checkpoint, and would begin anew each time
    assert recipe["export"]["license"] == "mit"


@pytest.mark.slow
def test_a_strategy_that_hands_back_no_weights_is_an_error(motion_clips, tmp_path, monkeypatch, capsys):
    """As FSDP2 does when its hooks are over."""

    def lose_weights(module):
        monkeypatch.setattr(SingleDeviceStrategy, "lightning_module_state_dict", lambda strategy: {})

    monkeypatch.setattr(VidPrismLightningModule, "on_test_end", lose_weights)
    assert main(run_arguments(motion_clips, tmp_path / "run", "--trainer.max_epochs=1")) == 1
    assert "there are no weights to export: were they gathered from all ranks?" in complaint(capsys)
    assert not (tmp_path / "run" / "export").exists()
