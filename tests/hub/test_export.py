"""The layout of an exported model, and that it is written whole or not at all."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import LABELS, NUM_FRAMES, card_facts, files_of, tiny_export, tiny_model, tiny_processor

from vidprism_hf import VidPrismForVideoClassification, VidPrismVideoProcessor
from vidprism_hf.hub import export_model, render_card
from vidprism_hf.hub.export import ExportError

CODE = {
    "configuration_vidprism.py",
    "modeling_vidprism.py",
    "outputs_vidprism.py",
    "temporal_vidprism.py",
    "video_decoding_vidprism.py",
    "video_packets_vidprism.py",
    "video_processing_vidprism.py",
}


def card():
    return render_card(card_facts())


def test_layout(exported):
    assert set(files_of(exported)) == CODE | {
        "README.md",
        "config.json",
        "model.safetensors",
        "video_preprocessor_config.json",
    }
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["VidPrismForVideoClassification"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_vidprism.VidPrismConfig",
        "AutoModel": "modeling_vidprism.VidPrismModel",
        "AutoModelForVideoClassification": "modeling_vidprism.VidPrismForVideoClassification",
        "AutoVideoProcessor": "video_processing_vidprism.VidPrismVideoProcessor",
    }
    assert config["id2label"] == {str(index): label for index, label in enumerate(LABELS)}
    assert config["label2id"] == {label: index for index, label in enumerate(LABELS)}
    assert config["num_frames"] == NUM_FRAMES
    assert config["model_type"] == "vidprism"
    processor = json.loads((exported / "video_preprocessor_config.json").read_text())
    assert processor["auto_map"] == {"AutoVideoProcessor": "video_processing_vidprism.VidPrismVideoProcessor"}
    assert processor["num_frames"] == NUM_FRAMES
    assert exported.stat().st_mode & 0o777 == 0o755


def test_code_files_are_those_of_the_package(exported):
    import vidprism_hf.model

    for name in CODE:
        source = f"{vidprism_hf.model.__path__[0]}/{name}"
        with open(source) as file:
            assert (exported / name).read_text() == file.read()


def test_weights_have_the_names_of_the_model(exported):
    written, model = load_file(exported / "model.safetensors"), tiny_model().state_dict()
    assert written.keys() == model.keys()
    assert all(torch.equal(written[name], model[name]) for name in model)


def test_round_trip(exported, tmp_path):
    model = VidPrismForVideoClassification.from_pretrained(exported)
    processor = VidPrismVideoProcessor.from_pretrained(exported)
    pixels = torch.randn(1, NUM_FRAMES, 3, 32, 32)
    torch.testing.assert_close(model(pixels).logits, tiny_model()(pixels).logits, atol=1e-6, rtol=0)
    clip = torch.randint(0, 255, (20, 3, 40, 50), dtype=torch.uint8)
    ours, theirs = (each(clip, return_tensors="pt")["pixel_values_videos"] for each in (processor, tiny_processor()))
    assert torch.equal(ours, theirs)
    # Loaded and exported again: the same files, though transformers renames keys of CLIP's on its own accord.
    again = export_model(model, processor, tmp_path / "again", card())
    weights = load_file(again / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    first, second = files_of(exported), files_of(again)
    assert first.keys() == second.keys()
    assert [name for name in CODE if first[name] != second[name]] == []


def test_processor_takes_the_frames_of_the_model(tmp_path):
    folder = export_model(tiny_model(num_frames=12), tiny_processor(), tmp_path / "model", card())
    assert VidPrismVideoProcessor.from_pretrained(folder).num_frames == 12


def test_new_export_replaces_the_old_one(tmp_path):
    folder = tiny_export(tmp_path / "model")
    (folder / "left_over_vidprism.py").write_text("from an older version")
    (folder / "model-00001-of-00002.safetensors").write_text("a shard")
    tiny_export(folder, labels=("a", "b", "c"))
    assert VidPrismForVideoClassification.from_pretrained(folder).config.num_labels == 3
    assert not (folder / "left_over_vidprism.py").exists()
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [RuntimeError("lost"), OSError(28, "No space left on device")])
def test_nothing_changes_when_saving_fails(tmp_path, monkeypatch, error):
    folder = tiny_export(tmp_path / "model")
    before = files_of(tmp_path)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(VidPrismVideoProcessor, "save_pretrained", fail)  # the weights are written by then
    expected = ExportError if isinstance(error, OSError) else RuntimeError
    with pytest.raises(expected, match=r"No space left|lost"):
        tiny_export(folder, labels=("a", "b", "c"))
    assert files_of(tmp_path) == before
    with pytest.raises(expected):
        tiny_export(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_that_were_not_written_right_are_noticed(tmp_path, monkeypatch):
    def save_less(model, folder, **_):
        state = {name: tensor for name, tensor in model.state_dict().items() if "classifier" not in name}
        original(model, folder, state_dict=state)

    original = VidPrismForVideoClassification.save_pretrained
    monkeypatch.setattr(VidPrismForVideoClassification, "save_pretrained", save_less)
    with pytest.raises(ExportError, match="classifier"):
        tiny_export(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_folder_of_something_else(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists and is not an exported model"):
        tiny_export(folder)
    assert files_of(tmp_path) == {"model/notes.txt": b"mine"}


def foreign_file(folder):
    (folder / "thesis.tex").write_text("years of work")
    return "it holds 'thesis.tex'"


def foreign_folder(folder):
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    (folder / "README.md" / "notes.txt").write_text("mine")
    return "it holds 'README.md'"


def other_model(folder):
    (folder / "config.json").write_text('{"model_type": "videomae"}')
    return "it has no config.json of a VidPrism"


def broken_config(folder):
    (folder / "config.json").write_text("[]")
    return "it has no config.json of a VidPrism"


@pytest.mark.parametrize("spoil", [foreign_file, foreign_folder, other_model, broken_config])
def test_replaces_only_what_is_an_export_and_nothing_else(tmp_path, spoil):
    folder = tiny_export(tmp_path / "model")
    reason = spoil(folder)
    before = files_of(tmp_path)
    with pytest.raises(ExportError) as caught:
        tiny_export(folder)
    assert str(caught.value) == (f"{folder}: exists and is not an exported model ({reason}); choose another folder")
    assert files_of(tmp_path) == before


def test_a_file_that_comes_while_writing_stays(tmp_path, monkeypatch):
    def save_slowly(*args, **kwargs):
        (folder / "notes.txt").write_text("mine")
        return original(*args, **kwargs)

    folder = tiny_export(tmp_path / "model")
    original = VidPrismVideoProcessor.save_pretrained
    monkeypatch.setattr(VidPrismVideoProcessor, "save_pretrained", save_slowly)
    with pytest.raises(ExportError, match=r"it holds 'notes\.txt'"):
        tiny_export(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_old_export_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    def rename(path, target):
        calls.append(path)
        if len(calls) == 2:  # the first moved the old export aside
            raise PermissionError(13, "Permission denied")
        return original(path, target)

    folder = tiny_export(tmp_path / "model")
    before, calls, original = files_of(tmp_path), [], Path.rename
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ExportError, match="Permission denied"):
        tiny_export(folder, labels=("a", "b", "c"))
    assert files_of(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_remains_of_the_old_export_are_no_failure(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    folder = tiny_export(tmp_path / "model")
    monkeypatch.setattr(os, "unlink", refuse)  # by which shutil.rmtree removes files
    tiny_export(folder, labels=("a", "b", "c"))
    assert VidPrismForVideoClassification.from_pretrained(folder).config.num_labels == 3


def test_fills_an_empty_folder(tmp_path):
    (tmp_path / "model").mkdir()
    assert (tiny_export(tmp_path / "model") / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["file", "file/model", "file/deep/model"])
def test_unwritable(tmp_path, name):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ExportError) as caught:
        tiny_export(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert len(str(caught.value).splitlines()) == 1
    assert files_of(tmp_path) == {"file": b"no folder"}
