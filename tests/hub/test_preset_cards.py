"""The cards of the presets: up to date, taken by the Hub, and no figure without a source."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from hub_server.cards import front_matter, judge

from vidprism_hf.model import VISION_PRESETS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "model_cards"
TOWERS = ("b32", "b16", "l14")


@pytest.fixture(scope="module")
def presets() -> dict:
    return yaml.safe_load((FOLDER / "presets.yaml").read_text())


def text(tower: str) -> str:
    return (FOLDER / f"{tower}.md").read_text()


def test_every_preset_and_benchmark_has_its_place(presets):
    assert set(TOWERS) == presets["towers"].keys() == VISION_PRESETS.keys() - {"tiny"}
    for tower in TOWERS:
        recipes = re.findall(r"`recipes/(\w+)\.yaml`", text(tower))
        assert recipes == ["k400", "ucf101", "hmdb51", "ssv2"]
        assert all((ROOT / "recipes" / f"{name}.yaml").is_file() for name in recipes)


@pytest.mark.slow
def test_are_up_to_date():
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stale = [name for name, card in generate.cards().items() if (FOLDER / name).read_text() != card]
    assert stale == [], "run `make cards`"


@pytest.mark.parametrize("tower", TOWERS)
def test_the_hub_takes_the_metadata(tower):
    assert judge(text(tower), "model") == ([], [])
    data = front_matter(text(tower))
    assert data["base_model"] == VISION_PRESETS[tower]["name_or_path"]
    assert "model-index" not in data  # the paper's figures are not those of weights in the repository


@pytest.mark.parametrize("tower", TOWERS)
def test_figures_are_the_papers_or_measured(presets, tower):
    rows = re.findall(r"^\| (the paper's|ours|not yet measured by us) \| ([\d.]*) \|", text(tower), flags=re.MULTILINE)
    known = {str(row["top1"]) for row in presets["paper"]["results"] if row["tower"] in (tower, None)}
    assert {figure for whose, figure in rows if whose == "the paper's"} == known
    measured = [row for row in presets["measured"] if row["tower"] == tower]
    assert len([whose for whose, _ in rows if whose == "ours"]) == len(measured)
    missing = {row["dataset"] for row in measured} ^ set(presets["datasets"])
    assert [figure for whose, figure in rows if whose == "not yet measured by us"] == [""] * len(missing)


def test_the_recipes_page_quotes_the_same_figures(presets):
    page = (ROOT / "recipes" / "README.md").read_text()
    assert presets["paper"]["note"] in page
    for row in presets["paper"]["results"]:
        assert re.search(rf"\| {row['top1']} ", page), row


@pytest.mark.slow
@pytest.mark.parametrize("tower", TOWERS)
def test_snippet_runs(tower, monkeypatch, capsys):
    monkeypatch.setitem(VISION_PRESETS[tower], "name_or_path", None)  # random weights: there is no Hub here
    (code,) = re.findall(r"^```python\n(.*?)^```$", text(tower), flags=re.DOTALL | re.MULTILINE)
    exec(compile(code, f"{tower}.md", "exec"), {})
    assert capsys.readouterr().out == "[2, 4, 8]\n"
