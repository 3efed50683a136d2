"""Unpacking: what archives hold comes out whole and nowhere else, or nothing comes out."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidprism_hf.data.fetch.archives import archive_groups, unpack
from vidprism_hf.data.tables import DataError

FILES = {"clips/run/a b.avi": os.urandom(50_000), "clips/walk/ü.avi": os.urandom(70_000), "clips/list.txt": b""}


def contents(folder: Path) -> dict[str, bytes]:
    """What was unpacked, the marker left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".unpacked.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def tar(path: Path, files: dict[str, bytes], mode: str = "w", *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in members:
            archive.addfile(member)
    return path


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def archive(folder: Path, kind: str, files: dict[str, bytes] = FILES) -> Path:
    path = folder / f"clips.{kind}"
    return zipped(path, files) if kind == "zip" else tar(path, files, f"w:{kind.partition('.')[2]}")


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


KINDS = ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_packed_comes_out(tmp_path, kind):
    assert contents(unpack(archive(tmp_path, kind), tmp_path / "out")) == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"clips.{kind}", "out"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7, 0.9])
def test_a_cut_off_archive_leaves_nothing(tmp_path, kind, kept):
    path = archive(tmp_path, kind)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(DataError, match=rf"clips\.{kind}: is damaged or cut off") as caught:
        unpack(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_flipped_bits_are_noticed(tmp_path, kind):
    path = archive(tmp_path, kind)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        unpack(path, tmp_path / "out")


def test_a_tar_cut_between_its_members(tmp_path):
    path = tar(tmp_path / "clips.tar", {"a.avi": b"a" * 512, "b.avi": b"b" * 512})
    path.write_bytes(path.read_bytes()[:1024])  # the first header and file, whole
    with pytest.raises(DataError, match="no end mark"):
        unpack(path, tmp_path / "out")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), kind=st.sampled_from(KINDS))
def test_any_changed_byte_gives_a_folder_or_an_error(tmp_path_factory, place, byte, kind):
    folder = tmp_path_factory.mktemp("damaged")
    path = archive(folder, kind, {"a/x.avi": b"x" * 3000, "b/y.avi": b"y" * 100})
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] = byte
    path.write_bytes(data)
    try:
        unpack(path, folder / "out")
        left = {path.name, "out"}
    except DataError:
        left = {path.name}
    assert {file.name for file in folder.iterdir()} == left


@pytest.mark.parametrize("suffix", [".part-{:c}{:c}", ".part{:c}{:c}", ".{:c}{:c}", "-{:c}{:c}", ".part_{:c}{:c}"])
def test_parts_are_joined(tmp_path, suffix):
    data = archive(tmp_path, "tar.gz").read_bytes()
    (tmp_path / "clips.tar.gz").unlink()
    for number, start in enumerate(range(0, len(data), len(data) // 28)):
        letters = [ord("a") + digit for digit in divmod(number, 26)]
        (tmp_path / f"clips.tar.gz{suffix.format(*letters)}").write_bytes(data[start : start + len(data) // 28])
    groups = archive_groups(path.name for path in tmp_path.iterdir())
    assert list(groups) == ["clips"]
    assert len(groups["clips"]) > 26
    assert contents(unpack([tmp_path / name for name in groups["clips"]], tmp_path / "out")) == FILES
    with pytest.raises(DataError, match="one before or between them is missing"):
        archive_groups([*groups["clips"][:3], *groups["clips"][4:]])
    with pytest.raises(DataError, match="damaged or cut off"):
        unpack([tmp_path / name for name in groups["clips"][:-1]], tmp_path / "other")


def test_groups():
    ssv2 = [f"20bn-something-something-v2-{number:02}" for number in range(20)]
    names = ["README.md", "videos/a.zip", "b.tgz", "d.tar.001", "d.tar.002", "take-07", "f.ZIP", *ssv2]
    assert archive_groups(reversed(names)) == {
        "videos/a": ["videos/a.zip"],
        "b": ["b.tgz"],
        "d": ["d.tar.001", "d.tar.002"],
        "f": ["f.ZIP"],
        "20bn-something-something-v2": ssv2,
    }
    with pytest.raises(DataError, match="same name but for its suffix"):
        archive_groups(["a.zip", "a.tar"])


@pytest.mark.parametrize("name", ["/tmp/evil", "../evil", "a/../../evil", "a/b/../../../evil"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_lead_outside(tmp_path, name, kind):
    (tmp_path / "box").mkdir()
    path = archive(tmp_path, kind, {"good.avi": b"good", name: b"evil"})
    with pytest.raises(DataError, match="outside the folder; nothing was unpacked"):
        unpack(path, tmp_path / "box" / "out")
    assert not list((tmp_path / "box").iterdir())
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "members",
    [
        [member("link", tarfile.SYMTYPE, "/etc/passwd")],
        [member("link", tarfile.SYMTYPE, "../../secret")],
        [member("link", tarfile.LNKTYPE, "../secret")],
        [member("link", tarfile.LNKTYPE, "/etc/passwd")],
        [member("link", tarfile.SYMTYPE, "nowhere")],
        [member("a", tarfile.SYMTYPE, "."), member("b", tarfile.SYMTYPE, "a/../..")],
        [member("pipe", tarfile.FIFOTYPE)],
        [member("device", tarfile.CHRTYPE)],
    ],
)
def test_links_and_devices_that_leave_the_folder(tmp_path, members):
    (tmp_path / "secret").write_bytes(b"secret")
    path = tar(tmp_path / "clips.tar", {"good.avi": b"good"}, "w", *members)
    with pytest.raises(DataError, match="nothing was unpacked, do not trust"):
        unpack(path, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clips.tar", "secret"]


def test_no_file_is_written_through_a_link(tmp_path):
    path = tmp_path / "clips.tar"
    tar(path, {}, "w", member("door", tarfile.SYMTYPE, str(tmp_path)))
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("door/evil")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"evil"))
    with pytest.raises(DataError):
        unpack(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["clips.tar"]


def test_links_within_the_folder(tmp_path):
    links = [member("b/soft.avi", tarfile.SYMTYPE, "../a/x.avi"), member("b/hard.avi", tarfile.LNKTYPE, "a/x.avi")]
    folder = unpack(tar(tmp_path / "clips.tar", {"a/x.avi": b"x"}, "w", *links), tmp_path / "out")
    assert contents(folder) == {"a/x.avi": b"x", "b/soft.avi": b"x", "b/hard.avi": b"x"}


def test_a_second_call_does_nothing_even_without_the_archive(tmp_path):
    path = archive(tmp_path, "zip")
    folder = unpack(path, tmp_path / "out")
    inode = folder.stat().st_ino
    assert unpack(path, folder).stat().st_ino == inode
    path.unlink()
    assert unpack(path, folder).stat().st_ino == inode
    archive(tmp_path, "zip", FILES | {"more.avi": b"more"})
    with pytest.raises(DataError, match="from another archive"):
        unpack(path, folder)


def test_what_a_cut_off_run_left_is_replaced(tmp_path):
    left = tmp_path / ".out.unpacking" / "files"
    left.mkdir(parents=True)
    (left / "half.avi").write_bytes(b"half")
    assert contents(unpack(archive(tmp_path, "tar.gz"), tmp_path / "out")) == FILES
    assert not left.exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"was not unpacked from clips\.zip"):
        unpack(archive(tmp_path, "zip"), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_strip_takes_off_a_top_folder_of_the_same_name(tmp_path):
    path = archive(tmp_path, "zip")
    assert "run/a b.avi" in contents(unpack(path, tmp_path / "out", strip=True))
    assert "clips/run/a b.avi" in contents(unpack(path, tmp_path / "whole"))
    both = archive(tmp_path, "tar", {"clips/a.avi": b"a", "other/b.avi": b"b"})
    assert set(contents(unpack(both, tmp_path / "two", strip=True))) == {"clips/a.avi", "other/b.avi"}


def test_names_in_zips(tmp_path):
    path = tmp_path / "clips.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/._x", b"junk")
        archive.writestr("zzzz.avi", b"utf-8 without the flag that says so")
        archive.writestr("dir/", b"")
    path.write_bytes(path.read_bytes().replace(b"zzzz.avi", "éé.avi".encode()))
    folder = unpack(path, tmp_path / "out")
    assert list(contents(folder)) == ["éé.avi"]
    assert (folder / "dir").is_dir()


@pytest.mark.parametrize(("name", "tool"), [("hmdb51_org.rar", "unrar x"), ("clips.7z", "7z x")])
def test_archives_that_other_tools_must_unpack(tmp_path, name, tool):
    (tmp_path / name).write_bytes(b"Rar!")
    with pytest.raises(DataError, match=f"{tool}.*data.source"):
        unpack(tmp_path / name, tmp_path / "out")


def test_a_missing_archive(tmp_path):
    with pytest.raises(DataError, match=r"gone\.zip: unpacking failed"):
        unpack(tmp_path / "gone.zip", tmp_path / "out")
