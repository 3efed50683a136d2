"""Messages of bounded length, and files that appear whole and with the mode of new files."""

import os
import pickle
import socket
from pathlib import Path

import pytest
from file_modes import modes, umask
from hypothesis import given
from hypothesis import strategies as st

from vidprism_hf.data import DataError
from vidprism_hf.errors import UserError
from vidprism_hf.util import atomic_path, atomic_write, check_regular, preview, shorten


def test_a_preview_says_how_many_there_are():
    assert preview(["a", "b"]) == "a, b"
    assert preview([f"{number}" for number in range(202)]) == "0, 1, 2, 3, 4 and 197 more"
    assert preview(["a", "b", "c"], 1, "; ") == "a and 2 more"
    assert preview([]) == ""


@given(st.lists(st.text() | st.text(min_size=500), max_size=50))
def test_a_preview_is_one_line_and_fits_on_a_screen(names):
    shown = preview(names)
    assert shown.isprintable()
    assert len(shown) < 1000


def test_a_long_name_keeps_its_beginning_and_end():
    short = shorten("videos/" + "x" * 10_000 + ".mp4")
    assert len(short) == 160
    assert short.startswith("videos/x")
    assert short.endswith("x.mp4")


@pytest.mark.parametrize("kind", [UserError, DataError])
def test_an_error_with_a_name_of_ten_thousand_letters_fits_on_a_screen(kind):
    error = kind(f"list.txt, line 3: label {'x' * 10_000!r} is in no list; give another")
    for said in (str(error), str(pickle.loads(pickle.dumps(error)))):
        assert len(said) == 1500
        assert said.startswith("list.txt, line 3: label 'xxx")
        assert said.endswith("xxx' is in no list; give another")
    assert str(kind("x" * 1500)) == "x" * 1500


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_a_written_file_has_the_mode_of_a_new_file(tmp_path, mask):
    (tmp_path / "b").write_bytes(b"old")
    (tmp_path / "b").chmod(0o600)
    with umask(mask):
        atomic_write(tmp_path / "a", b"new")
        atomic_write(tmp_path / "b", b"new")
        with atomic_path(tmp_path / "c") as beside:
            beside.unlink()
            os.close(os.open(beside, os.O_CREAT | os.O_WRONLY, 0o600))  # as libraries do that make a private file
    found = modes(tmp_path)
    assert {found[name] for name in "abc"} == {0o666 & ~mask}
    assert set(found) == {"", "a", "b", "c"}


def test_what_fails_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def write():
        with atomic_path(tmp_path / "a") as beside:
            beside.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_what_is_no_regular_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    kinds = {"pipe": "a FIFO", "link": "a FIFO", "socket": "a socket", "/dev/zero": "a device"}
    for name, kind in kinds.items():
        with pytest.raises(OSError, match=f"{kind}, not a regular file"):
            check_regular(tmp_path / name)
    for name in (__file__, tmp_path, tmp_path / "none", Path("a\0b")):
        check_regular(name)
