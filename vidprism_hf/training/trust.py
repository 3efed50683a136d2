"""Which classes a recipe may name: Lightning's and ours, unless whoever runs it trusts it.

A class that a recipe names (`class_path`, or a function by its import path) is imported and built: such a recipe is
code. jsonargparse asks before each import; what is allowed here runs nothing of the recipe's, and writes to the run's
folder or below the present one.
"""

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from jsonargparse._common import parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from ..errors import UserError
from ..safe_yaml import check_bounds, read_mapping

OPTION = "--trust-recipe"
HELP = f"A recipe may name classes of Lightning and of this package. With {OPTION} it may name any: then it is code."
# Each with all that is below it. Loggers of services are not among them: they send what a run says elsewhere.
ALLOWED = (
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.pytorch.loggers.csv_logs",
    "lightning.pytorch.loggers.tensorboard",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.fabric.plugins",
    "vidprism_hf.training.averaging.WeightEMA",
    "vidprism_hf.training.push_callback.PushToHub",
)
# Of these, what is nothing but functions of others.
DENIED = ("lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.lambda_function")
SECTIONS = ("model", "data", "trainer", "checkpoint", "export", "evaluation")
REFUSED = re.compile(r"Importing '([^']+)' is not allowed")
KEY = re.compile(r'Parser key "([\w.]+)"')
OUTSIDE = re.compile(r"[~/\\]|[A-Za-z]:[\\/]|\w+://|(.*[/\\])?\.\.([/\\]|$)")


class RecipeParser(LightningArgumentParser):
    """LightningCLI's parser, for which no setting is a file to read it from: one is what the recipe says."""

    def add_class_arguments(self, *args: Any, **settings: Any) -> list[str]:
        return super().add_class_arguments(*args, **{**settings, "sub_configs": False})


@contextmanager
def reading(trusted: bool) -> Iterator[None]:
    """Lets jsonargparse read YAML within bounds and, unless the recipe is trusted, import only what is allowed."""
    load = get_loader("yaml")

    def bounded(text: str) -> Any:
        check_bounds(text)
        return load(text)

    # It has no way to take a setting back.
    with patch.dict(parsing_settings):
        set_loader("yaml", bounded, (yaml.YAMLError,))
        try:
            set_parsing_settings(instantiate_subclass_spec_in_any=False)
            if not trusted:
                set_parsing_settings(import_path_denylist=["*", *DENIED], import_path_allowlist=list(ALLOWED))
            yield
        finally:
            set_loader("yaml", load, (yaml.YAMLError,))


def take_trust(argv: list[str]) -> tuple[bool, list[str]]:
    """Whether the command line itself says that its recipe is trusted, and the rest of it."""
    return OPTION in argv, [word for word in argv if word != OPTION]


def recipes_of(argv: list[str]) -> list[str]:
    """The recipes that a command line names, in their order."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", nargs="?", default=[])
    return [name for name in parser.parse_known_args(argv)[0].config if name]


def check_recipes(argv: list[str]) -> None:
    """Reads the recipe files of a command line, as far as they are there, before anything is made of them.

    Raises:
        UserError: If one cannot be read within bounds.
    """
    for name in recipes_of(argv):
        if os.path.exists(name):  # else it may be what a recipe says
            read_recipe(name)


def read_recipe(name: str) -> dict[str, Any]:
    """What a recipe file says.

    Raises:
        UserError: If it cannot be read, or one of its sections lies in another file.
    """
    content = read_mapping(name)
    if not content:
        raise UserError(f"{name}: is empty; give a recipe such as recipes/folder.yaml")
    if "config" in content:
        raise UserError(f"{name}: config={content['config']!r:.60}: a recipe names no other; give both by --config")
    for section in SECTIONS:
        if not isinstance(content.get(section) or {}, dict):
            raise UserError(f"{name}: {section}={content[section]!r:.60}: must be settings, one a line below it")
    return content


def refusal(error: Exception) -> str | None:
    """What to say of a class that was refused; None if the error is another one."""
    text = str(error)
    if (refused := REFUSED.search(text)) is None:
        return None
    key = KEY.search(text)
    return (
        f"{key[1] if key else 'recipe'}: names {refused[1]}, which may run any code or send data away; remove it, "
        f"or if you trust the recipe, add {OPTION}"
    )


def check_places(settings: Any, key: str = "trainer") -> None:
    """Looks whether a class that a recipe names would write outside the run's folder and the present one.

    Args:
        settings: Those of the trainer, or a part.
        key: Their name.

    Raises:
        UserError: If one would.
    """
    if isinstance(settings, Namespace | dict):
        inside = vars(settings) if isinstance(settings, Namespace) else settings
        for name, value in inside.items():
            if "class_path" not in inside or name == "class_path":
                check_places(value, f"{key}.{name}" if name not in ("init_args", "dict_kwargs") else key)
            elif isinstance(value, Namespace | dict):
                for argument, given in (vars(value) if isinstance(value, Namespace) else value).items():
                    if isinstance(given, str) and OUTSIDE.match(given):
                        raise UserError(
                            f"{key}.{argument}={given}: lies outside the run's folder; name one inside, or if you "
                            f"trust the recipe, add {OPTION}"
                        )
                    check_places(given, f"{key}.{argument}")
    elif isinstance(settings, list | tuple):
        for value in settings:
            check_places(value, key)


def own_classes(value: Any) -> Any:
    """A setting of the trainer without classes that a recipe may not name by itself; None where nothing is left."""
    if isinstance(value, list):
        return [kept for kept in map(own_classes, value) if kept is not None] or None
    return None if any(not is_allowed(name) for name in _class_paths(value)) else value


def is_allowed(class_path: str) -> bool:
    """Whether a recipe may name a class without being trusted."""

    def below(names: tuple[str, ...]) -> bool:
        return any(class_path == name or class_path.startswith(f"{name}.") for name in names)

    return below(ALLOWED) and not below(DENIED)


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "class_path" in value:
            yield value["class_path"]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _class_paths(part)
