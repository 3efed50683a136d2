"""What is printed of strangers' names controls no terminal."""

import pytest

from vidprism_hf.cli import main
from vidprism_hf.errors import printable, printable_lines
from vidprism_hf.evaluation.predict import Prediction, print_predictions

HOSTILE = "a\x1b[2J\x1b]0;x\x07\u202eb\x00\x9b\r\n\udcff"


def test_control_characters_are_written_as_escapes():
    assert printable(HOSTILE) == r"a\x1b[2J\x1b]0;x\x07\u202eb\x00\x9b\x0d\x0a\udcff"
    assert printable_lines("a\nb\x1b") == "a\nb\\x1b"


@pytest.mark.parametrize("text", ["naïve", "走路", "👩\u200d💻", "می\u200cروم", "a b", "\u3000"])
def test_text_stays_as_it_is(text):
    assert printable(text) == text


def test_labels_and_files_of_predictions(capsys):
    print_predictions([Prediction(HOSTILE, [HOSTILE], [1.0]), Prediction("b", [], [], HOSTILE)], as_json=False)
    told = "".join(capsys.readouterr())
    assert not {"\x1b", "\x07", "\u202e", "\x00", "\x9b", "\r"} & set(told)


def test_messages_of_the_command_line(tmp_path, capsys):
    assert main(["push", str(tmp_path / HOSTILE.replace("\0", "")), "--repo", "a/b"]) == 1
    told = capsys.readouterr().err
    assert "\x1b" not in told
    assert len(told.splitlines()) == 1
