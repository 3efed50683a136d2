"""Every recipe parses through the real command line, and every key in it says what it is for."""

from pathlib import Path

import pytest
import yaml
from small import LABELS, motion_folder

from vidprism_hf.training.finetune import parse

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))
RULES = {"val_fraction": "0.5", "val_list": None, "val_pattern": "^0"}


@pytest.fixture(scope="module")
def one_level(tmp_path_factory):
    """The same motions without train/ and val/, for recipes that split by a rule."""
    root = motion_folder(tmp_path_factory.mktemp("data") / "split", train=2, val=1)
    return root / "train"


def data_for(recipe: dict, motion_clips: Path, one_level: Path, tmp_path: Path) -> list[str]:
    """Overrides that give a recipe clips to read: of the layout that it is written for."""
    data = recipe.get("data", {})
    if data.get("source") == "demo":
        return []  # its labels are known before a clip is rendered
    rules = [name for name in RULES if data.get(name) is not None]
    if not rules:
        return [f"--data.source={motion_clips}"]
    value = RULES[rules[0]]
    if value is None:
        listing = tmp_path / "val.txt"
        listing.write_text(f"{LABELS[0]}/0.mp4\n")
        value = listing
    return [f"--data.source={one_level}", f"--data.{rules[0]}={value}"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_parses(recipe, motion_clips, one_level, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(recipe.read_text())
    data = data_for(content, motion_clips, one_level, tmp_path)
    cli = parse(["--config", str(recipe), *data, "--trainer.accelerator=cpu", "--trainer.devices=1"])
    assert cli.model.id2label == cli.datamodule.id2label
    assert cli.datamodule.hparams.num_frames == cli.model.hparams.num_frames
    for name, value in content["model"].items():
        assert cli.model.hparams[name] == value
    assert cli.config.output == content["output"]
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "val.txt"])  # parsing writes nothing


def scalar_keys(node: yaml.Node):
    """The keys that have a value, not a section, below them."""
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode):
            yield from scalar_keys(value)
        else:
            yield key


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_key_has_a_comment(recipe):
    text = recipe.read_text()
    lines = text.splitlines()
    bare = [
        key.value
        for key in scalar_keys(yaml.compose(text))
        if "#" not in lines[key.start_mark.line] and not lines[key.start_mark.line - 1].lstrip().startswith("#")
    ]
    assert bare == []


def test_there_are_recipes():
    assert "demo" in {recipe.stem for recipe in RECIPES}
