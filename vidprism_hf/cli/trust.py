"""Restricts the classes that a recipe may name to Lightning's and ours, unless the user trusts it.

A class named in a recipe (`class_path`, or a function by its import path) is imported and built, so such a recipe is
code. jsonargparse checks each import against the allowlist; allowed classes run no code from the recipe, and write to
the run's folder or below the current one.
"""

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from jsonargparse._common import parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from ..errors import UserError
from ..safe_yaml import check_bounds, read_mapping
from ..training.allowed import ALLOWED, DENIED
from ..util import shorten

OPTION = "--trust-recipe"
HELP = f"A recipe may name classes of Lightning and of this package. With {OPTION} it may name any: then it is code."
PUBLISHES = ".PushToHub"
SECTIONS = ("model", "data", "trainer", "checkpoint", "export", "evaluation")
REFUSED = re.compile(r"Importing '([^']+)' is not allowed")
KEY = re.compile(r'Parser key "([\w.]+)"')
# A path outside the folder: absolute, of a home, a drive, a URL or a chain of file systems, by `..`, or one that could
# become such: of several lines, or with a placeholder whose format makes letters of numbers.
OUTSIDE = re.compile(
    r"[~/\\]|[A-Za-z]:[\\/]|.*(://|::|[\n\r\0])|(.*[/\\])?\.\.([/\\]|$)|.*\{[^}:]*([.\[]|:(?!0?\d*(\.\d+)?[defg%]?\}))",
    re.DOTALL,
)


class RecipeParser(LightningArgumentParser):
    """LightningCLI's parser without settings that are read from further files."""

    def add_class_arguments(self, *args: Any, **settings: Any) -> list[str]:
        return super().add_class_arguments(*args, **{**settings, "sub_configs": False})


@contextmanager
def reading(trusted: bool) -> Iterator[None]:
    """Limits jsonargparse's YAML and, unless the recipe is trusted, its imports to allowed classes."""
    load = get_loader("yaml")

    def bounded(text: str) -> Any:
        check_bounds(text)
        return load(text)

    # jsonargparse cannot restore a setting.
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
    """Returns whether the command line trusts its recipe, and the remaining arguments."""
    return OPTION in argv, [word for word in argv if word != OPTION]


def recipes_of(argv: list[str]) -> list[str]:
    """Returns the recipes that a command line names, in order."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", nargs="?", default=[])
    return [name for name in parser.parse_known_args(argv)[0].config if name]


def check_recipes(argv: list[str]) -> None:
    """Checks the existing recipe files of a command line before they are used.

    Raises:
        UserError: If one cannot be read within the limits.
    """
    for name in recipes_of(argv):
        if os.path.exists(name):  # otherwise it may be inline YAML
            read_recipe(name)


def read_recipe(name: str) -> dict[str, Any]:
    """Reads a recipe file.

    Raises:
        UserError: If it cannot be read, or a section refers to another file.
    """
    content = read_mapping(name)
    if not content:
        raise UserError(f"{name}: is empty; give a recipe such as recipes/folder.yaml")
    if "config" in content:
        raise UserError(
            f"{name}: config={content['config']!r:.60}: a recipe cannot include another; pass both by --config"
        )
    for section in SECTIONS:
        if not isinstance(content.get(section) or {}, dict):
            raise UserError(f"{name}: {section}={content[section]!r:.60}: must be settings, one a line below it")
    return content


def refusal(error: Exception) -> str | None:
    """Returns the message for a class that is not allowed; None for any other error."""
    text = str(error)
    if (refused := REFUSED.search(text)) is None:
        return None
    key = KEY.search(text)
    return (
        f"{key[1] if key else 'recipe'}: names {refused[1]}, which may run any code or send data away; remove it, "
        f"or if you trust the recipe, add {OPTION}"
    )


def check_publishing(trainer: Namespace, typed: Sequence[str]) -> None:
    """Checks that nobody's recipe publishes with the token of whoever runs it.

    Args:
        trainer: Settings of the trainer.
        typed: The words of the command line, which may name the callback themselves.

    Raises:
        UserError: If the recipe alone names a callback that publishes.
    """
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    for callback in callbacks:
        if getattr(callback, "class_path", "").endswith(PUBLISHES) and not any(PUBLISHES in word for word in typed):
            raise UserError(
                f"trainer.callbacks: the recipe publishes with your token ({PUBLISHES[1:]}, repo "
                f"{callback.init_args.get('repo')}); name it on the command line, or if you trust the recipe, "
                f"add {OPTION}"
            )


def check_places(settings: Any, key: str = "trainer") -> None:
    """Checks that no class of a recipe would write outside the run's folder and the current one.

    Args:
        settings: The trainer's settings, or a part of them.
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
                            f"{key}.{argument}={shorten(given)}: is outside the run's folder; name one inside, or if "
                            f"you trust the recipe, add {OPTION}"
                        )
                    check_places(given, f"{key}.{argument}")
    elif isinstance(settings, list | tuple):
        for value in settings:
            if isinstance(value, str) and OUTSIDE.match(value):
                raise UserError(
                    f"{key}={shorten(value)}: is outside the run's folder; name one inside, or add {OPTION}"
                )
            check_places(value, key)
