"""Fonts for class and file names in figures, with fallbacks for characters that no font has.

The first font is matplotlib's own, which covers Latin, Greek, Cyrillic and more; system fonts are searched when a name
needs one. Text is not shaped: right-to-left and joined scripts are drawn letter by letter.
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
        families: Font names; a character is drawn in the first font that has it.
    """

    families: tuple[str, ...]

    def text(self, name: str) -> str:
        """Returns a name as one line that these fonts can draw."""
        return "".join(letter if self._family(letter) else spelled(letter) for letter in printable(name))

    @property
    def settings(self) -> dict[str, object]:
        """Text settings for matplotlib; a dollar sign does not start a formula."""
        return {"fontfamily": list(self.families), "parse_math": False}

    def _family(self, letter: str) -> str | None:
        return next((family for family in self.families if ord(letter) in characters(family)), None)

    def runs(self, text: str, size: int) -> list[tuple[str, ImageFont.FreeTypeFont]]:
        """Splits a text into parts of one font each."""
        parts: list[tuple[str, str]] = []
        for letter in self.text(text):
            family = self._family(letter)
            if parts and parts[-1][1] == family:
                parts[-1] = parts[-1][0] + letter, family
            else:
                parts.append((letter, family))
        return [(part, ImageFont.truetype(path_of(family), size)) for part, family in parts]


def lettering(names: Iterable[str]) -> Lettering:
    """Chooses fonts that can draw the names, as far as the system has them."""
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
    """Draws a text, truncated to `room` pixels."""
    letters = lettering([text])
    shown = letters.text(text)
    if length(letters, shown, size) > room:
        while shown and length(letters, shown + "...", size) > room:
            shown = shown[:-1]
        shown += "..."
    left, top = place
    for part, font in letters.runs(shown, size):
        # All parts share one baseline.
        picture.text((left, top + size), part, colour, font, anchor="ls")
        left += font.getlength(part)


def length(letters: Lettering, text: str, size: int) -> float:
    """Returns the width of a text in pixels."""
    return sum(font.getlength(part) for part, font in letters.runs(text, size))


def spelled(letter: str) -> str:
    """Spells a character that no font has in the first font: without its diacritics, or as its code point."""
    plain = "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))
    known = plain and all(ord(part) in characters(FIRST) for part in plain)
    return plain if known else letter.encode("ascii", "backslashreplace").decode()


@cache
def tell_once() -> None:
    """Reports a missing font, once."""
    print("No installed font has some characters of the names: shown as code points (install Noto)", file=sys.stderr)


@cache
def families() -> tuple[str, ...]:
    """Returns the system's font families, sorted."""
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():  # matplotlib's cached list may be outdated
        if path not in known:
            try:
                font_manager.fontManager.addfont(path)
            except (OSError, RuntimeError):  # an unsupported format
                continue
    return tuple(sorted({entry.name for entry in font_manager.fontManager.ttflist}))


@cache
def path_of(family: str) -> str:
    """Returns the file of a font."""
    return font_manager.findfont(family, fallback_to_default=False)


@cache
def characters(family: str) -> frozenset[int]:
    """Returns the code points that a font can draw; none for a bitmap font or a missing file."""
    try:
        font = FT2Font(path_of(family))
    except (OSError, RuntimeError, ValueError):
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
