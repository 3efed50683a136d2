"""Reads untrusted YAML within bounds.

A few lines of nested aliases can expand to billions of values, a few thousand brackets overflow the stack, and a pipe
given as a recipe never ends. All three are detected before any value is built; the parser's events take no memory.
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
MOST_VALUES = 50_000  # aliases count as the values that they expand to
MOST_LEVELS = 50
# As huggingface_hub finds it in a card.
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class UnboundedYAML(yaml.YAMLError):
    """Raised for YAML that is too large or too deeply nested."""


def parse_yaml(text: str | bytes) -> Any:
    """Parses YAML to plain values.

    Raises:
        YAMLError: If it is invalid, or larger or more deeply nested than anything a person writes.
    """
    check_bounds(text)
    try:
        return yaml.load(text, Loader=LOADER)
    except (ValueError, OverflowError) as error:  # an impossible date or number
        raise yaml.YAMLError(str(error)) from error


def check_bounds(text: str | bytes) -> None:
    """Counts the values of YAML without building them.

    Raises:
        YAMLError: If it is invalid or exceeds the bounds.
    """
    if len(text) > MOST_BYTES:
        raise UnboundedYAML(f"is larger than {MOST_BYTES // 2**20} MB")
    try:
        _count(yaml.parse(text, Loader=LOADER))
    except ValueError as error:  # bytes that are not text
        raise yaml.YAMLError(str(error)) from error


def _count(events: Iterable[yaml.Event]) -> None:
    sizes: dict[str, int] = {}  # values of each anchor
    above: list[tuple[str | None, list[int]]] = []  # the collections around the current event
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
            anchor, size = None, sizes.get(event.anchor, MOST_VALUES + 1)  # unknown, so it refers to itself
        else:
            continue
        if anchor:
            sizes[anchor] = size
        if above:
            above[-1][1][0] += size
            size = above[-1][1][0]
        if size > MOST_VALUES:
            raise UnboundedYAML(f"has more than {MOST_VALUES} values (counting expanded aliases)")


def read_yaml(path: str | os.PathLike) -> Any:
    """Reads a YAML file to plain values.

    Raises:
        UserError: If it is not a file, cannot be read, or is not YAML within bounds; the message names it.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would block
            raise UserError(f"{path}: is not a file")
        with open(path, "rb") as file:
            return parse_yaml(file.read(MOST_BYTES + 1))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error


def read_mapping(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a YAML file whose top level is a mapping; an empty file gives an empty dict.

    Raises:
        UserError: If it cannot be read, or is not a mapping; the message names it.
    """
    content = read_yaml(path)
    if not isinstance(content or {}, dict):
        raise UserError(f"{path}: has no keys; give a recipe such as recipes/folder.yaml")
    return content or {}


def card_metadata(card: Path) -> dict[str, Any]:
    """Reads the metadata of a card on disk; an empty dict if the card is missing or its metadata is invalid."""
    try:
        front = FRONT_MATTER.search(card.read_text(encoding="utf-8"))
        found = parse_yaml(front[1]) if front else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
