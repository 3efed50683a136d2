"""Text of others in Markdown: labels, file names and licences are shown as they are written, and are never markup.

Whatever a card shows is escaped, unless it is of the type `Markdown`. The template's environment does so for every
expression, and each operation on a `Markdown` gives a plain string, so that neither can be forgotten.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, Template

from ..errors import printable

# Characters that are markup anywhere, unless they stand inside a word: `snake_case`.
INLINE = re.compile(r"[\\`*\[\]|~$@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
# What renderers of GitHub's kind make links of, without any markup.
BARE_LINK = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)
# Lists, quotes, headings and rules begin a line; a heading may end in #.
LINE = re.compile(r"^[-+=>#]|^(?P<digits>\d+)[.)](?=\s|$)|#(?=#*$)")
ENTITY = re.compile(r"&(?=#?\w+;)")


class Markdown(str):
    """Markdown of our own, which is shown as markup."""

    __slots__ = ()


def escape(value: object) -> Markdown:
    """One line of Markdown that shows a text as it is, wherever in a line it stands: in a cell or a heading, too.

    Line breaks become blanks, and control characters visible escapes.
    """
    if isinstance(value, Markdown):
        return value
    text = printable(" ".join(str(value).split()))
    text = INLINE.sub(r"\\\g<0>", text)
    text = BARE_LINK.sub(r"\\\g<0>", text)
    text = LINE.sub(lambda found: f"{found['digits'] or ''}\\{found[0][-1]}", text)
    # As an entity: behind a backslash the characters of our own marks would still be there.
    return Markdown(ENTITY.sub("&amp;", text).replace("<", "&lt;"))


def table(rows: Mapping[Any, Any], left: str = "", right: str = "") -> Markdown:
    """A table of two columns; rows without a value are left out."""
    lines = [f"| {left} | {right} |", "| --- | --- |"]
    lines += [f"| {escape(name)} | {escape(value)} |" for name, value in rows.items() if value is not None]
    return Markdown("\n".join(lines))


def listed(values: Iterable[object]) -> Markdown:
    """Texts with commas between them."""
    return Markdown(", ".join(map(escape, values)))


@cache
def compiled(template: str) -> Template:
    """A template whose expressions are all escaped."""
    return Environment(finalize=escape, autoescape=False).from_string(template)
