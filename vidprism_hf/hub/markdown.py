"""Escapes text for Markdown: labels, file names and licences are shown verbatim and never act as markup.

Everything on a card is escaped unless it has the type `Markdown`. The template's environment escapes every expression,
and any operation on a `Markdown` returns a plain string, so that escaping cannot be forgotten.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, Template

from ..errors import printable

# Markup anywhere, except for underscores inside a word: `snake_case`.
INLINE = re.compile(r"[\\`*\[\]|~$@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
# GitHub-like renderers turn these into links without any markup.
BARE_LINK = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)
# Lists, quotes, headings and rules start a line; a heading may end in #.
LINE = re.compile(r"^[-+=>#]|^(?P<digits>\d+)[.)](?=\s|$)|#(?=#*$)")
ENTITY = re.compile(r"&(?=#?\w+;)")


class Markdown(str):
    """Trusted Markdown, which is not escaped."""

    __slots__ = ()


def escape(value: object) -> Markdown:
    """Returns one line of Markdown that shows a text verbatim anywhere in a line, including cells and headings.

    Line breaks become blanks; control characters become visible escapes.
    """
    if isinstance(value, Markdown):
        return value
    text = printable(" ".join(str(value).split()))
    text = INLINE.sub(r"\\\g<0>", text)
    text = BARE_LINK.sub(r"\\\g<0>", text)
    text = LINE.sub(lambda found: f"{found['digits'] or ''}\\{found[0][-1]}", text)
    # An entity, because an escaped `<` could still form one of our own marks.
    return Markdown(ENTITY.sub("&amp;", text).replace("<", "&lt;"))


def table(rows: Mapping[Any, Any], left: str = "", right: str = "") -> Markdown:
    """Renders a table of two columns without the rows that have no value."""
    lines = [f"| {left} | {right} |", "| --- | --- |"]
    lines += [f"| {escape(name)} | {escape(value)} |" for name, value in rows.items() if value is not None]
    return Markdown("\n".join(lines))


def listed(values: Iterable[object]) -> Markdown:
    """Joins texts with commas."""
    return Markdown(", ".join(map(escape, values)))


@cache
def compiled(template: str) -> Template:
    """Compiles a template that escapes all its expressions."""
    return Environment(finalize=escape, autoescape=False).from_string(template)
