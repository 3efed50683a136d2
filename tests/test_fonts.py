"""Names of every script in every picture: in a font that has them, else spelled otherwise, and never with a warning."""

import io
import unicodedata
import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib import font_manager
from PIL import Image

from vidprism_hf import fonts
from vidprism_hf.data.inspection import contact_sheet
from vidprism_hf.evaluation.ablation_report import Estimate, Result, figure
from vidprism_hf.evaluation.figures import confusion_matrix, expert_weights

NAMES = ["走路", "прыжок", "ジャンプ", "달리기", "قفز", "कूदना", "🏃", "naïve"]
NAMES += ["$x^2$", r"\$a", "$", "a\nb\x1b[31m", "\ue000", "", "long " * 20]
TILES = np.zeros((2, 96, 96, 3), np.uint8)


def pictures(names: list[str]) -> list[bytes]:
    sheet = io.BytesIO()
    contact_sheet([(name, name, TILES) for name in names]).save(sheet, "png")
    number = len(names)
    results = [Result("grid", name, 1, 1, Estimate(0.5, 0.4, 0.6), 0.1, Estimate(), Estimate(), 1.0) for name in names]
    return [
        confusion_matrix(np.eye(number, dtype=int), names),
        expert_weights(np.full((number, 2), 0.5), names, [2, 4]),
        figure(results),
        sheet.getvalue(),
    ]


@pytest.fixture(autouse=True)
def fresh():
    """Fonts are looked for anew, and the note is due."""
    caches = fonts.families, fonts.characters, fonts.path_of, fonts.tell_once
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def test_names_of_every_script_are_drawn_without_a_warning_and_noted_once(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures(NAMES)
        pictures(NAMES)
    assert len(capsys.readouterr().err.splitlines()) == 1  # no font has what is for private use
    pictures(["walk", "прыжок"])
    assert capsys.readouterr().err == ""


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=8), min_size=1, max_size=5))
def test_what_is_drawn_is_in_a_font(names):
    letters = fonts.lettering(names)
    known = set().union(*map(fonts.characters, letters.families))
    assert set(map(ord, "".join(map(letters.text, names)))) <= known


def test_two_names_that_no_font_has_are_told_apart():
    letters = fonts.lettering(["\U0003fff0", "\U0003fff1", "ﬁ\ue000"])
    assert letters.text("\U0003fff0") == r"\U0003fff0"
    assert letters.text("\U0003fff1") == r"\U0003fff1"
    assert letters.text("a\tb") == r"a\tb".replace(r"\t", r"\x09")


def a_font(path, letter: str) -> None:
    """A font that has one letter, a square."""
    pen = TTGlyphPen(None)
    for place, line in (((0, 0), pen.moveTo), ((0, 700), pen.lineTo), ((700, 700), pen.lineTo), ((700, 0), pen.lineTo)):
        line(place)
    pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord(letter): "square"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (800, 0), "square": (800, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "One Letter", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    font.save(path)


def test_a_font_of_the_system_is_used_where_it_has_the_character(tmp_path, monkeypatch, capsys):
    letter = "\ue123"  # for private use: no other font has it
    a_font(tmp_path / "one.ttf", letter)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "one.ttf")])
    letters = fonts.lettering([f"a{letter}", "b"])
    assert letters.families == ("DejaVu Sans", "One Letter")
    assert letters.text(f"a{letter}") == f"a{letter}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = pictures([f"{letter}{letter}", "b"])
    assert capsys.readouterr().err == ""
    sheet = np.asarray(Image.open(io.BytesIO(drawn[-1])).convert("L"))
    assert (sheet[:30, 8:40] < 100).sum() > 150  # two black squares
    assert unicodedata.category(letter) == "Co"
