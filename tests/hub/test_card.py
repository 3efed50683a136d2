"""The model card: its metadata is what the Hub reads, its text holds the facts of the run."""

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from small import LABELS, card_facts

from vidprism_hf import __version__
from vidprism_hf.data.bad_clips import BadClip
from vidprism_hf.hub import render_card

FULL = {
    "model_name": "weizmann_small",
    "origin": "It was fine-tuned with `vidprism finetune`.",
    "base_model": "openai/clip-vit-base-patch16",
    "backbone": "clip-vit-base-patch16",
    "dataset": "weizmann",
    "split": "held out: file names in which `^eli_` is found",
    "train_clips": "59 of 60",
    "eval_clips": "30",
    "train_list_hash": "0123abcd",
    "bad_clips": [BadClip("train", "bend/eli_bend.avi", "bend", "is cut off")],
    "metrics": {"top1": 0.9, "top5": 1.0},
    "protocol": "Best checkpoint by held-out top-1; 8 frames x 1 crop x 1 clip.",
    "hyper_parameters": {"epochs": 30, "learning rate": 5e-05, "backbone": "frozen", "seed": 0},
}


def load(tmp_path, **facts):
    """A card as a reader gets it: from the file."""
    render_card(card_facts(**facts)).save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def test_metadata(tmp_path):
    data = load(tmp_path, **FULL).data
    assert data.pipeline_tag == "video-classification"
    assert data.library_name == "transformers"
    assert data.base_model == "openai/clip-vit-base-patch16"
    assert data.metrics == ["accuracy"]
    assert {"vidprism", "video-classification"} <= set(data.tags)
    # The model index, as huggingface_hub reads it back.
    assert data.model_name == "weizmann_small"
    results = [(each.metric_type, each.metric_name, each.metric_value) for each in data.eval_results]
    assert results == [("accuracy", "Top-1 accuracy", 0.9), ("accuracy", "Top-5 accuracy", 1.0)]
    assert {(each.task_type, each.dataset_name, each.dataset_split) for each in data.eval_results} == {
        ("video-classification", "weizmann", "val")
    }


def test_metadata_without_an_evaluation(tmp_path):
    data = load(tmp_path).data.to_dict()
    assert data["pipeline_tag"] == "video-classification"
    assert not {"model-index", "metrics", "base_model"} & data.keys()


def test_facts(tmp_path):
    lines = load(tmp_path, **FULL).text.splitlines()
    expected = [
        "# weizmann_small",
        "Run in this folder, or give its path or Hub id as the model:",
        'classify = pipeline("video-classification", model=".")',
        "| dataset | weizmann |",
        "| split | held out: file names in which `^eli_` is found |",
        "| training clips | 59 of 60 |",
        "| sha256 of the training list | `0123abcd` |",
        "- train: `bend/eli_bend.avi`: is cut off",
        "| held-out clips | 30 |",
        "Best checkpoint by held-out top-1; 8 frames x 1 crop x 1 clip.",
        "| top1 | 0.9000 |",
        "| top5 | 1.0000 |",
        "Backbone: `clip-vit-base-patch16`.",
        "| epochs | 30 |",
        "| learning rate | 5e-05 |",
        "| backbone | frozen |",
        "| seed | 0 |",
        ", ".join(LABELS),
    ]
    assert [line for line in expected if line not in lines] == []
    text = " ".join(lines)
    assert "It reads 8 frames of a clip in 3 streams (rates 2, 4, 8) and knows 2 classes." in text
    assert "It was fine-tuned with `vidprism finetune`." in text
    for name, version in (
        ("vidprism_hf", __version__),
        ("torch", torch.__version__.split("+")[0]),
        ("transformers", transformers.__version__),
        ("huggingface_hub", huggingface_hub.__version__),
    ):
        assert f"{name} {version}" in lines[-1]


@pytest.mark.parametrize("facts", [FULL, {}], ids=["full", "converted"])
def test_tables_and_headings_are_well_formed(tmp_path, facts):
    lines = load(tmp_path, **facts).text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("#"):
            assert lines[number - 1] == lines[number + 1] == "", line
        if line.startswith("| ---"):
            assert lines[number - 2] == "", line  # else Markdown makes no table of it
            assert lines[number - 1].startswith("|")
            assert lines[number + 1].startswith("| ")


def test_leaves_out_what_is_not_known(tmp_path):
    text = load(tmp_path).text
    assert not [heading for heading in ("## Data", "## Evaluation", "## Training") if heading in text]
    assert "None" not in text


def test_a_split_rule_with_bars_stays_in_its_cell():
    card = render_card(card_facts(dataset="clips", split="held out: `^(anna|ben)_`", train_clips="1", eval_clips="1"))
    assert r"| split | held out: `^(anna\|ben)_` |" in str(card)
