"""A run from Python: the ten lines, the same result as from the command line, and training loops of one's own."""

import json

import lightning as L
import numpy as np
import pytest
import torch
import transformers
from small import LABELS, files_of, tiny_model

import vidprism_hf
from vidprism_cli import main
from vidprism_hf import (
    VideoDataModule,
    VidPrismForVideoClassification,
    VidPrismLightningModule,
    finetune,
)
from vidprism_hf.errors import UserError
from vidprism_hf.evaluation.evaluate import evaluate
from vidprism_hf.hub.push import push_export

TRAINER = {"accelerator": "cpu", "enable_progress_bar": False}
# Of an export, what depends on the clock, and on how much memory the process has had.
MEASURED = ("wall time of training", "peak memory")


def small_data(folder, **settings) -> VideoDataModule:
    return VideoDataModule(str(folder), batch_size=4, num_workers=0, **settings)


@pytest.fixture
def data(motion_clips):
    return small_data(motion_clips)


def new_model(data, seed: int = 0) -> VidPrismForVideoClassification:
    torch.manual_seed(seed)
    return VidPrismForVideoClassification.from_vision_pretrained("tiny", id2label=data.id2label, num_frames=8)


def test_a_model_is_trained_evaluated_and_exported(data, tmp_path):
    model = new_model(data)
    before = model.classifier.weight.detach().clone()
    run = finetune(model, data, output=tmp_path / "run", max_epochs=1, trainer=TRAINER)
    assert run.export == tmp_path / "run" / "export"
    assert run.evaluation.values["top1"] == json.loads((tmp_path / "run" / "metrics.json").read_text())["top1"]
    assert not torch.equal(model.classifier.weight, before)  # in place
    loaded = VidPrismForVideoClassification.from_pretrained(run.export)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())


def test_the_command_line_gives_the_same_export(motion_clips, data, tmp_path, monkeypatch):
    for name in ("python", "shell"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "python")
    finetune(new_model(data), data, output="run", max_epochs=2, trainer=TRAINER)
    monkeypatch.chdir(tmp_path / "shell")
    settings = {
        "data.source": motion_clips,
        "data.batch_size": 4,
        "data.num_workers": 0,
        "model.backbone": "tiny",
        "model.num_frames": 8,
        "trainer.max_epochs": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "output": "run",
    }
    assert main(["finetune", *(f"--{name}={value}" for name, value in settings.items())]) == 0
    one, two = (files_of(tmp_path / name / "run" / "export") for name in ("python", "shell"))
    cards = [without_measured(files.pop("README.md").decode()) for files in (one, two)]
    assert one == two
    assert cards[0] == cards[1]


def without_measured(card: str) -> list[str]:
    return [line for line in card.splitlines() if not any(name in line for name in MEASURED)]


def test_the_recipe_of_a_run_from_python_repeats_it(data, tmp_path):
    module = VidPrismLightningModule.from_model(new_model(data), learning_rate=1e-3, freeze_backbone=True)
    finetune(module, data, output=tmp_path / "run", max_epochs=1, trainer=TRAINER)
    recipe = str(tmp_path / "run" / "config.yaml")
    assert main(["finetune", f"--config={recipe}", f"--output={tmp_path / 'again'}"]) == 0
    weights = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]


def test_a_checkpoint_is_tuned_further(data, tmp_path, exported):
    model = VidPrismForVideoClassification.from_pretrained(exported)
    run = finetune(model, data, output=tmp_path / "run", max_epochs=1, trainer=TRAINER)
    recipe = (run.folder / "config.yaml").read_text()
    assert f"checkpoint: {exported}" in recipe


def test_called_again_it_returns_the_finished_run(motion_clips, data, tmp_path, capsys):
    run = finetune(new_model(data), data, output=tmp_path / "run", max_epochs=1, trainer=TRAINER)
    written = (tmp_path / "run" / "metrics.json").stat().st_mtime_ns
    capsys.readouterr()
    model, again = new_model(data, seed=1), small_data(motion_clips)
    found = finetune(model, again, output=tmp_path / "run", max_epochs=1, trainer=TRAINER)
    assert "is finished; it is not trained again" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.json").stat().st_mtime_ns == written
    assert found.evaluation.to_json() == run.evaluation.to_json()
    loaded = VidPrismForVideoClassification.from_pretrained(run.export)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())
    # Other settings are another run: the finished one stays, renamed.
    finetune(new_model(data), small_data(motion_clips), output=tmp_path / "run", max_epochs=2, trainer=TRAINER)
    assert (tmp_path / "run.1" / "metrics.json").is_file()


def test_labels_that_are_not_the_datas_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="id2label: the model's labels are not the data's"):
        finetune(tiny_model(("run", "walk")), data, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_evaluation_of_a_model_in_memory(data, exported, tmp_path):
    model = VidPrismForVideoClassification.from_pretrained(exported)
    one = evaluate(model, data, output=str(tmp_path / "one"), trainer=TRAINER)
    two = evaluate(str(exported), data, output=str(tmp_path / "two"), trainer=TRAINER)
    assert one.values == two.values


def test_the_functions_of_the_package(motion_clips, exported):
    """What the command line does is there by name: each is a function over objects and paths."""
    (found,) = vidprism_hf.predict(str(exported), [str(motion_clips / "val" / "growing" / "0.mp4")], top_k=1)
    assert found.error is None
    assert found.labels[0] in LABELS
    assert vidprism_hf.evaluate is evaluate
    assert vidprism_hf.push is push_export


def test_lightnings_own_trainer(data):
    """Frames, size and pixel statistics are the model's: the data module takes them from the module it runs with."""
    module = VidPrismLightningModule.from_model(new_model(data))
    trainer = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_model_summary=False, **TRAINER)
    trainer.fit(module, datamodule=data)
    assert data.video_processor.num_frames == 8
    assert data.video_processor.crop_size["height"] == 32
    assert trainer.test(module, datamodule=data, verbose=False)[0]["test/top1"] >= 0


def test_data_without_a_model_say_so(data):
    with pytest.raises(UserError, match=r"data.processor: no model is known yet; call take_model"):
        data.examples("train")


@pytest.mark.slow
def test_transformers_trainer(data, tmp_path):
    """With accuracy, from examples in new views each epoch."""
    model = new_model(data)
    data.take_model(model)
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "num_train_epochs": 2}
    arguments = transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=4, **settings)
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=data.examples("train"),
        eval_dataset=data.examples("val"),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
    )
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    first, later = data.examples("train"), data.examples("train")
    later.set_epoch(1)
    assert not torch.equal(first[0]["pixel_values_videos"], later[0]["pixel_values_videos"])


def test_a_plain_loop(data):
    model = new_model(data)
    data.take_model(model)
    loader = torch.utils.data.DataLoader(data.examples("train"), batch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert len(losses) == 2
    assert sorted(data.id2label.values()) == sorted(LABELS)
