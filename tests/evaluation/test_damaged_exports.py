"""Exports of strangers: whatever is damaged, `vidprism predict` says so in one line, and no memory is asked for."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import complaint, tiny_export

from vidprism_cli import main

WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "video_preprocessor_config.json"
CLASSIFIER, QUERY = "classifier.weight", "vidprism.temporal_model.readout.query"


@pytest.fixture(scope="module")
def clip(motion_clips):
    return str(motion_clips / "val" / "growing" / "0.mp4")


@pytest.fixture
def export(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def refused(export, clip, capsys) -> str:
    """What predict says of an export, in one line and nowhere else."""
    assert main(["predict", str(export), clip, "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("vidprism ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    assert str(export) in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": [0]}, "rates must be positive"),
        ({"rates": list(range(1, 2000))}, "rates must be 1 to 16"),
        ({"num_frames": -1}, "must be at least 1, got -1"),
        ({"num_frames": 10**9}, "num_frames must be at least 1 and at most"),
        ({"merge_temperature": math.nan}, "merge_temperature must be a finite number"),
        ({"vision_config": []}, "vision_config"),
        ({"vision_config": {"hidden_act": "none"}}, "is damaged"),
        ({"vision_config": {"num_hidden_layers": 60}}, "weights are missing"),
        ({"vision_config": {"hidden_size": 16384, "intermediate_size": 65536}}, "has shape"),
        ({"vision_config": {"image_size": 4096}}, "its processor crops to 32 x 32, its tower takes 4096 x 4096"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": None}, "classifier.bias has shape (3,), not (2,)"),
        ({"id2label": {"0": "a", "1": "a"}, "label2id": None}, "several indices have the name 'a'"),
        ({"id2label": {"0": "a", "2": "b"}, "label2id": None}, "indices must be 0 to 1"),
        ({"num_labels": 10**9, "id2label": None, "label2id": None}, "num_labels must be 0 to"),
        ({"dtype": "float17"}, "is damaged"),
    ],
)
def test_a_configuration_that_cannot_be(export, clip, capsys, change, message):
    config = json.loads((export / CONFIG).read_text())
    for name, value in change.items():
        if isinstance(value, dict) and name == "vision_config":
            config[name] |= value
        elif value is None:
            del config[name]
        else:
            config[name] = value
    (export / CONFIG).write_text(json.dumps(config))
    assert message in refused(export, clip, capsys)


@pytest.mark.parametrize("file", [CONFIG, PROCESSOR])
@pytest.mark.parametrize("content", ["", "null", "[1, 2]", '"text"', "7", "{}", "[" * 100_000])
def test_a_file_that_holds_something_else(export, clip, capsys, file, content):
    (export / file).write_text(content)
    refused(export, clip, capsys)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (CLASSIFIER, torch.zeros(3, 64), f"{CLASSIFIER} has shape (2, 64), not (3, 64)"),
        (QUERY, torch.zeros(1, 1, 8), f"{QUERY} has shape"),
        ("more", torch.zeros(2), "has no place for 1 of them (more)"),
        ("classifier.bias", None, "1 weights are missing (classifier.bias)"),
        ("classifier.bias", torch.tensor([0, math.nan]), "classifier.bias holds values that are not finite"),
        (QUERY, torch.full((1, 1, 64), -math.inf), f"{QUERY} holds values that are not finite"),
    ],
)
def test_weights_of_another_model(export, clip, capsys, name, tensor, message):
    state = load_file(export / WEIGHTS)
    if tensor is None:
        del state[name]
    else:
        state[name] = tensor
    save_file(state, export / WEIGHTS, metadata={"format": "pt"})
    assert message in refused(export, clip, capsys)


def test_weights_that_could_hold_code_are_not_read(export, clip, capsys):
    torch.save(load_file(export / WEIGHTS), export / "pytorch_model.bin")
    (export / WEIGHTS).unlink()
    assert "it has no model.safetensors" in refused(export, clip, capsys)


@pytest.mark.parametrize("content", [b"", b"no tensors", (2**60).to_bytes(8, "little") + b"{}", None])
def test_weights_that_are_cut_off(export, clip, capsys, content):
    whole = (export / WEIGHTS).read_bytes()
    (export / WEIGHTS).write_bytes(whole[: len(whole) // 2] if content is None else content)
    refused(export, clip, capsys)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {"a": "../../../etc/passwd"}}'])
def test_an_index_of_shards_that_is_none(export, clip, capsys, index):
    (export / WEIGHTS).unlink()
    (export / "model.safetensors.index.json").write_text(index)
    refused(export, clip, capsys)


def test_scores_that_are_no_numbers(tmp_path, clip, capsys):
    """Weights that are finite each, and too large together."""
    export = tiny_export(tmp_path / "model")
    state = load_file(export / WEIGHTS)
    for name in (CLASSIFIER, "vidprism.temporal_model.readout.norm.weight"):
        state[name].fill_(3e38)
    save_file(state, export / WEIGHTS, metadata={"format": "pt"})
    assert "gives scores that are not finite numbers in torch.float32" in refused(export, clip, capsys)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_of_the_hub_in_a_configuration_is_one_line(tmp_path, capsys, field):
    """It would be fetched and run where the package `kernels` is installed."""
    export = tiny_export(tmp_path / "export")
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {field: "stranger/kernel"}))
    assert main(["predict", str(export), str(tmp_path / "clip.mp4")]) == 1
    said = complaint(capsys)
    assert "kernel 'stranger/kernel', which is code of the Hub" in said or field.startswith("_")
