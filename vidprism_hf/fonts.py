"""Names of classes and files in pictures: in a font that has their characters, and else in other letters.

Every picture takes its text from here. The first font is the one that matplotlib brings along, which covers Latin,
Greek, Cyrillic and more; others of the system are looked for when a name needs one. Scripts are not shaped: what is
written from right to left, or joined, is drawn letter by letter.
"""

import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont

from .errors import printable

FIRST = "DejaVu Sans"


@dataclass(frozen=True)
class Lettering:
    """Fonts for some texts.

    Attributes:
        families: Names of the fonts; the first that has a character draws it.
    """

    families: tuple[str, ...]

    def text(self, name: str) -> str:
        """A name as one line that these fonts can draw."""
        return "".join(letter if self._family(letter) else spelled(letter) for letter in printable(name))

    @property
    def settings(self) -> dict[str, object]:
        """How matplotlib draws such a text: a dollar sign begins no formula."""
        return {"fontfamily": list(self.families), "parse_math": False}

    def _family(self, letter: str) -> str | None:
        return next((family for family in self.families if ord(letter) in characters(family)), None)

    def runs(self, text: str, size: int) -> list[tuple[str, ImageFont.FreeTypeFont]]:
        """The text in parts of one font each."""
        parts: list[tuple[str, str]] = []
        for letter in self.text(text):
            family = self._family(letter)
            if parts and parts[-1][1] == family:
                parts[-1] = parts[-1][0] + letter, family
            else:
                parts.append((letter, family))
        return [(part, ImageFont.truetype(path_of(family), size)) for part, family in parts]


def lettering(names: Iterable[str]) -> Lettering:
    """Fonts in which names can be drawn, as far as the system has them."""
    needed = {ord(letter) for name in names for letter in printable(name)} - characters(FIRST)
    chosen = [FIRST]
    for family in families() if needed else ():
        if needed & characters(family):
            chosen.append(family)
            needed -= characters(family)
    if needed:
        tell_once()
    return Lettering(tuple(chosen))


def draw(picture: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: str, room: int) -> None:
    """Draws a text, or as much of its beginning as there is room for, in pixels."""
    letters = lettering([text])
    shown = letters.text(text)
    if length(letters, shown, size) > room:
        while shown and length(letters, shown + "...", size) > room:
            shown = shown[:-1]
        shown += "..."
    left, top = place
    for part, font in letters.runs(shown, size):
        # On one line, whatever the fonts' heights are.
        picture.text((left, top + size), part, colour, font, anchor="ls")
        left += font.getlength(part)


def length(letters: Lettering, text: str, size: int) -> float:
    """Pixels that a text takes."""
    return sum(font.getlength(part) for part, font in letters.runs(text, size))


def spelled(letter: str) -> str:
    """A letter that no font has, in letters of the first font: without its marks, or as its number."""
    plain = "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))
    known = plain and all(ord(part) in characters(FIRST) for part in plain)
    return plain if known else letter.encode("ascii", "backslashreplace").decode()


@cache
def tell_once() -> None:
    """Says that a font is missing."""
    print("No font here has some characters of the names: pictures show their numbers (install Noto)", file=sys.stderr)


@cache
def families() -> tuple[str, ...]:
    """The system's fonts, those of one shape and another in a fixed order."""
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():  # matplotlib's own list may be of another day
        if path not in known:
            try:
                font_manager.fontManager.addfont(path)
            except (OSError, RuntimeError):  # of a kind that it cannot draw
                continue
    return tuple(sorted({entry.name for entry in font_manager.fontManager.ttflist}))


@cache
def path_of(family: str) -> str:
    """The file of a font."""
    return font_manager.findfont(family, fallback_to_default=False)


@cache
def characters(family: str) -> frozenset[int]:
    """What a font can draw; nothing if it is one of pictures, or its file is gone."""
    try:
        font = FT2Font(path_of(family))
    except (OSError, RuntimeError, ValueError):
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
