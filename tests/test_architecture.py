"""The rooms of the package: imports run one way."""

import ast
from pathlib import Path

import pytest

import vidprism_hf

PACKAGE = Path(vidprism_hf.__file__).parent
# Room -> the rooms that it may import from, beside the modules at the top of the package.
ROOMS = {
    "model": set(),
    "data": {"model"},
    "hub": {"model"},
    "convert": {"model"},
    "evaluation": {"model", "data", "hub"},
    "training": {"model", "data", "hub", "evaluation"},
    "ablation": {"model", "data", "hub", "evaluation", "training"},
    "cli": {"model", "data", "hub", "convert", "evaluation", "training", "ablation"},
}
# The way of a video through data/, from the top down: each may import from those that follow.
DATA = ["datamodule", "open", "config", "features", "streaming", "loading", "sources", "fetch", "reading"]


def imports(path: Path) -> set[tuple[str, ...]]:
    """Returns the modules of the package that a file imports, also within functions, as parts of their names."""
    inside = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = inside[: len(inside) - node.level + 1]
            module = (*base, *(node.module.split(".") if node.module else ()))
            found |= {module if node.module else (*module, name.name) for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "vidprism_hf":
            found.add(tuple(node.module.split(".")[1:]))
        elif isinstance(node, ast.Import):
            found |= {tuple(n.name.split(".")[1:]) for n in node.names if n.name.partition(".")[0] == "vidprism_hf"}
    return found


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_those_below_it(room):
    wrong = [
        f"{path.relative_to(PACKAGE)}: {'.'.join(module)}"
        for path in files(PACKAGE / room)
        for module in imports(path)
        if module and module[0] in ROOMS and module[0] != room and module[0] not in ROOMS[room]
    ]
    assert wrong == []


def test_every_room_is_known():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


def test_the_modules_at_the_top_know_no_room_but_the_model():
    tops = [path for path in PACKAGE.glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    wrong = [
        f"{path.name}: {module}"
        for path in tops
        for module in imports(path)
        if module[:1] != ("model",) and module[:1] and module[0] in ROOMS
    ]
    assert wrong == []


def test_the_way_of_a_video_runs_one_way():
    wrong = []
    for place, room in enumerate(DATA):
        paths = (
            [PACKAGE / "data" / f"{room}.py"]
            if (PACKAGE / "data" / f"{room}.py").exists()
            else files(PACKAGE / "data" / room)
        )
        for path in paths:
            for module in imports(path):
                if len(module) > 1 and module[0] == "data" and module[1] in DATA[:place]:
                    wrong.append(f"{path.relative_to(PACKAGE)}: {'.'.join(module)}")
    assert wrong == []


def test_only_the_command_line_knows_lightnings_and_argv():
    for path in files(PACKAGE):
        if path.relative_to(PACKAGE).parts[0] == "cli":
            continue
        text = path.read_text(encoding="utf-8")
        assert "LightningCLI" not in text, path
        assert "lightning.pytorch.cli" not in text, path
        assert "sys.argv" not in text, path
        assert "argparse" not in text, path
