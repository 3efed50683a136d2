"""Unpacking: what archives hold comes out whole and nowhere else, or nothing comes out."""

import builtins
import copy
import gzip
import io
import os
import shutil
import stat
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
from file_modes import modes, umask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidprism_hf.data.fetch import archives
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


def tar_bytes(form: int, name: str = "a", **headers: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.pax_headers = headers
    return info.tobuf(form) + bytes(1024)


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
    with pytest.raises(DataError, match=rf"clips\.{kind}: is damaged or truncated") as caught:
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
    with pytest.raises(DataError, match="damaged or truncated"):
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
    with pytest.raises(DataError, match="same name except for its suffix"):
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
        [member("link", tarfile.LNKTYPE, "../secret")],
        [member("link", tarfile.SYMTYPE, "nowhere")],
        [member("link", tarfile.SYMTYPE, "good.avi")],
        [member("link", tarfile.LNKTYPE, "good.avi")],
        [member("pipe", tarfile.FIFOTYPE)],
        [member("device", tarfile.CHRTYPE)],
    ],
)
def test_links_and_devices_are_refused(tmp_path, members):
    (tmp_path / "secret").write_bytes(b"secret")
    path = tar(tmp_path / "clips.tar", {"good.avi": b"good"}, "w", *members)
    with pytest.raises(DataError, match=r"is a link or a device; only files .* nothing was unpacked; if you trust"):
        unpack(path, tmp_path / "new" / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clips.tar", "secret"]


def test_no_link_is_made_through_an_earlier_link(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    links = [member("a", tarfile.SYMTYPE, str(victim)), member("a/owned", tarfile.LNKTYPE, "payload")]
    path = tar(tmp_path / "clips.tar", {"payload": b"owned"}, "w", *links)
    with pytest.raises(DataError, match="member 'a' is a link"):
        unpack(path, tmp_path / "out")
    assert not list(victim.iterdir())


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_in_zips_are_refused(tmp_path, mode):
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        info = zipfile.ZipInfo("door")
        info.external_attr = (mode | 0o777) << 16
        archive.writestr(info, str(tmp_path))
        archive.writestr("door/evil", b"evil")
    with pytest.raises(DataError, match="member 'door' is a link or a device"):
        unpack(tmp_path / "clips.zip", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["clips.zip"]


@pytest.mark.parametrize("names", [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a", "./a"), ("a//b", "a/b")])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_what_an_archive_says_twice_is_refused(tmp_path, names, kind):
    path = archive(tmp_path, kind, {"first": b"", "zzz": b"2", "yyy": b"1"})
    path = tmp_path / f"clips.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archived, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for name in names:
                archived.writestr(name, name)
    else:
        members = [tarfile.TarInfo(name) for name in names]
        tar(path, {}, "w", *members)
    with pytest.raises(DataError, match="is in it twice, or is both a file and a folder; nothing was unpacked"):
        unpack(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_differ_in_case_are_refused_where_the_disk_does_not_tell_them_apart(tmp_path, kind, monkeypatch):
    def folded(path, *args, **kwargs):  # as a disk of macOS or Windows opens files
        path = Path(path)
        return builtins.open(path.with_name(path.name.lower()), *args, **kwargs)

    path = archive(tmp_path, kind, {"A.avi": b"1", "a.avi": b"2"})
    monkeypatch.setattr(archives, "open", folded, raising=False)
    with pytest.raises(DataError, match=r"'a\.avi' is in it twice"):
        unpack(path, tmp_path / "out")


def test_files_get_the_modes_of_new_files(tmp_path):
    with tarfile.open(tmp_path / "clips.tar", "w") as archived:
        for name, kind in (("run", tarfile.DIRTYPE), ("run/a.avi", tarfile.REGTYPE)):
            info = member(name, kind)
            info.mode, info.mtime, info.uid = 0o6777, 1, 12345
            archived.addfile(info)
    with umask(0o027):
        folder = unpack(tmp_path / "clips.tar", tmp_path / "out")
    assert modes(folder) == {"": 0o750, "run": 0o750, "run/a.avi": 0o640, ".unpacked.json": 0o640}
    assert (folder / "run" / "a.avi").stat().st_mtime > 1e9


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "clips.zip")
    with pytest.raises(DataError, match=r"clips\.zip: unpacking failed \(a FIFO, not a regular file\)"):
        unpack(tmp_path / "clips.zip", tmp_path / "out")


# --- bounds


def test_a_zip_bomb_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    path = zipped(tmp_path / "clips.zip", {f"{number}.avi": b"\0" * 2**24 for number in range(8)})
    assert path.stat().st_size < 200_000
    monkeypatch.setattr(archives._Target, "add", None)
    with pytest.raises(DataError, match=r"unpacks to 0\.1 GB or more from 0\.1 MB, too much for videos; nothing was"):
        unpack(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["clips.zip"]


def test_a_zip_whose_members_share_their_bytes_is_refused(tmp_path):
    path = zipped(tmp_path / "clips.zip", {"a": b"\0" * 2**24})
    with zipfile.ZipFile(path, "a") as archived:  # as many names as one likes for the same content
        for number in range(10):
            info = copy.copy(archived.infolist()[0])
            info.filename = info.orig_filename = f"b{number}"
            archived.filelist.append(info)
        archived._didModify = True
    with pytest.raises(DataError, match="too much for videos"):
        unpack(path, tmp_path / "out")


def test_a_zip_that_declares_less_than_it_unpacks_to_is_damaged(tmp_path):
    path = zipped(tmp_path / "clips.zip", {"a.avi": b"\0" * 0x1234567})
    size = struct.pack("<L", 0x1234567)
    assert path.read_bytes().count(size) == 2
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<L", 2**10)))
    with pytest.raises(DataError, match="is damaged"):
        unpack(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["clips.zip"]


def test_a_sparse_tar_that_declares_a_terabyte_is_refused(tmp_path):
    with open(tmp_path / "a.avi", "wb") as file:
        file.truncate(10**12)
    info = tarfile.TarInfo("a.avi")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = b"\x80" + (10**12).to_bytes(11, "big")  # the real size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "clips.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(DataError, match=r"unpacks to 1000\.0 GB or more from 0\.0 MB"):
        unpack(tmp_path / "clips.tar", tmp_path / "out")


@pytest.mark.parametrize("kind", ["tar.gz", "tar.bz2", "tar.xz"])
def test_a_compressed_tar_is_stopped_where_its_bound_is(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(archives, "FREE", 2**20)
    path = archive(tmp_path, kind, {f"{number}.avi": b"\0" * 2**18 for number in range(8)})
    with pytest.raises(DataError, match=r"unpacks to 1\.1 MB or more"):
        unpack(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content",
    [
        tar_bytes(tarfile.PAX_FORMAT, comment="x" * 2**17),
        tar_bytes(tarfile.GNU_FORMAT, "n" * 2**17),
        tarfile.TarInfo("a").tobuf() + bytes(2**21),  # behind the end mark
        b"".join(tarfile.TarInfo(f"{number}").tobuf() for number in range(3000)) + bytes(1024),
        b"".join(tar_bytes(tarfile.PAX_FORMAT, comment="x")[:1024] for number in range(3000)) + bytes(1024),
    ],
    ids=["pax header", "long name", "padding", "empty members", "headers without members"],
)
def test_tars_that_are_all_headers(tmp_path, content, monkeypatch):
    monkeypatch.setattr(archives, "FREE", 2**20)
    path = tmp_path / "clips.tar.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=r"a header of 131|unpacks to 1\.\d MB|recursion") as caught:
        unpack(path, tmp_path / "out")
    assert len(str(caught.value)) < 500
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_number_of_members_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_MEMBERS", 9)
    with pytest.raises(DataError, match="has more than 9 members; nothing was unpacked"):
        unpack(archive(tmp_path, "zip", {f"{number}": b"" for number in range(10)}), tmp_path / "out")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_larger_than_the_free_space_is_refused(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(DataError, match=r"unpacks to 0\.1 MB or more and the disk has 0\.1 MB free; make room"):
        unpack(archive(tmp_path, kind), tmp_path / "out")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz"])
def test_lists_that_pack_well_are_unpacked(tmp_path, kind):
    files = {"labels.json": b'{"id": "1", "template": "Holding [something]"}' * 100_000}
    assert contents(unpack(archive(tmp_path, kind, files), tmp_path / "out")) == files


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", ["a/" * 3000 + "b", "x" * 5000, "d" * 300 + "/a.avi"])
def test_names_that_are_too_long(tmp_path, name, kind):
    with pytest.raises(DataError, match="nothing was unpacked; if you trust") as caught:
        unpack(archive(tmp_path, kind, {name: b""}), tmp_path / "out")
    assert len(str(caught.value)) < 700


# --- any archive

VICTIM = "victim"
PIECES = ["a", "b", "A", "..", ".", "", "...", " ", "C:", "a\\b", "..\\victim", "x" * 300, "ü", "\0", "__MACOSX"]
names = st.lists(st.sampled_from(PIECES), max_size=4).map("/".join) | st.sampled_from(
    [
        "/tmp/evil",
        "../victim/evil",
        "../../victim/evil",
        "@victim/evil",
        "@victim/secret",
        "a/../../victim",
        "\\evil",
        "",
    ]
)
kinds = st.sampled_from(["file"] * 4 + ["folder", "soft", "hard", "pipe", "device"])
members = st.lists(st.tuples(names, kinds, names, st.binary(max_size=3)), max_size=6)
TAR_TYPES = {
    "file": tarfile.REGTYPE,
    "folder": tarfile.DIRTYPE,
    "soft": tarfile.SYMTYPE,
    "hard": tarfile.LNKTYPE,
    "pipe": tarfile.FIFOTYPE,
    "device": tarfile.CHRTYPE,
}
ZIP_MODES = {"soft": stat.S_IFLNK, "hard": stat.S_IFLNK, "pipe": stat.S_IFIFO, "device": stat.S_IFBLK}


def pack(path: Path, listed: list[tuple[str, str, str, bytes]], kind: str) -> None:
    """Packs members that no packer would."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archived, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for name, what, target, content in listed:
                info = zipfile.ZipInfo(name + "/" * (what == "folder"))
                info.external_attr = (ZIP_MODES.get(what, stat.S_IFREG) | 0o6777) << 16
                archived.writestr(info, target if what in ("soft", "hard") else content)
        return
    with tarfile.open(path, f"w:{kind.partition('.')[2]}", format=tarfile.PAX_FORMAT) as archived:
        for name, what, target, content in listed:
            info = member(name, TAR_TYPES[what], target)
            info.mode, info.size = 0o6777, len(content) * (what == "file")
            archived.addfile(info, io.BytesIO(content))


def state(folder: Path, *without: Path) -> dict[str, tuple]:
    """All that there is to know of a folder."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        if not any(path == other or other in path.parents for other in without):
            about = path.lstat()
            content = path.read_bytes() if path.is_file() else None
            # A folder's own time changes as the new folder comes into it.
            when = about.st_mtime_ns if path != folder else None
            found[str(path)] = about.st_mode, about.st_nlink if content is not None else None, when, content
    return found


any_archive = given(listed=members, kind=st.sampled_from(["zip", "tar", "tar.gz"]))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@any_archive
def test_whatever_an_archive_says_nothing_outside_its_folder_changes(tmp_path_factory, listed, kind):
    check_unpacking(tmp_path_factory.mktemp("any"), listed, kind)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@any_archive
def test_whatever_many_archives_say_nothing_outside_their_folder_changes(tmp_path_factory, listed, kind):
    check_unpacking(tmp_path_factory.mktemp("any"), listed, kind)


def check_unpacking(base: Path, listed: list[tuple[str, str, str, bytes]], kind: str) -> None:
    """Unpacks an archive, and looks that it is whole or absent and nothing else has changed."""
    victim, out = base / VICTIM, base / "out"
    victim.mkdir()
    (victim / "secret").write_bytes(b"secret")
    os.utime(victim / "secret", ns=(1, 1))
    listed = [
        (name.replace("@victim", str(victim)), what, target.replace("@victim", str(victim)), content)
        for name, what, target, content in listed
    ]
    path = base / f"clips.{kind}"
    pack(path, listed, kind)
    before = state(base)
    refusal = None
    try:
        unpack(path, out)
    except DataError as error:
        refusal = str(error)
    assert state(base, out) == before
    assert out.exists() == (refusal is None)
    if refusal:
        assert "\n" not in refusal
    else:
        clean = [(name.partition("\0")[0], *rest) for name, *rest in listed]  # as headers of a fixed width do
        if kind == "zip":
            clean = [(name.replace("\\", "/"), *rest) for name, *rest in clean]
            clean = [(name, "folder" if name.endswith("/") else what, *rest) for name, what, *rest in clean]
        clean = [(PurePosixPath(name), *rest) for name, *rest in clean]
        kept = [row for row in clean if row[0].parts and row[0].parts[0] != "__MACOSX"]
        assert {what for _, what, _, _ in clean} <= {"file", "folder"}
        assert contents(out) == {str(name): content for name, what, _, content in kept if what == "file"}
        assert all((out / name).is_dir() for name, what, _, _ in kept if what == "folder")
        assert all(path.is_dir() or path.stat().st_mode & 0o7111 == 0 for path in out.rglob("*"))
        assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in out.rglob("*") if not path.is_dir())
    shutil.rmtree(base)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_folders_that_no_member_declares_count_too(tmp_path, kind, monkeypatch):
    """A name of 46 folders costs the disk 46 folders, whatever its file holds."""
    monkeypatch.setattr(archives, "MOST_MEMBERS", 500)
    path = archive(tmp_path, kind, {"/".join([str(number), *"a" * 45, "x.mp4"]): b"" for number in range(20)})
    with pytest.raises(DataError, match="has more than 500 members"):
        unpack(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", [".unpacked.json", "clips/.unpacked.json", ".unpacked.json/x.mp4"])
def test_a_member_with_the_name_of_our_marker_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="has the name of the file that marks an unpacked archive"):
        unpack(archive(tmp_path, "tar", {name: b"{}"}), tmp_path / "out")


@pytest.mark.parametrize("content", ["5", "[5]", "null", '[["ok.tar"]]', '"ab"', '[["ok.tar", "x"]]'])
def test_a_damaged_marker_is_one_line(tmp_path, content):
    path = archive(tmp_path, "tar")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".unpacked.json").write_text(f'{{"archives": {content}}}')
    with pytest.raises(DataError, match=r"was not unpacked from clips\.tar; move it away"):
        unpack(path, tmp_path / "out")


def test_a_link_where_it_is_unpacked_is_removed_and_not_followed(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / ".out.unpacking").symlink_to(tmp_path / "theirs")
    assert contents(unpack(archive(tmp_path, "tar"), tmp_path / "out")) == FILES
    assert list((tmp_path / "theirs").iterdir()) == []


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
