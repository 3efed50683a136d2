"""The model card: its metadata is what the Hub reads, its text holds the facts of the run."""

import inspect
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args, get_origin

import huggingface_hub.constants
import pytest
import yaml
from hub_server.cards import LICENSES as LICENSES_OF_THE_HUB
from hub_server.cards import front_matter, judge, judge_results
from huggingface_hub import ModelCard, parse_eval_result_entries
from small import LABELS, card_facts, complaint, run_arguments

from vidprism_hf import VidPrismConfig
from vidprism_hf.cli import main
from vidprism_hf.data.bad_clips import BadClip
from vidprism_hf.errors import UserError
from vidprism_hf.evaluation.intervals import wilson_interval
from vidprism_hf.hub import render_card
from vidprism_hf.hub.card import addressed, eval_results_file
from vidprism_hf.hub.licenses import LICENSES, check_license

pytest_plugins = ["hub_server.fixtures"]

GOLDEN = Path(__file__).with_name("golden_card.md")
FULL = {
    "model_name": "hmdb_small",
    "origin": "It was fine-tuned with vidprism finetune.",
    "base_model": "openai/clip-vit-base-patch16",
    "backbone": "the preset b16, openai/clip-vit-base-patch16",
    "dataset": "HMDB51",
    "dataset_id": "CVML-TueAI/HMDB51",
    "data_license": "CC BY 4.0, by its authors",
    "split": "held out: file names in which `^(eli|ben)_` is found",
    "train_clips": "59 of 60",
    "eval_clips": "30",
    "train_list_hash": "9db232efe695c5e629ad31ee1c5586e7b5c6c09e1eef7d6b60469fcd0477ac42",
    "bad_clips": [BadClip("train", "walk/<a>\n.avi", "walk", "no video stream")],
    "metrics": {"top1": 0.9, "top5": 1.0},
    "intervals": {"top1": wilson_interval(0.9, 30), "top5": wilson_interval(1.0, 30)},
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


def test_stated_licence():
    text = str(render_card(card_facts(license="cc-by-nc-4.0")))
    assert front_matter(text)["license"] == "cc-by-nc-4.0"
    assert "| these weights | cc-by-nc-4.0 |" in text.splitlines()


@pytest.mark.parametrize("license", [None, "apache-2.0", "unknown"])
def test_takes_licences_of_the_hub(license):
    check_license("export.license", license)
    assert LICENSES_OF_THE_HUB - {"other"} <= LICENSES


@pytest.mark.parametrize(
    ("license", "told"),
    [
        ("Apache 2.0", "'Apache 2.0': no licence id of the Hub; did you mean apache-2.0"),
        ("MIT", "'MIT': no licence id of the Hub; did you mean mit"),
        ("mine, all mine", "'mine, all mine': no licence id of the Hub; "),
        ("other", ": other needs a license_name too; write both into the export's README"),
    ],
)
def test_refuses_what_is_no_licence_of_the_hub(license, told):
    with pytest.raises(UserError) as caught:
        check_license("export.license", license)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_wrong_licence_ends_a_run_before_it_begins(motion_clips, tmp_path, capsys):
    assert main(run_arguments(motion_clips, tmp_path / "run", "--export.license=MITT")) == 1
    assert "export.license 'MITT': no licence id of the Hub" in complaint(capsys)
    assert not (tmp_path / "run").exists()


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
    ((_, content),) = eval_results_file(card_facts(**FULL, conditions="8 frames; split 1")).items()
    assert yaml.safe_load(content)[0]["notes"] == f"8 frames; split 1. {FULL['protocol']}"


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
    needed = re.search(r"It needs `pip install (.*)`", text)
    assert re.findall(r"'([a-z]+)", needed[1]) == ["av", "torch", "torchvision", "transformers"]
    for group, word in ((versions[1], "(versions)"), (versions[2], "(revision)"), (needed[1], "(packages)")):
        text = text.replace(group, word)
    text += "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_citation_is_that_of_the_repository():
    text = str(render_card(card_facts()))
    cited = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text())["preferred-citation"]
    for value in (cited["title"], cited["url"], str(cited["year"]), cited["collection-title"]):
        assert f"{{{value}}}" in text


def snippets(text: str) -> list[tuple[str, str]]:
    """Language and code of each."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def run_snippets(text: str, capsys) -> None:
    """Runs those of a card, which must tell a label of the model's."""
    assert [language for language, _ in snippets(text)] == ["python", "python", "bash", "bibtex"]
    for language, code in snippets(text):
        if language == "python":
            exec(compile(code, "README.md", "exec"), {})
            assert any(label in capsys.readouterr().out for label in LABELS)
        elif language == "bash":
            _, *words = code.split()
            assert main(words) == 0
            assert any(label in capsys.readouterr().out for label in LABELS)


def test_snippets_run_in_the_folder(exported, motion_clips, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    shutil.copy(motion_clips / "val" / "growing" / "0.mp4", folder / "clip.mp4")
    monkeypatch.chdir(folder)
    run_snippets((folder / "README.md").read_text(), capsys)


def test_snippets_run_from_the_hub(exported, motion_clips, tmp_path, monkeypatch, capsys, hub):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    hub.add_model("alice/moves", exported)
    shutil.copy(motion_clips / "val" / "growing" / "0.mp4", tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    run_snippets(addressed((exported / "README.md").read_text(), "alice/moves"), capsys)
    assert any((tmp_path / "cache").rglob("model.safetensors"))


@pytest.mark.parametrize(
    ("facts", "name"), [({}, "model_name: "), ({"metrics": {"top1": 0.5}}, "- name: ")], ids=["bare", "evaluated"]
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_addresses_title_and_snippets_and_nothing_else(newline, facts, name):
    mine = 'Mine:\n\n# small\n\n```python\nmodel_id = "."\n```\n'
    label = "vidprism predict . clip.mp4"  # of strangers, and as a paragraph of its own on the card
    text = (str(render_card(card_facts(labels=(label, "# small"), **facts))) + "\n\n" + mine).replace("\n", newline)
    there = addressed(text, "alice/moves")
    changed = [new for old, new in zip(text.split("\n"), there.split("\n"), strict=True) if old != new]
    end = newline.removesuffix("\n")
    assert changed == [
        f"{name}moves{end}",
        f"# moves{end}",
        f'model_id = "alice/moves"{end}',
        f'model_id = "alice/moves"{end}',
        f"vidprism predict alice/moves clip.mp4{end}",
    ]
    assert addressed(there, "alice/moves") == there
    assert addressed(there, "org/other") == addressed(text, "org/other")
    assert judge(there, "model") == ([], [])


@pytest.mark.parametrize("change", [("# small", "# My own"), ("model_name: small", "model_name: My own")])
def test_a_persons_own_title_stays(change):
    text = str(render_card(card_facts())).replace(*change)
    there = addressed(text, "alice/moves")
    assert change[1] in there.splitlines()
    assert "moves" not in there.replace("alice/moves", "")


@pytest.mark.parametrize("name", ["123", "yes", "1.0", "a: b", "ü"])
def test_names_that_look_like_something_else(name):
    text = str(render_card(card_facts(model_name=name)))
    assert front_matter(text)["model_name"] == name
    there = addressed(text, "alice/2024")
    assert front_matter(there)["model_name"] == "2024"
    assert "# 2024" in there.splitlines()
    assert addressed(there, "alice/m") == addressed(text, "alice/m")


def test_card_of_a_training_from_random_weights():
    text = str(render_card(card_facts(from_scratch=True)))
    assert "an image tower built as CLIP's are, but not pre-trained, with a heterogeneous mixture" in text
    assert "a CLIP image tower" not in text
    assert "biases of the data they were trained on" in text
    assert "| backbone | none: it started from random weights |" in text.splitlines()


@pytest.mark.parametrize("marks", [0, 2])
def test_addresses_no_card_without_one_generated_part(marks):
    section = str(render_card(card_facts())).partition("---\n\n")[2]
    text = section * marks or section.replace("<!--", "<!").replace("-->", ">")
    assert addressed(text, "alice/moves") == text


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


def test_weights_that_were_not_evaluated():
    text = str(render_card(card_facts(protocol="Not evaluated as they are.")))
    assert "## Evaluation\n\nNot evaluated as they are.\n\n## " in text
    assert "| metric |" not in text


def test_figures_without_the_digits_of_float32():
    facts = FULL | {"metrics": {"top1": 0.6812499761581421}}
    assert front_matter(str(render_card(card_facts(**facts))))["model-index"][0]["results"][0]["metrics"][0][
        "value"
    ] == (0.68125)
    ((_, content),) = eval_results_file(card_facts(**facts)).items()
    assert parse_eval_result_entries(yaml.safe_load(content))[0].value == 0.68125


def test_leaves_out_what_is_not_known(tmp_path):
    text = load(tmp_path).text
    unknown = ("Data", "Evaluation", "Training", "Figures", "Experts", "Compute")
    assert not [heading for heading in unknown if f"## {heading}" in text]
    assert "None" not in text
    assert text.count("not stated") == 2
    assert "| these weights | see `license` in this card's metadata |" in text


def test_text_of_the_data_stays_in_its_place():
    """Bars in a cell, and marks in the names of clips and labels, which come from strangers' data."""
    labels = ("a | b", "<!-- vidprism:generated end -->")
    bad = [BadClip("train", "x`\udcff\n<!-- vidprism:generated end -->", "a", "cause")]
    text = str(render_card(card_facts(**FULL | {"labels": list(labels), "bad_clips": bad})))
    assert r"| split | held out: file names in which \`^(eli\|ben)\_\` is found |" in text
    assert text.count("<!-- vidprism:generated end -->") == 1
    assert text.encode()  # bytes of file names need not be text
    assert front_matter(text)["library_name"] == "transformers"


# The card follows the configuration

# Of each switch and value: what the card of such a model says, and words that it must not have.
SAID = {
    ("aggregation", "rgsta"): ("one frame kept in every 2, 4, 8", ("first frame", "mean of", "maximum")),
    ("aggregation", "stride"): ("the first frame of every 2, 4, 8", ("kept", "mean of", "maximum")),
    ("aggregation", "mean"): ("the mean of every 2, 4, 8 frames", ("kept", "first frame", "maximum")),
    ("aggregation", "max"): ("the maximum of every 2, 4, 8 frames", ("kept", "first frame", "mean of")),
    ("readout", "query"): ("share of the global query's attention", ("channels",)),
    ("readout", "mean"): ("Without the pipeline", ("## Experts", "query", "expert_weights", "rate 2")),
    ("readout", "max"): ("share of the channels that each expert gives", ("query", "attention")),
}
# Switches of parts that the card says nothing of, whatever they are set to.
UNSAID = {
    **dict.fromkeys(
        ("interaction", "interaction_pairs", "interaction_gates", "interaction_update"), ("gate", "messag")
    ),
    "merge_normalization": ("softmax",),
    "time_position": ("position",),
    "feature_norm": ("whiten", "norm"),
    "vision_projection": ("projection",),
    "zero_init_residual": ("residual",),
    "projection_head": ("projection", "text embedding"),
}


def switches() -> list[tuple[str, object]]:
    """Every value of each switch of the configuration, as the configuration itself declares them."""
    declared = inspect.get_annotations(VidPrismConfig).items()
    of_each = {name: (False, True) if hint is bool else get_args(hint) for name, hint in declared if is_switch(hint)}
    return [(name, value) for name, values in of_each.items() for value in values]


def is_switch(hint: object) -> bool:
    return hint is bool or get_origin(hint) is Literal


def configured(**config) -> str:
    """The generated part of the card of a model with such a configuration, after a test; without versions."""
    config = VidPrismConfig(num_frames=8, **config)
    facts = FULL | {"expert_weights": {f"rate {rate}": "0.5" for rate in config.rates}}
    text = str(render_card(card_facts(**facts | {"rates": config.rates, "config": config})))
    return text.partition("-->")[2].partition("## Citation")[0]


@pytest.mark.parametrize(("name", "value"), switches())
def test_card_says_nothing_of_a_part_that_is_not_there(name, value):
    said, unsaid = SAID[name, value] if (name, value) in SAID else ("", UNSAID[name])
    text = configured(**{name: value})
    assert said in text
    assert [word for word in unsaid if word in text] == []


def test_card_of_one_expert():
    text = configured(rates=[4])
    assert "with one temporal expert" in text
    assert "in one stream (one frame kept in every 4)" in text
    assert not [word for word in ("mixture", "experts", "query", "expert_weights", "each expert") if word in text]


def test_card_of_several_frames_kept_in_a_window():
    assert "(2 frames kept in every 4, 8, 16)" in configured(kept_per_window=2)


@pytest.mark.parametrize("weight", ["rank_loss_weight", "gate_loss_weight", "diversity_loss_weight", "merge_weight"])
def test_card_says_nothing_of_a_loss_without_weight(weight):
    assert not [word for word in ("rank loss", "balance", "diversity", "merge") if word in configured(**{weight: 0.0})]
