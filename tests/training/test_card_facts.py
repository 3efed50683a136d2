"""What the callback keeps of a run for its card."""

import copy
import json
import shutil
from collections import defaultdict

import huggingface_hub
import lightning as L
import numpy as np
import pytest
import torch
from hub_server import Hub
from small import LABELS, NUM_FRAMES, card_facts
from synthetic import random_batches, trainer

from vidprism_hf import VidPrismLightningModule
from vidprism_hf.data.fetch.repository import Repository
from vidprism_hf.data.open import dataset_facts
from vidprism_hf.hub import render_card
from vidprism_hf.training.callbacks.recorder import CardRecorder, duration, epochs_at
from vidprism_hf.training.origin import base_model, is_random, starting_point


def module(**settings) -> VidPrismLightningModule:
    torch.manual_seed(0)
    return VidPrismLightningModule("tiny", id2label=dict(enumerate(LABELS)), num_frames=NUM_FRAMES, **settings)


class Logged(L.Callback):
    """What the module logs in each training step and validation, by epoch."""

    def __init__(self):
        self.train, self.val = defaultdict(list), {}

    def on_train_batch_end(self, trainer, *_):
        self.train[trainer.current_epoch].append(trainer.callback_metrics["train/loss"].item())

    def on_validation_end(self, trainer, *_):
        names = {"val_loss": "val/loss", "val_top1": "val/top1"}
        self.val[trainer.current_epoch] = {name: trainer.callback_metrics[key].item() for name, key in names.items()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_curves_are_what_was_logged(tmp_path, accumulate):
    recorder, logged = CardRecorder(), Logged()
    run = trainer(tmp_path, callbacks=[recorder, logged], max_epochs=3, accumulate_grad_batches=accumulate)
    run.fit(module(learning_rate=1e-3), random_batches(4), random_batches(2, seed=1))
    assert list(recorder.epochs) == [0, 1, 2]
    for epoch, values in recorder.epochs.items():
        assert len(logged.train[epoch]) == 4
        assert values == pytest.approx({"train_loss": np.mean(logged.train[epoch]), **logged.val[epoch]}, abs=1e-6)
    assert 0 < recorder.seconds < 600
    assert recorder.peak_bytes > 1e8


def test_expert_weights_are_the_means_over_the_clips(tmp_path):
    recorder, trained = CardRecorder(), module()
    batches = list(random_batches(3, num_labels=1))
    batches[0]["readable"] = torch.tensor([True, False, True, True])
    run = trainer(tmp_path, callbacks=[recorder])
    run.test(trained, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    with torch.no_grad():
        weights = torch.cat([trained.model(batch["pixel_values_videos"]).expert_weights for batch in batches])
    expected = torch.cat([weights[:1], weights[2:]]).mean(0)
    np.testing.assert_allclose(recorder.mean_weights, expected, atol=1e-6)
    np.testing.assert_allclose(recorder.class_weights[0], expected, atol=1e-6)
    assert np.isnan(recorder.class_weights[1]).all()


class Snapshots(L.Callback):
    """What a recorder knows when each validation has ended: an export or a push takes place right then."""

    def __init__(self, recorder):
        self.recorder, self.taken = recorder, []

    def on_validation_end(self, trainer, *_):
        if not trainer.sanity_checking:
            kept = {"step": trainer.global_step, "epochs": epochs_at(trainer, trainer.global_step)}
            self.taken.append(copy.deepcopy(kept | {"curves": self.recorder.epochs}))


def test_a_validation_knows_its_moment_its_clips_and_the_losses_so_far(tmp_path):
    recorder = CardRecorder()
    snapshots, logged = Snapshots(recorder), Logged()
    settings = {"max_epochs": 3, "val_check_interval": 0.5, "limit_val_batches": 2, "accumulate_grad_batches": 2}
    run = trainer(tmp_path, callbacks=[recorder, logged, snapshots], **settings)
    run.fit(module(learning_rate=1e-3), random_batches(4), random_batches(3, size=3, seed=1))
    assert [each["step"] for each in snapshots.taken] == list(recorder.validations) == [1, 2, 3, 4, 5, 6]
    assert [each["epochs"] for each in snapshots.taken] == ["0.5", "1", "1.5", "2", "2.5", "3"]
    assert {found["clips"] for found in recorder.validations.values()} == {6}
    assert recorder.validations[6]["top1"] == logged.val[2]["val_top1"]
    for number, each in enumerate(snapshots.taken):
        epoch, batches = divmod(number, 2)
        assert list(each["curves"]) == list(range(epoch + 1))
        mean = np.mean(logged.train[epoch][: 2 * (batches + 1)])
        assert each["curves"][epoch]["train_loss"] == pytest.approx(mean, abs=1e-6)


def test_knows_whose_test_it_was(tmp_path):
    recorder, trained = CardRecorder(), module()
    run = trainer(tmp_path, callbacks=[recorder], limit_test_batches=2, limit_val_batches=0)
    run.fit(trained, random_batches(3))
    run.save_checkpoint(tmp_path / "a.ckpt")
    run.test(trained, random_batches(3), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    assert recorder.tested_step == 3


def test_goes_on_after_a_resumption_and_not_back_for_a_test():
    first = CardRecorder()
    first.epochs, first.seconds = {0: {"train_loss": 1.0}}, 60.0
    first.validations = {2: {"clips": 4, "top1": 0.5}}
    resumed = CardRecorder()
    resumed.load_state_dict(first.state_dict())
    assert (resumed.epochs, resumed.seconds) == (first.epochs, 60.0)
    resumed.epochs[1], resumed.seconds = {"train_loss": 0.5}, 90.0
    resumed.validations[4] = {"clips": 4, "top1": 0.25}
    resumed.load_state_dict(first.state_dict())  # the best checkpoint
    assert list(resumed.validations) == [2, 4]
    assert resumed.epochs == {0: {"train_loss": 1.0}, 1: {"train_loss": 0.5}}
    assert resumed.seconds == 90.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 min 00 s"), (62.2, "1 min 02 s"), (3599.9, "1 h 00 min 00 s"), (7265, "2 h 01 min 05 s")],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("b16", "openai/clip-vit-base-patch16"),
        ("tiny", None),
        ("org/vidprism-b16", "org/vidprism-b16"),
        ("bare-name", None),
        ("/nope/x", None),
        ("~/nope", None),
        ("../nope/x", None),
        ("nope/x/y", None),
        ("C:\\nope\\x", None),
        ("nope/x--y", None),
    ],
)
def test_base_model_by_name(name, known):
    assert base_model(name) == known


def clip_folder(folder):
    (folder / "config.json").write_text('{"model_type": "clip", "_name_or_path": "openai/clip-vit-base-patch16"}')


def no_card(folder):
    (folder / "README.md").unlink()


def broken_card(folder):
    (folder / "README.md").write_text("---\nbase_model: [\n---\n")


def several_bases(folder):
    (folder / "README.md").write_text("---\nbase_model:\n- org/one\n- org/two\n---\n")


def named_by_its_configuration(folder):
    no_card(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/before"}))


def named_by_a_path(folder):
    no_card(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/me/before"}))


def card_of(base):
    def write(folder):
        render_card(card_facts(base_model=base)).save(folder / "README.md")

    return write


@pytest.mark.parametrize(
    ("change", "known"),
    [
        (card_of("openai/clip-vit-base-patch32"), "openai/clip-vit-base-patch32"),
        (several_bases, "org/one"),
        (card_of("/home/me/before"), None),
        (card_of(None), None),
        (no_card, None),
        (broken_card, None),
        (named_by_its_configuration, "org/before"),
        (named_by_a_path, None),
        (clip_folder, None),
    ],
)
def test_base_model_of_a_folder(exported, tmp_path, monkeypatch, change, known):
    folder = tmp_path / "runs" / "earlier"  # relative, it looks like an id
    shutil.copytree(exported, folder)
    change(folder)
    monkeypatch.chdir(tmp_path)
    assert base_model(str(folder)) == base_model("runs/earlier") == known


def test_base_model_is_looked_up_before_the_run(exported, tmp_path, monkeypatch):
    """A folder that goes meanwhile is no id of the Hub."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported, "runs/earlier")
    recorder = CardRecorder()
    run = trainer(tmp_path, callbacks=[recorder], limit_val_batches=0)

    class Gone(L.Callback):
        def on_train_end(self, *_):
            shutil.rmtree("runs/earlier")

    run.callbacks.append(Gone())
    run.fit(module(checkpoint="runs/earlier"), random_batches(1))
    assert recorder.base_model is None


@pytest.mark.parametrize(
    ("checkpoint", "backbone", "words"),
    [
        (None, "b16", "the preset b16, openai/clip-vit-base-patch16"),
        (None, "tiny", "the preset tiny, with random weights"),
        (None, "org/clip", "the CLIP checkpoint org/clip"),
        (None, "/nope/clip", "a CLIP checkpoint in a folder, clip"),
        ("org/model", "b16", "the VidPrism checkpoint org/model"),
        ("/nope/run/export", "b16", "a VidPrism checkpoint in a folder, export"),
    ],
)
def test_starting_point(checkpoint, backbone, words):
    assert starting_point(checkpoint, backbone, base_model(checkpoint or backbone)) == words


@pytest.mark.parametrize(
    ("checkpoint", "backbone", "random"),
    [(None, "tiny", True), (None, "b16", False), ("org/model", "tiny", False), (None, "org/clip", False)],
)
def test_random_start(checkpoint, backbone, random):
    assert is_random(checkpoint, backbone) == random


def test_starting_point_of_a_folder_whose_card_names_its_base():
    words = starting_point("/nope/run/export", "b16", "org/clip")
    assert words == "a VidPrism checkpoint in a folder, export, which comes from org/clip"


@pytest.mark.parametrize(
    ("metadata", "terms"),
    [
        ("license: cc-by-4.0", "cc-by-4.0, as its card says"),
        ("license: [cc-by-4.0, mit]", "cc-by-4.0, mit, as its card says"),
        ("license: other\nlicense_name: of its own", "of its own, as its card says"),
        ("license: unknown", None),
        ("tags: [video]", None),
        ("license: [", None),
    ],
)
def test_licence_of_a_dataset_of_the_hub(tmp_path, monkeypatch, metadata, terms):
    settings = {"source": "alice/clips"} | dict.fromkeys(("train_list", "hub_revision", "val_split", "hub_config"))
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "README.md").write_text(f"---\n{metadata}\n---\nClips.\n")
    with Hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        hub.add_dataset("alice/clips", tmp_path / "clips")
        assert "data_license" not in dataset_facts(settings)  # nobody has fetched the card yet
        assert not hub.count()
        Repository.find("alice/clips")
        asked = hub.count()
        facts = dataset_facts(settings)
        assert hub.count() == asked
    assert facts == {"dataset": "alice/clips", "dataset_id": "alice/clips"} | ({"data_license": terms} if terms else {})
