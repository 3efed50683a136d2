"""The command line: each bad input is one line on stderr and exit status 1, with nothing written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from hub_server import Hub
from small import complaint, files_of, run_arguments, tiny_export

from vidprism_cli import COMMANDS, main
from vidprism_hf import VidPrismModel
from vidprism_hf.cli.help import LINKED, SECTIONS, keys
from vidprism_hf.cli.recipe import parse


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def copied(motion_clips, tmp_path):
    """Clips that a test may spoil."""
    return Path(shutil.copytree(motion_clips, tmp_path / "clips"))


def refuse(capsys, arguments) -> str:
    """What a verb that cannot do its work says."""
    assert main(arguments) == 1
    return complaint(capsys)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_usage(capsys, arguments):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {verb} " in printed for verb in COMMANDS)


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("predict", ["--json", "--top-k", "--device"]),
        ("convert", ["--num-frames", "--labels", "--rates"]),
    ],
)
def test_help_of_a_verb(capsys, verb, options):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert f"usage: vidprism {verb}" in printed
    assert [option for option in options if option not in printed] == []


def test_help_of_finetune(capsys):
    """Our keys in groups, from the source; those of the trainer by a word of their own."""
    assert main(["finetune", "--help"]) == 0
    printed = capsys.readouterr().out
    keys = ["--output", "--resume", "--model.freeze_backbone", "--data.val_pattern", "--export.license"]
    assert [key for key in keys if f"{key} " not in printed] == []
    assert "--trainer.devices" not in printed
    assert main(["finetune", "--help=trainer"]) == 0
    assert "  --trainer.devices " in capsys.readouterr().out


def test_the_help_has_each_key_of_the_settings(capsys):
    """What the command line accepts and what the help, which is read from the source, lists are the same."""
    accepted = parse(["--data.source=demo"]).parser.get_defaults().keys()
    known = {key.name for section in SECTIONS for key in keys(section)}
    assert {key for key in accepted if key.partition(".")[0] in SECTIONS} - LINKED == known


def test_unknown_verb(capsys):
    assert main(["fintune"]) == 2
    said = capsys.readouterr().err
    assert said == "vidprism: no command 'fintune'; did you mean finetune?\n"


@pytest.mark.slow
def test_module_and_exit_status():
    command = [sys.executable, "-m", "vidprism_hf", "predict", "nowhere/at_all", "clip.mp4"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1
    assert done.stderr.startswith("vidprism predict: nowhere/at_all: cannot be loaded (")
    assert len(done.stderr.splitlines()) == 1


def no_such_folder(clips):
    return clips / "nowhere", "nowhere: no such folder"


def class_without_clips(clips):
    (clips / "train" / "turning").mkdir()
    return clips, "train/turning: class folder without clips"


def label_that_train_lacks(clips):
    shutil.copytree(clips / "val" / "growing", clips / "val" / "turning")
    return clips, "val/turning: train/ has no label 'turning'"


@pytest.mark.parametrize("spoil", [no_such_folder, class_without_clips, label_that_train_lacks])
def test_bad_folder(tmp_path, capsys, copied, spoil):
    source, message = spoil(copied)
    assert message in refuse(capsys, run_arguments(source, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


BAD_KEYS = ["model.lerning_rate", "data.sauce", "trainer.max_epoch", "model.config.readuot", "outptu"]


def named(key: str, message: str) -> bool:
    """Whether a message names a key."""
    return re.search(rf"\b{key.rpartition('.')[2]}\b", message) is not None


@pytest.mark.parametrize("key", BAD_KEYS)
def test_unknown_key_on_the_command_line(tmp_path, capsys, motion_clips, key):
    assert named(key, refuse(capsys, run_arguments(motion_clips, tmp_path / "run", f"--{key}=1")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", BAD_KEYS)
def test_unknown_key_in_the_recipe(tmp_path, capsys, motion_clips, key):
    recipe = tmp_path / "recipe.yaml"
    content = 1
    for name in reversed(key.split(".")):
        content = {name: content}
    recipe.write_text(yaml.safe_dump(content))
    arguments = run_arguments(motion_clips, tmp_path / "run")
    assert named(key, refuse(capsys, [arguments[0], "--config", str(recipe), *arguments[1:]]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.learning_rate=fast", "model.learning_rate"),
        ("--model.config.readout=median", "'readout' expected one of"),
        ("--data.batch_size=0", "data.batch_size=0: must be at least 1"),
        ("--trainer.accelerator=abacus", "trainer: You selected an invalid accelerator"),
        ("--config=nowhere.yaml", "nowhere.yaml"),
        ("--resume=nowhere.ckpt", "resume nowhere.ckpt: is not there; --resume auto finds the last good one"),
        ("--resume=false", "resume false: is not there; --resume auto finds the last good one, none starts fresh"),
        ("--model.checkpoint=nowhere/at_all", "model.checkpoint nowhere/at_all: cannot be loaded"),
    ],
)
def test_bad_value(tmp_path, capsys, motion_clips, argument, message):
    assert message in refuse(capsys, run_arguments(motion_clips, tmp_path / "run", argument))
    assert not (tmp_path / "run").exists()


def test_recipe_that_is_no_yaml(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("model: [tiny\n")
    assert "line 1" in refuse(capsys, ["finetune", "--config", str(tmp_path / "recipe.yaml")])


def test_resume_from_no_checkpoint(tmp_path, capsys, motion_clips):
    (tmp_path / "last.ckpt").write_bytes(b"no checkpoint")
    arguments = run_arguments(motion_clips, tmp_path / "run", f"--resume={tmp_path / 'last.ckpt'}")
    assert "last.ckpt: is cut or altered" in refuse(capsys, arguments)
    assert not (tmp_path / "run").exists()


def test_backbone_that_is_not_there(tmp_path, capsys, motion_clips):
    said = refuse(capsys, run_arguments(motion_clips, tmp_path / "run", "--model.backbone=nowhere/at_all"))
    assert "nowhere/at_all" in said


def test_checkpoint_with_other_labels(tmp_path, capsys, motion_clips):
    checkpoint = tiny_export(tmp_path / "model", labels=("jump", "run"))
    arguments = run_arguments(motion_clips, tmp_path / "run", f"--model.checkpoint={checkpoint}")
    difference = "only in the model: jump, run; only in the data: growing, shrinking"
    expected = f"its labels are not the data's ({difference})"
    assert expected in refuse(capsys, arguments)
    assert not (tmp_path / "run").exists()
    assert expected in refuse(capsys, ["evaluate", str(checkpoint), f"--data.source={motion_clips}"])


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_unwritable_output(tmp_path, capsys, motion_clips, name):
    (tmp_path / "file").write_text("no folder")
    said = refuse(capsys, run_arguments(motion_clips, tmp_path / name))
    assert f"output {tmp_path / name}: cannot be written" in said
    assert files_of(tmp_path) == {"file": b"no folder"}


def test_output_of_something_else(tmp_path, capsys, motion_clips):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "is not a run's folder" in refuse(capsys, run_arguments(motion_clips, tmp_path))
    assert files_of(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("workers", [0, 1])
def test_training_clip_that_is_no_video(tmp_path, capsys, copied, workers):
    broken = copied / "train" / "growing" / "0.mp4"
    broken.write_bytes(b"this is not a video" * 100)
    arguments = run_arguments(copied, tmp_path / "run", f"--data.num_workers={workers}")
    assert "train/growing/0.mp4: is not a video" in refuse(capsys, arguments)
    assert not (tmp_path / "run" / "export").exists()
    # With the file mended the same command goes on.
    if workers == 0:
        shutil.copy(copied / "train" / "growing" / "1.mp4", broken)
        assert main(arguments) == 0
        assert "Going on with the run" in capsys.readouterr().out


@pytest.fixture
def three_files(tmp_path, motion_clips):
    """A clip, a file that is none, and another clip."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"this is not a video" * 100)
    clips = [motion_clips / "val" / label / "0.mp4" for label in ("growing", "shrinking")]
    return [str(clips[0]), str(broken), str(clips[1])]


def test_predict_table(capsys, exported, three_files):
    assert main(["predict", str(exported), *three_files]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("vidprism predict: ") == 1
    assert f"vidprism predict: {three_files[1]}: " in captured.err
    rows = re.findall(r"│ +(growing|shrinking) +│ (\d\.\d{4}) │", captured.out)
    assert [{label for label, _ in rows[place : place + 2]} for place in (0, 2)] == [{"growing", "shrinking"}] * 2
    assert [float(rows[place][1]) + float(rows[place + 1][1]) for place in (0, 2)] == pytest.approx([1, 1], abs=2e-4)


def test_predict_json(capsys, exported, three_files):
    assert main(["predict", str(exported), *three_files, "--json"]) == 1
    first, broken, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [each["file"] for each in (first, broken, last)] == three_files
    for each in (first, last):
        assert set(each["labels"]) == {"growing", "shrinking"}
        assert each["scores"] == sorted(each["scores"], reverse=True)
        assert each["error"] is None
    assert (broken["labels"], broken["scores"]) == ([], [])
    assert broken["error"].startswith(f"{three_files[1]}: ")


def test_predict_top_k(capsys, exported, three_files):
    assert main(["predict", str(exported), three_files[0], "--json", "--top-k", "1"]) == 0
    assert len(json.loads(capsys.readouterr().out)["labels"]) == 1


def test_predict_without_a_model(tmp_path, capsys, three_files):
    assert "cannot be loaded" in refuse(capsys, ["predict", str(tmp_path / "nowhere"), *three_files])
    assert "cannot be loaded" in refuse(capsys, ["predict", "nowhere/at_all", *three_files])
    assert "cannot be loaded" in refuse(capsys, ["predict", str(tmp_path), *three_files])


@pytest.mark.parametrize("name", ["runs/dmo/export", "./dmo", "/dmo"])
def test_predict_with_a_folder_that_is_not_there(capsys, three_files, name):
    said = refuse(capsys, ["predict", name, *three_files])
    assert said == f"vidprism predict: {name}: cannot be loaded (no such folder)"


def test_the_folder_of_a_run_for_its_export(tmp_path, capsys, exported, three_files):
    shutil.copytree(exported, tmp_path / "export")
    hint = f"{tmp_path}: cannot be loaded (a run's folder; did you mean {tmp_path / 'export'}?)"
    assert refuse(capsys, ["predict", str(tmp_path), *three_files]).endswith(hint)
    assert refuse(capsys, ["evaluate", str(tmp_path), "--config", "recipes/demo.yaml"]).endswith(hint)


@pytest.mark.parametrize(
    ("gated", "told"), [(False, "or a private one: check the name"), (True, "it is gated or closed")]
)
def test_predict_with_a_model_that_needs_a_token(tmp_path, monkeypatch, capsys, exported, three_files, gated, told):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with Hub() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        hub.add_model("org/m", exported, private=not gated, gated=gated)
        said = refuse(capsys, ["predict", "org/m", *three_files])
    assert told in said
    assert said.endswith("run `hf auth login` or set HF_TOKEN)")


def test_predict_with_damaged_weights(tmp_path, capsys, three_files):
    model = tiny_export(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"no tensors")
    assert "cannot be loaded" in refuse(capsys, ["predict", str(model), *three_files])


def test_predict_with_a_model_that_has_no_classifier(tmp_path, capsys, exported, three_files):
    VidPrismModel.from_pretrained(exported).save_pretrained(tmp_path / "model", save_original_format=False)
    shutil.copy(exported / "video_preprocessor_config.json", tmp_path / "model")
    said = refuse(capsys, ["predict", str(tmp_path / "model"), *three_files])
    assert said.endswith("/model: incomplete classifier, 2 weights are missing (classifier.bias)")


def test_evaluate_without_a_model(capsys):
    assert "name the model first" in refuse(capsys, ["evaluate", "--config", "recipes/demo.yaml"])


def test_evaluate_without_clips(capsys, tmp_path):
    assert "name the videos: --config RECIPE" in refuse(capsys, ["evaluate", str(tmp_path), "--data.test_clips=4"])
