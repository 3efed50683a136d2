"""`vidprism recipes`: lists the recipes that come with the package, or prints one."""

import argparse
import difflib
import sys
from pathlib import Path

from ..errors import UserError

PACKAGE = Path(__file__).parents[1]


def recipes_folder() -> Path:
    """Returns the folder of the recipes: in the installed package, or beside it in a checkout."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def recipe_names() -> list[str]:
    """Returns the names of the recipes, such as `ucf101` and `few_shot/ucf101`."""
    folder = recipes_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Returns the file of a recipe: a path, or the name of one that comes with the package.

    Raises:
        UserError: If there is none.
    """
    if Path(name).exists() or Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    names = recipe_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        advice = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
        raise UserError(f"--config {name}: no such file or recipe; {advice}")
    return recipes_folder() / f"{name}.yaml"


def main(argv: list[str]) -> int:
    """Lists the recipes with their first line, or prints one."""
    parser = argparse.ArgumentParser(
        prog="vidprism recipes",
        description="Lists the recipes, each of which `vidprism finetune --config NAME` takes; with a name prints it, "
        "to be copied: vidprism recipes ucf101 > my.yaml",
    )
    parser.add_argument("name", nargs="?", help="recipe to print")
    name = parser.parse_args(argv).name
    if name is not None:
        sys.stdout.write(find_recipe(name).read_text(encoding="utf-8"))
        return 0
    names = recipe_names()
    width = max(map(len, names)) + 2
    for each in names:
        first = find_recipe(each).read_text(encoding="utf-8").partition("\n")[0]
        print(f"{each:<{width}}{first.lstrip('# ')}")
    return 0
