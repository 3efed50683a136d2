"""`vidprism finetune` and `evaluate` from end to end, on a few clips with the `tiny` tower."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import Hub
from hub_server.cards import judge
from huggingface_hub import ModelCard
from push_helpers import as_published
from safetensors.torch import load_file
from small import LABELS, files_of, run_arguments

from vidprism_hf import VidPrismForVideoClassification, VidPrismLightningModule, VidPrismVideoProcessor
from vidprism_hf.cli import main

pytestmark = pytest.mark.slow


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The exported weights of a run."""
    return load_file(run / "export" / "model.safetensors")


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights at the end of a run, which the best ones need not be."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def differing(one: dict, other: dict) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope="module")
def run(motion_clips, tmp_path_factory):
    """A finished run; read only."""
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main(run_arguments(motion_clips, output)) == 0
    return output


def test_folder_of_a_run(run, motion_clips):
    files = files_of(run)
    assert {"config.yaml", "metrics.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= files.keys()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert any(name.startswith("logs/tensorboard/events.") for name in files)
    assert "val/top1" in files["logs/csv/metrics.csv"].decode().splitlines()[0]
    settings = yaml.safe_load(files["config.yaml"])
    assert settings["data"]["source"] == str(motion_clips)
    assert settings["model"]["backbone"] == "tiny"
    metrics = json.loads(files["metrics.json"])
    # Of two classes the right one is always among the top five.
    assert metrics.keys() == {"top1", "mean_class", "ece", "clips"}
    found = json.loads(files["evaluation/motions-8x1x1/evaluation.json"])
    assert found["metrics"]["top1"]["value"] == metrics["top1"]
    assert files["evaluation/motions-8x1x1/confusion.png"].startswith(b"\x89PNG")
    assert metrics["clips"]["train"] == {"expected": 8, "missing": 0, "undecodable": 0}
    assert 0 <= metrics["top1"] <= 1


def test_export_of_a_run(run):
    export = run / "export"
    model = VidPrismForVideoClassification.from_pretrained(export)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert VidPrismVideoProcessor.from_pretrained(export).num_frames == model.config.num_frames == 8
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    exported = {f"model.{name}": tensor for name, tensor in weights(run).items()}
    assert differing(exported, {name: best[name] for name in best if name.startswith("model.")}) == []
    card = ModelCard.load(export / "README.md")
    top1 = json.loads((run / "metrics.json").read_text())["top1"]
    assert card.data.eval_results[0].metric_value == top1
    for line in ("| training clips | 8 |", "| held-out clips | 4 |", "| epochs | 2 |", "| steps | 4 |"):
        assert line in card.text.splitlines()


def test_card_of_a_run(run):
    text = (run / "export" / "README.md").read_text()
    assert judge(text, "model") == ([], [])
    for heading in ("Data", "Evaluation", "Training", "Figures", "Experts", "Compute", "Limitations", "Licence"):
        assert f"\n## {heading}\n" in text
    assert len(re.findall(r"^\| rate \d \| 0\.\d+ \|$", text, flags=re.MULTILINE)) == 3
    for row in ("GMACs per view", "parameters", "device", "wall time", "peak memory"):
        assert re.search(rf"^\| {row}", text, flags=re.MULTILINE)
    for figure in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (run / "export" / figure).read_bytes().startswith(b"\x89PNG")


def test_recipe_and_split_of_an_export(run, motion_clips, tmp_path):
    recipe = yaml.safe_load((run / "export" / "recipe.yaml").read_text())
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert recipe["model"] == settings["model"]
    assert recipe["data"] | {"source": str(motion_clips)} == settings["data"]
    assert str(motion_clips.parent) not in (run / "export" / "recipe.yaml").read_text()
    manifest = json.loads((run / "export" / "split.json").read_text())
    assert (manifest["train"]["clips"], manifest["val"]["clips"]) == (8, 4)
    (listed,) = re.findall(
        r"\| sha256 of the training list \| `(\w{64})` \|", (run / "export" / "README.md").read_text()
    )
    assert manifest["train"]["sha256"] == listed != manifest["val"]["sha256"]
    # It is a recipe: a run by it gives the same weights.
    again = ["finetune", "--config", str(run / "export" / "recipe.yaml"), f"--data.source={motion_clips}"]
    assert main([*again, f"--output={tmp_path / 'again'}"]) == 0
    assert differing(weights(run), weights(tmp_path / "again")) == []


def test_list_of_the_training_clips_is_part_of_the_export(motion_clips, tmp_path):
    arguments = run_arguments(motion_clips, tmp_path / "run", "--data.shots=1", "--trainer.max_epochs=1")
    assert main(arguments) == 0
    listed = (tmp_path / "run" / "export" / "train_clips.txt").read_bytes()
    assert listed == (tmp_path / "run" / "train_clips.txt").read_bytes()
    manifest = json.loads((tmp_path / "run" / "export" / "split.json").read_text())
    digest = hashlib.sha256(b"".join(sorted(listed.splitlines(keepends=True)))).hexdigest()
    assert manifest["train"] == {"clips": 2, "not_decoded": 0, "not_on_disk": 0, "sha256": digest}
    assert manifest["few_shot"] == {"shots": 1, "seed": 0}


def test_kept_checkpoints_are_exported_and_change_nothing(run, motion_clips, tmp_path):
    output = tmp_path / "run"
    settings = ("--export.checkpoints=true", "--export.dtype=bfloat16", "--export.max_shard_size=300KB")
    assert main(run_arguments(motion_clips, output, *settings)) == 0
    assert differing(last_weights(run), last_weights(output)) == []
    for name in ("best", "last"):
        kept = torch.load(output / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        model = VidPrismForVideoClassification.from_pretrained(output / "checkpoints" / name)
        exported = {f"model.{key}": value for key, value in model.state_dict().items()}
        expected = {key: value.bfloat16() for key, value in kept.items() if key.startswith("model.")}
        assert differing(exported, expected) == []
        assert (output / "checkpoints" / name / "model.safetensors.index.json").is_file()
        assert "\nValidation after epoch " in (output / "checkpoints" / name / "README.md").read_text()


def test_an_export_that_fails_does_not_end_the_training(motion_clips, tmp_path, monkeypatch):
    best = tmp_path / "run" / "checkpoints" / "best"

    def put_in_the_way(*_):
        best.mkdir(parents=True)
        (best / "notes.txt").write_text("mine")

    monkeypatch.setattr(VidPrismLightningModule, "on_train_start", put_in_the_way)
    with pytest.warns(UserWarning, match=r"best\.ckpt is kept, but not exported: .*notes\.txt"):
        assert main(run_arguments(motion_clips, tmp_path / "run", "--export.checkpoints=true")) == 0
    assert (best / "notes.txt").read_text() == "mine"
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_two_processes_export_and_push_the_same_files(run, motion_clips, tmp_path):
    """From the same weights, which a learning rate of zero keeps: all that the strategy is not named in is equal."""
    start = ("--trainer.max_epochs=1", "--model.learning_rate=0", f"--model.checkpoint={run / 'export'}")
    assert main(run_arguments(motion_clips, tmp_path / "one", *start)) == 0
    push = ("--trainer.callbacks+=vidprism_hf.training.push_callback.PushToHub", "--trainer.callbacks.repo=alice/two")
    two = run_arguments(motion_clips, tmp_path / "two", *start, *push)
    command = [sys.executable, "-m", "vidprism_hf.cli", *two, "--trainer.devices=2", "--trainer.strategy=ddp"]
    with Hub() as hub:
        env = hub.environment(tmp_path / "home", hub.user("alice")) | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        head = hub.repositories["model", "alice/two"].commit("main")
        assert done.stdout.splitlines()[-1] == f"Pushed: {hub.url}/alice/two {head.oid}"
        pushed = {name: content.read() for name, content in head.files.items() if name != ".gitattributes"}
    assert pushed == as_published(tmp_path / "two" / "export", "alice/two")
    one, two = (files_of(tmp_path / name / "export") for name in ("one", "two"))
    assert one.keys() == two.keys()
    named = {"README.md", "recipe.yaml"}  # the number of processes, time and memory
    drawn = {"figures/curves.png", "figures/experts.png"}  # sums of other orders
    assert {name for name in one if one[name] != two[name]} <= named | drawn
    assert one["model.safetensors"] == (run / "export" / "model.safetensors").read_bytes()
    assert b"2 x CPU" in two["README.md"]


def test_ends_with_three_lines_that_work(motion_clips, tmp_path, capsys):
    output, clip = tmp_path / "run", str(motion_clips / "val" / "growing" / "0.mp4")
    assert main(run_arguments(motion_clips, output)) == 0
    said, predict, python = capsys.readouterr().out.splitlines()[-3:]
    top1 = json.loads((output / "metrics.json").read_text())["top1"]
    caution = r" \(caution: so few say little, the 95 % interval is 0\.\d\d to [01]\.\d\d\)"
    assert re.sub(caution, "", said) == f"Held-out top-1 {top1:.4f} on 4 clips; exported to {output / 'export'}"
    assert re.search(caution, said)
    verb, *words = predict.replace("CLIP.mp4", clip).split()
    assert verb == "vidprism"
    assert main([*words, "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["labels"][0]
    code = re.fullmatch(r'  python -c "(.*)"', python)[1].replace("CLIP.mp4", clip)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(r"'label': '(\w+)'", done.stdout)[1] == best


def test_same_seed_same_weights(run, motion_clips, tmp_path):
    assert main(run_arguments(motion_clips, tmp_path / "again")) == 0
    assert differing(weights(run), weights(tmp_path / "again")) == []
    assert differing(last_weights(run), last_weights(tmp_path / "again")) == []
    assert main(run_arguments(motion_clips, tmp_path / "other", "--seed_everything=1")) == 0
    assert "model.classifier.weight" in differing(last_weights(run), last_weights(tmp_path / "other"))


def test_workers_do_not_change_the_weights(run, motion_clips, tmp_path):
    assert main(run_arguments(motion_clips, tmp_path / "run", "--data.num_workers=2")) == 0
    assert differing(last_weights(run), last_weights(tmp_path / "run")) == []


def test_earlier_runs_are_kept(motion_clips, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = run_arguments(motion_clips, output, "--trainer.max_epochs=1")
    kept = []
    for number in (None, 1, 2):
        assert main(arguments) == 0
        if number is not None:
            assert f"The earlier run in {output} is kept as {output}.{number}" in capsys.readouterr().out
            assert files_of(Path(f"{output}.{number}")) == kept[-1]
        kept.append(files_of(output))
        assert "logs/csv/metrics.csv" in kept[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1", "run.2"]


@pytest.mark.parametrize("with_recipe", [True, False], ids=["config.yaml", "overrides"])
def test_evaluate_finds_what_the_run_found(run, motion_clips, tmp_path, capsys, with_recipe):
    if with_recipe:
        arguments = ["--config", str(run / "config.yaml")]
    else:
        arguments = ["--data.source", str(motion_clips), "--model.num_frames=8", "--trainer.accelerator=cpu"]
    export = shutil.copytree(run / "export", tmp_path / "export")
    before = files_of(run)
    assert main(["evaluate", str(export), *arguments]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"on {metrics.pop('clips')['val']['expected']} held-out clips" in printed
    for name, value in metrics.items():
        assert re.search(rf"^ {name} +{value:.4f}( |$)", printed, flags=re.MULTILINE)
    assert files_of(run) == before
    # Of the export only the card has changed.
    changed = {name for name, content in files_of(export).items() if content != before[f"export/{name}"]}
    assert changed == {"README.md"}
    one, two = (
        json.loads((folder / "evaluation" / "motions-8x1x1" / "evaluation.json").read_text()) | {"model": ""}
        for folder in (run, tmp_path)
    )
    assert one == two


def test_a_model_in_the_runs_own_folder_is_not_moved_away(run, motion_clips, capsys):
    before = files_of(run)
    assert main(run_arguments(motion_clips, run, f"--model.checkpoint={run / 'export'}")) == 1
    assert "choose another output" in capsys.readouterr().err
    assert files_of(run) == before


def test_starts_from_an_export(run, motion_clips, tmp_path):
    arguments = run_arguments(motion_clips, tmp_path / "run", f"--model.checkpoint={run / 'export'}")
    assert main([*arguments, "--model.freeze_backbone=true", "--trainer.max_epochs=1"]) == 0
    changed = differing(weights(run), weights(tmp_path / "run"))
    assert "classifier.weight" in changed
    assert not [name for name in changed if name.startswith("vidprism.vision_tower.")]


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(motion_clips, tmp_path):
    output = tmp_path / "run"
    arguments = run_arguments(motion_clips, output, "--trainer.max_epochs=2000")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "vidprism_hf.cli", *arguments],
        cwd=Path(__file__).parents[1],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    last = output / "checkpoints" / "last.ckpt"
    try:
        while not last.is_file() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (output / "export").exists()
    step = torch.load(last, weights_only=True)["global_step"]
    assert 0 < step < 4000
    said = re.search(r"^Stopped after step (\d+)\. Go on with: vidprism (.*)$", printed, flags=re.MULTILINE)
    assert (int(said[1]), said[2].split()) == (step, arguments)
    # The same command, with an end that is near.
    epochs = -(-step // 2) + 1
    assert main([*arguments, f"--resume={last}", f"--trainer.max_epochs={epochs}"]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == 2 * epochs
    assert (output / "export" / "model.safetensors").is_file()
