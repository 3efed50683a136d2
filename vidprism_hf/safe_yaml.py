"""YAML that others may have written, read within bounds.

A few lines whose aliases name each other stand for billions of values, a few thousand brackets overflow the stack, and
a pipe that is named as a recipe never ends. All three are found before a value is built: in the parser's events, which
take no memory.
"""

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError

MOST_BYTES = 2 * 2**20
MOST_VALUES = 50_000  # aliases count as what they stand for
MOST_LEVELS = 50
# As the Hub's client finds it in a card.
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class UnboundedYAML(yaml.YAMLError):
    """YAML that is refused for its size or nesting."""


def parse_yaml(text: str | bytes) -> Any:
    """What YAML says, as plain values.

    Raises:
        YAMLError: If it is none, or is larger or nested deeper than anything that a person writes.
    """
    check_bounds(text)
    try:
        return yaml.load(text, Loader=LOADER)
    except (ValueError, OverflowError) as error:  # of a date or a number that cannot be
        raise yaml.YAMLError(str(error)) from error


def check_bounds(text: str | bytes) -> None:
    """Counts what YAML stands for, without building it.

    Raises:
        YAMLError: If it is no YAML, or too much.
    """
    if len(text) > MOST_BYTES:
        raise UnboundedYAML(f"is larger than {MOST_BYTES // 2**20} MB")
    try:
        _count(yaml.parse(text, Loader=LOADER))
    except ValueError as error:  # bytes that are no text
        raise yaml.YAMLError(str(error)) from error


def _count(events: Iterable[yaml.Event]) -> None:
    sizes: dict[str, int] = {}  # of what each anchor names
    above: list[tuple[str | None, list[int]]] = []  # the collections around the present event
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            above.append((event.anchor, [1]))
            if len(above) > MOST_LEVELS:
                raise UnboundedYAML(f"is nested more than {MOST_LEVELS} levels deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, (size,) = above.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            anchor, size = None, sizes.get(event.anchor, MOST_VALUES + 1)  # unknown yet: it names itself
        else:
            continue
        if anchor:
            sizes[anchor] = size
        if above:
            above[-1][1][0] += size
            size = above[-1][1][0]
        if size > MOST_VALUES:
            raise UnboundedYAML(f"stands for more than {MOST_VALUES} values (by its aliases, if it is short)")


def read_yaml(path: str | os.PathLike) -> Any:
    """What a YAML file says, as plain values.

    Raises:
        UserError: If it is no file, cannot be read, or is no YAML within bounds; the message names it.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise UserError(f"{path}: is not a file")
        with open(path, "rb") as file:
            return parse_yaml(file.read(MOST_BYTES + 1))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error


def read_mapping(path: str | os.PathLike) -> dict[str, Any]:
    """What a YAML file says of each of its keys; nothing where it is empty.

    Raises:
        UserError: If it cannot be read, or has no keys; the message names it.
    """
    content = read_yaml(path)
    if not isinstance(content or {}, dict):
        raise UserError(f"{path}: has no keys; give a recipe such as recipes/folder.yaml")
    return content or {}


def card_metadata(card: Path) -> dict[str, Any]:
    """The metadata of a card on disk; nothing where there is no card, or its authors have broken it."""
    try:
        front = FRONT_MATTER.search(card.read_text(encoding="utf-8"))
        found = parse_yaml(front[1]) if front else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
