"""Every recipe parses through the real command line, and every key in it says what it is for."""

from pathlib import Path

import pytest
import yaml
from benchmark_layouts import local_copy
from small import LABELS, motion_folder

from vidprism_hf.cli.recipe import parse
from vidprism_hf.data.sources.benchmarks import BENCHMARKS

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
RULES = {"val_fraction": "0.5", "val_list": None, "val_pattern": "^0"}


def recipe_name(path: Path) -> str:
    return path.relative_to(FOLDER).with_suffix("").as_posix()


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
    if data.get("source") in BENCHMARKS:
        root = local_copy(data["source"], tmp_path / "data", train=2, val=1).parent
        return [f"--data.root={root}", "--data.verify_counts=false", "--data.shots=1"]
    rules = [name for name in RULES if data.get(name) is not None]
    if not rules:
        return [f"--data.source={motion_clips}"]
    value = RULES[rules[0]]
    if value is None:
        listing = tmp_path / "val.txt"
        listing.write_text(f"{LABELS[0]}/0.mp4\n")
        value = listing
    return [f"--data.source={one_level}", f"--data.{rules[0]}={value}"]


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_name)
def test_parses(recipe, motion_clips, one_level, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(recipe.read_text())
    data = data_for(content, motion_clips, one_level, tmp_path)
    cli = parse(["--config", str(recipe), *data, "--trainer.accelerator=cpu", "--trainer.devices=1"])
    assert cli.model.id2label == cli.datamodule.id2label
    assert cli.datamodule.hparams.num_frames == cli.model.hparams.num_frames
    for name, value in content["model"].items():
        assert cli.model.hparams[name] == value
    overridden = {argument.removeprefix("--data.").partition("=")[0] for argument in data}
    for name, value in content["data"].items():
        assert name in overridden or cli.datamodule.hparams[name] == value
    assert cli.config.output == content["output"]
    assert {path.name for path in tmp_path.iterdir()} <= {"val.txt", "data"}  # parsing writes no run


def scalar_keys(node: yaml.Node):
    """The keys that have a value, not a section, below them."""
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode):
            yield from scalar_keys(value)
        else:
            yield key


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_name)
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
