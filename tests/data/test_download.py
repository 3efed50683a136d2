"""Fetching single files by http: whole, resumed, retried, and errors in one line."""

import os
from contextlib import suppress

import pytest
from file_modes import modes, umask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from web_server import serve_folder

from vidprism_hf.data import download
from vidprism_hf.data.download import fetch_file, remote_size, require_space
from vidprism_hf.data.tables import DataError

CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.0)


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "a.bin").write_bytes(CONTENT)
    (folder / "empty").write_bytes(b"")
    with serve_folder(folder) as site:
        yield site


def test_a_file_is_fetched_once(site, tmp_path):
    target = tmp_path / "new" / "a.bin"
    for _ in range(2):
        assert fetch_file(f"{site.url}/a.bin", target).read_bytes() == CONTENT
    assert site.fetched("/a.bin") == [0]
    assert [path.name for path in target.parent.iterdir()] == ["a.bin"]
    assert remote_size(f"{site.url}/a.bin") == len(CONTENT)
    assert fetch_file(f"{site.url}/empty", tmp_path / "empty").read_bytes() == b""


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 4000), max_size=6), have=st.integers(0, len(CONTENT)), ranges=st.booleans())
def test_however_often_it_is_cut_off_the_bytes_are_right(site, tmp_path, cuts, have, ranges):
    target = tmp_path / "cut.bin"
    target.unlink(missing_ok=True)
    site.cuts["/a.bin"], site.ranges = list(cuts), ranges
    (tmp_path / "cut.bin.part").write_bytes(CONTENT[:have])
    for _ in range(3):  # some runs end after too many tries without anything new
        with suppress(DataError):
            fetch_file(f"{site.url}/a.bin", target, show_progress=False)
            break
        assert CONTENT.startswith((tmp_path / "cut.bin.part").read_bytes())
    assert target.read_bytes() == CONTENT


def test_it_goes_on_from_where_it_was(site, tmp_path):
    site.cuts["/a.bin"] = [100, 1000]
    assert fetch_file(f"{site.url}/a.bin", tmp_path / "a.bin").read_bytes() == CONTENT
    assert site.fetched("/a.bin") == [0, 100, 1100]


def test_progress_renews_patience(site, tmp_path):
    site.cuts["/a.bin"] = [10] * 50
    assert fetch_file(f"{site.url}/a.bin", tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_server_that_stays_busy_is_given_up(site, tmp_path, capfd):
    site.failures["/a.bin"] = [503] * 20
    with pytest.raises(DataError, match=r"/a.bin: cannot be fetched \(HTTP Error 503.*run again to go on") as error:
        fetch_file(f"{site.url}/a.bin", tmp_path / "a.bin")
    assert len(site.requests) == download.TRIES
    assert "\n" not in str(error.value)
    assert "next try in" in capfd.readouterr().err


def test_a_busy_moment_is_waited_out(site, tmp_path):
    site.failures["/a.bin"] = [503, 429]
    assert fetch_file(f"{site.url}/a.bin", tmp_path / "a.bin").read_bytes() == CONTENT
    site.failures["/a.bin"] = [500]
    assert remote_size(f"{site.url}/a.bin") == len(CONTENT)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_what_will_not_pass_is_not_tried_again(site, tmp_path, status):
    site.failures["/a.bin"] = [status] * 3
    with pytest.raises(DataError, match=f"HTTP status {status}"):
        fetch_file(f"{site.url}/a.bin", tmp_path / "a.bin")
    assert len(site.requests) == 1
    assert not (tmp_path / "a.bin").exists()


def test_a_part_of_another_file_is_dropped(site, tmp_path):
    # Longer than the file is now: nothing of it can be trusted.
    (tmp_path / "a.bin.part").write_bytes(b"x" * (len(CONTENT) + 5))
    assert fetch_file(f"{site.url}/a.bin", tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_folder_that_cannot_be_written_is_one_line(site, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.*: cannot be written"):
        fetch_file(f"{site.url}/a.bin", tmp_path / "file" / "a.bin")


def test_room_is_made_sure_of(tmp_path, capfd):
    require_space(tmp_path / "not" / "there", 1000, "a thing")
    assert "a thing: needs 0.0 MB" in capfd.readouterr().err
    with pytest.raises(DataError, match=r"a thing needs 1000000000\.0 GB and the disk has"):
        require_space(tmp_path, 10**18, "a thing")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_not_tried_again(site, tmp_path):
    os.symlink("/dev/full", tmp_path / "a.bin.part")
    with pytest.raises(DataError, match=r"a.bin.part: cannot be written \(No space left on device"):
        fetch_file(f"{site.url}/a.bin", tmp_path / "a.bin", show_progress=False)
    assert len(site.requests) == 1


def test_a_fetched_file_has_the_mode_of_a_new_file(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a").write_bytes(b"a")
    with serve_folder(tmp_path / "web") as site, umask(0o027):
        fetch_file(f"{site.url}/a", tmp_path / "new" / "a", show_progress=False)
    assert modes(tmp_path / "new") == {"": 0o750, "a": 0o640}
