"""The model card: its metadata is what the Hub reads, its text holds the facts of the run."""

import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from hub_server.cards import front_matter, judge, judge_results
from huggingface_hub import ModelCard, parse_eval_result_entries
from small import LABELS, card_facts

from vidprism_hf.cli import main
from vidprism_hf.data.bad_clips import BadClip
from vidprism_hf.hub import render_card
from vidprism_hf.hub.card import eval_results_file

pytest_plugins = ["hub_server.fixtures"]

GOLDEN = Path(__file__).with_name("golden_card.md")
FULL = {
    "model_name": "hmdb_small",
    "origin": "It was fine-tuned with `vidprism finetune`.",
    "base_model": "openai/clip-vit-base-patch16",
    "backbone": "clip-vit-base-patch16",
    "dataset": "HMDB51",
    "dataset_id": "CVML-TueAI/HMDB51",
    "data_license": "CC BY 4.0, by its authors",
    "split": "held out: file names in which `^(eli|ben)_` is found",
    "train_clips": "59 of 60",
    "eval_clips": "30",
    "train_list_hash": "9db232efe695c5e629ad31ee1c5586e7b5c6c09e1eef7d6b60469fcd0477ac42",
    "bad_clips": [BadClip("train", "walk/<a>\n.avi", "walk", "no video stream")],
    "metrics": {"top1": 0.9, "top5": 1.0},
    "num_evaluated": 30,
    "protocol": "Best checkpoint by held-out top-1; 8 frames x 1 crop x 1 clip.",
    "hyper_parameters": {"epochs": 30, "learning rate": 5e-05, "backbone": "frozen", "clipping": None, "seed": 0},
    "augmentation": {"crop": "random, 0.08 to 1 of the frame, to 224 x 224", "horizontal flip": "on"},
    "compute": {"GMACs per view (counted)": "140.5", "device": "1 x CPU", "wall time of training": "1 min 02 s"},
    "figures": {"figures/curves.png": "Loss and held-out top-1 over the epochs"},
    "expert_weights": {"rate 2": "0.5", "rate 4": "0.3", "rate 8": "0.2"},
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
    assert data.datasets == ["CVML-TueAI/HMDB51"]
    assert data.metrics == ["accuracy"]
    assert data.license == "unknown"  # nobody has stated it
    assert {"vidprism", "video-classification"} <= set(data.tags)
    # The model index, as huggingface_hub reads it back.
    assert data.model_name == "hmdb_small"
    results = [(each.metric_type, each.metric_name, each.metric_value) for each in data.eval_results]
    assert results == [("accuracy", "Top-1 accuracy", 0.9), ("accuracy", "Top-5 accuracy", 1.0)]
    assert {(each.task_type, each.dataset_type, each.dataset_name) for each in data.eval_results} == {
        ("video-classification", "CVML-TueAI/HMDB51", "HMDB51")
    }


def test_metadata_without_an_evaluation(tmp_path):
    data = load(tmp_path).data.to_dict()
    assert data["pipeline_tag"] == "video-classification"
    assert not {"model-index", "metrics", "base_model", "datasets"} & data.keys()


@pytest.mark.parametrize("facts", [FULL, {}, FULL | {"license": "mit"}], ids=["full", "converted", "licensed"])
def test_the_hub_takes_the_metadata(hub, monkeypatch, facts):
    card = render_card(card_facts(**facts))
    assert judge(str(card), "model") == ([], [])
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    card.validate()


def test_results_in_the_newer_form():
    ((name, content),) = eval_results_file(card_facts(**FULL)).items()
    assert name == ".eval_results/CVML-TueAI--HMDB51.yaml"
    assert judge_results(content.decode()) is None
    entries = parse_eval_result_entries(yaml.safe_load(content))
    assert [(each.dataset_id, each.task_id, each.value) for each in entries] == [
        ("CVML-TueAI/HMDB51", "top1", 0.9),
        ("CVML-TueAI/HMDB51", "top5", 1.0),
    ]
    assert entries[0].notes == FULL["protocol"]


@pytest.mark.parametrize("lacking", ["dataset_id", "metrics"])
def test_no_results_file_without_results_on_a_dataset_of_the_hub(lacking):
    assert eval_results_file(card_facts(**{name: FULL[name] for name in FULL if name != lacking})) == {}


def test_whole_card():
    """Versions and revision aside. A change is looked at and taken over with `UPDATE_GOLDEN=1 pytest`."""
    text = str(render_card(card_facts(**FULL)))
    versions = re.search(r"## Versions\n\n(.*)\n\n(.*)\n", text)
    for name in ("vidprism_hf", "torch", "transformers", "lightning", "huggingface_hub", "av"):
        assert f"{name} {version(name)}" in versions[1]
    assert re.fullmatch(r"Git revision of vidprism_hf: (unknown|[0-9a-f]{40}(, with changes)?)", versions[2])
    text = text.replace(versions[1], "(versions)").replace(versions[2], "(revision)") + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_citation_is_that_of_the_repository():
    text = str(render_card(card_facts()))
    cited = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text())["preferred-citation"]
    for value in (cited["title"], cited["url"], str(cited["year"]), cited["collection-title"]):
        assert f"{{{value}}}" in text


def test_snippets_run(exported, motion_clips, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    shutil.copy(motion_clips / "val" / "growing" / "0.mp4", folder / "clip.mp4")
    monkeypatch.chdir(folder)
    text = (folder / "README.md").read_text()
    snippets = re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert [language for language, _ in snippets] == ["python", "python", "bash", "bibtex"]
    for language, code in snippets:
        if language == "python":
            exec(compile(code, "README.md", "exec"), {})
            assert any(label in capsys.readouterr().out for label in LABELS)
        elif language == "bash":
            _, *words = code.split()
            assert main(words) == 0


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
    unknown = ("Data", "Evaluation", "Training", "Figures", "Experts", "Compute")
    assert not [heading for heading in unknown if f"## {heading}" in text]
    assert "None" not in text
    assert text.count("not stated") == 3


def test_text_of_the_data_stays_in_its_place():
    """Bars in a cell, and marks in the names of clips and labels, which come from strangers' data."""
    labels = ("a | b", "<!-- vidprism:generated end -->")
    bad = [BadClip("train", "x`\udcff\n<!-- vidprism:generated end -->", "a", "cause")]
    text = str(render_card(card_facts(**FULL | {"labels": list(labels), "bad_clips": bad})))
    assert r"| split | held out: file names in which `^(eli\|ben)_` is found |" in text
    assert text.count("<!-- vidprism:generated end -->") == 1
    assert text.encode()  # bytes of file names need not be text
    assert front_matter(text)["library_name"] == "transformers"
