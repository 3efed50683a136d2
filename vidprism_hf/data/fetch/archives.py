"""Unpacks archives of videos safely and atomically: zip, compressed tar, and tar in several parts.

Only files and folders are created, in a new folder without links, so a name without `..` cannot lead out of it. Links
are refused whatever they point to, since no dataset needs them, and so are duplicate members, since the later would
silently replace the earlier. Files get the modes and times of new files.

The unpacked size is limited, so that a small file cannot fill a disk: see `RATIO`. A zip declares all sizes up front
and is checked before anything is written; a tar is checked member by member, and while it is decompressed.
"""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ...util import check_regular, shorten
from ..tables import DataError
from .download import gigabytes

MARKER = ".unpacked.json"
ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
# An archive may unpack to FREE bytes, or to RATIO times its size if more: videos hardly compress, text about tenfold.
FREE = 100 * 2**20
RATIO = 100
BLOCK = 4096  # bytes of disk overhead per member
MOST_MEMBERS = 500_000  # Something-Something v2, the largest set in one archive, has 220,847
MOST_FOLDERS = 50  # of nesting
MOST_HEADER = 2**16  # bytes of a tar member's extended header, which is read into memory
_SUFFIX = re.compile(r"\.(zip|tar|tar\.gz|tgz|tar\.bz2|tbz2?|tar\.xz|txz|rar|7z)$", re.IGNORECASE)
# Parts of one archive: x.tar.gz.part-aa, x.tar.gz.partaa, x.tar.gz.aa, x.tgz-00, x.tar.001; SSv2's x-00 has no suffix.
_PART = re.compile(
    r"(?P<name>.+\.(?:tar|tar\.gz|tgz|tar\.bz2|tar\.xz|txz|zip))[._-](?:part[._-]?)?(?P<part>[a-z]{2,3}|\d{2,3})$"
    r"|(?P<bare>[^.]+)-(?P<number>\d\d)$",
    re.IGNORECASE,
)
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_LEFT_OUT = ("__MACOSX", ".DS_Store")


def archive_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Finds the archives among file names.

    Args:
        names: File names, with `/` between folders.

    Returns:
        The files of each archive, parts in order, by its name without suffix.

    Raises:
        DataError: If a part between others is missing.
    """
    groups: dict[str, list[str]] = {}
    parts: dict[str, dict[int, str]] = {}
    for name in sorted(names):
        match = _PART.fullmatch(name)
        if _SUFFIX.search(name):
            groups.setdefault(_SUFFIX.sub("", name), []).append(name)
        elif match:
            whole = match["name"] or match["bare"]
            parts.setdefault(whole, {})[_part_number(match["part"] or match["number"])] = name
    for whole, numbered in parts.items():
        if not _SUFFIX.search(whole) and len(numbered) < 2:
            continue  # a file that happens to end in two digits
        order = sorted(numbered)
        if order[0] > 1 or order != list(range(order[0], order[0] + len(order))):
            raise DataError(f"{whole}: found {len(order)} parts, but one before or between them is missing; add it")
        groups.setdefault(_SUFFIX.sub("", whole), []).extend(numbered[number] for number in order)
    clash = next((files for files in groups.values() if len(files) > 1 and _SUFFIX.search(files[0])), None)
    if clash:
        raise DataError(f"{clash[0]}: {clash[1]} has the same name except for its suffix; keep one of them")
    return groups


def unpack(
    archive: str | os.PathLike | Sequence[str | os.PathLike], folder: str | os.PathLike, strip: bool = False
) -> Path:
    """Unpacks an archive into a new folder, which appears only when it is complete.

    Unpacks beside the folder, then renames. Leftovers of an interrupted run are removed; a folder already unpacked
    from this archive is reused. Two processes must not unpack into the same folder at once.

    Args:
        archive: The file, or the parts of a tar archive in order.
        folder: The folder to create.
        strip: Whether to drop a single top folder named like `folder` or the archive.

    Returns:
        The folder.

    Raises:
        DataError: If the archive is damaged, unsafe, too large or unsupported, or the folder has other content. Nothing
            unpacked is left behind.
    """
    files = [Path(archive)] if isinstance(archive, (str, os.PathLike)) else [Path(part) for part in archive]
    folder = Path(folder)
    if _already_unpacked(files, folder):
        return folder
    beside = folder.parent / f".{folder.name}.unpacking"
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    try:
        for path in files:
            check_regular(path)
        if beside.is_symlink():
            beside.unlink()
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        _unpack(files, _Target(files, beside / "files"))
        content = _content(files, folder, beside / "files", strip)
        sizes = [[path.name, path.stat().st_size] for path in files]
        (content / MARKER).write_text(json.dumps({"archives": sizes}), encoding="utf-8")
        os.replace(content, folder)
    except DataError:
        raise
    except Exception as error:  # tarfile, zipfile and the decompressors raise many types
        # Compression errors are OSErrors too, but without an errno.
        if isinstance(error, OSError) and error.errno is not None:
            name = shorten(error.filename or files[0])
            raise DataError(f"{name}: unpacking failed ({error.strerror}); fix that and run it again") from error
        cause = shorten(" ".join(str(error).split()) or type(error).__name__)
        raise DataError(f"{files[0]}: is damaged or truncated ({cause}); remove it and download it again") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # not empty
                parent.rmdir()
    return folder


def _part_number(text: str) -> int:
    if text.isdigit():
        return int(text)
    number = 0
    for letter in text.lower():
        number = 26 * number + ord(letter) - ord("a")
    return number


def _already_unpacked(files: list[Path], folder: Path) -> bool:
    if not folder.exists():
        return False
    try:
        known = [
            [str(name), int(size)]
            for name, size in json.loads((folder / MARKER).read_text(encoding="utf-8"))["archives"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder}: was not unpacked from {files[0].name}; move it away") from None
    # The archive may have been deleted since, to free its space.
    pairs = zip(files, known, strict=False)
    sizes = [[path.name, path.stat().st_size if path.exists() else size] for path, (_, size) in pairs]
    if sizes != known or len(files) != len(known):
        raise DataError(f"{folder}: was not unpacked from {files[0]} but from another archive; remove it")
    return True


def _content(files: list[Path], folder: Path, unpacked: Path, strip: bool) -> Path:
    tops = os.listdir(unpacked)
    names = {folder.name.lower(), next(iter(archive_groups([files[0].name])), "").lower()}
    if strip and len(tops) == 1 and tops[0].lower() in names and (unpacked / tops[0]).is_dir():
        return unpacked / tops[0]
    return unpacked


class _Target:
    """The new folder that members are written to.

    Attributes:
        archive: The archive's path, for messages.
        root: The folder.
        size: Size of the archive in bytes.
        limit: Maximum unpacked size in bytes.
    """

    def __init__(self, files: Sequence[Path], root: Path):
        root.mkdir()
        self.archive, self.root = files[0], root
        self.size = sum(path.stat().st_size for path in files)
        self.limit = max(FREE, RATIO * self.size)
        self._free = shutil.disk_usage(root).free
        self._members = self._bytes = 0
        self._folders: set[tuple[str, ...]] = set()  # those above the members so far

    def refused(self, what: str) -> DataError:
        """Returns the error for an archive that is refused."""
        return DataError(
            f"{self.archive}: {what}; nothing was unpacked; if you trust this archive, unpack it by hand and give that "
            "folder as data.source"
        )

    def unsafe(self, name: str, what: str) -> DataError:
        """Returns the error for an archive with a refused member."""
        return self.refused(f"member {shorten(name)!r} {what}")

    def too_large(self, found: int) -> DataError:
        """Returns the error for an archive that exceeds its limit."""
        return self.refused(f"unpacks to {gigabytes(found)} or more from {gigabytes(self.size)}, too much for videos")

    def claim(self, size: int) -> None:
        """Counts a declared member.

        Raises:
            DataError: If there are too many members, or they exceed the size limit or the free disk space.
        """
        if size < 0:
            raise ValueError("a size below 0")
        self._count(size)

    def _count(self, size: int) -> None:
        self._members += 1
        self._bytes += size + BLOCK
        if self._members > MOST_MEMBERS:
            raise self.refused(f"has more than {MOST_MEMBERS} members")
        if self._bytes > self.limit:
            raise self.too_large(self._bytes)
        if self._bytes > self._free:
            raise DataError(
                f"{self.archive}: unpacks to {gigabytes(self._bytes)} or more and the disk has {gigabytes(self._free)} "
                "free; make room or set data.root to another disk"
            )

    def path(self, name: str) -> Path | None:
        """Returns the path of a member; None if it is skipped."""
        parts = PurePosixPath(name).parts
        pieces = re.split(r"[/\\]", name)  # backslashes separate folders on Windows
        if (pieces[0] == "" and name) or ".." in pieces or any(re.match("[A-Za-z]:", piece) for piece in pieces):
            raise self.unsafe(name, "would be written outside the folder")
        if "\0" in name or len(parts) > MOST_FOLDERS:
            raise self.unsafe(name, f"has an unusable name (NUL, or more than {MOST_FOLDERS} folders)")
        if parts and (parts[0] == _LEFT_OUT[0] or parts[-1] == _LEFT_OUT[1]):
            return None
        if MARKER in parts[:2]:  # the top folder may be dropped
            raise self.unsafe(name, "has the name of the file that marks an unpacked archive")
        for depth in range(1, len(parts)):  # folders that no member declares
            if (folder := parts[:depth]) not in self._folders:
                self._folders.add(folder)
                self._count(0)
        return self.root.joinpath(*parts)

    def add(self, name: str, size: int = 0, content: BinaryIO | None = None) -> None:
        """Creates a file or, without content, a folder."""
        path = self.path(name)
        if path is None:
            return
        try:
            if content is None:
                path.mkdir(parents=True, exist_ok=True)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "xb")  # noqa: SIM115 closed below; errors in the content are handled elsewhere
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTDIR):
                raise self.unsafe(name, "is in it twice, or is both a file and a folder") from error
            if error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
                raise self.unsafe(name, f"has a name that this disk does not support ({error.strerror})") from error
            raise
        with file:
            shutil.copyfileobj(content, file, 1 << 20)
            if file.tell() != size:
                raise EOFError(f"{shorten(name)} has {file.tell()} bytes, not {size}")


def _unpack(files: list[Path], target: _Target) -> None:
    suffix = files[0].suffix.lower()
    if suffix in (".rar", ".7z"):
        tool = "unrar x" if suffix == ".rar" else "7z x"
        raise DataError(
            f"{files[0]}: {suffix[1:]} archives are not supported; unpack it with `{tool}` (or `bsdtar -xf`) into a "
            "folder and give that folder as data.source"
        )
    with io.BufferedReader(_Joined(files), 1 << 20) as joined:
        if joined.peek(4)[:4] not in ZIP_MAGIC:
            return _unpack_tar(joined, target)
    if len(files) > 1:
        raise DataError(f"{files[0]}: split zip archives are not supported; join it with `zip -s 0` first")
    _unpack_zip(files[0], target)


def _unpack_zip(path: Path, target: _Target) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [(_zip_name(info), info) for info in archive.infolist()]
        for name, info in members:
            if info.flag_bits & 0x1:
                raise DataError(f"{path}: is encrypted; unpack it by hand and give the folder as data.source")
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise target.unsafe(name, "is a link or a device; only files and folders are unpacked")
            if name.endswith("/") and info.file_size:
                raise target.unsafe(name, "is a folder with content")
            target.claim(info.file_size)
            target.path(name)
        for name, info in members:
            if name.endswith("/"):
                target.add(name)
                continue
            try:
                content = archive.open(info)
            except NotImplementedError as error:
                raise DataError(f"{path}: {error} ({shorten(name)}); unpack it by hand") from error
            with content:
                target.add(name, info.file_size, content)


def _zip_name(info: zipfile.ZipInfo) -> str:
    name = info.filename.replace("\\", "/")
    if info.flag_bits & 0x800:
        return name
    # Without the flag, names are cp437 by the standard but UTF-8 in practice.
    try:
        return name.encode("cp437").decode("utf-8")
    except UnicodeError:
        return name


class _TarInfo(tarfile.TarInfo):
    """A tar header that refuses extended headers larger than a name or some attributes need."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        info = super().frombuf(buf, encoding, errors)
        if info.type in _EXTENDED and info.size > MOST_HEADER:
            raise ValueError(f"a header of {info.size} bytes")
        return info


def _unpack_tar(joined: io.BufferedReader, target: _Target) -> None:
    # Not tarfile's own decompression, which skips the checksum at the end of the stream.
    stream = _Bounded(_decompressed(joined), target)
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_TarInfo) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # otherwise tarfile keeps them all
            if not (member.isreg() or member.isdir()):
                raise target.unsafe(member.name, "is a link or a device; only files and folders are unpacked")
            target.claim(member.size)
            target.add(member.name, member.size, archive.extractfile(member))
        end = archive.offset
    while stream.read(1 << 20):
        pass
    if stream.total < end + tarfile.BLOCKSIZE:
        raise tarfile.ReadError("there is no end mark")


def _decompressed(joined: io.BufferedReader) -> BinaryIO:
    start = joined.peek(6)
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=joined)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(joined)
    return lzma.LZMAFile(joined) if start.startswith(b"\xfd7zXZ") else joined


class _Bounded:
    """A stream that counts the bytes read and raises beyond the archive's limit."""

    def __init__(self, stream: BinaryIO, target: _Target):
        self._stream, self._target = stream, target
        self.total = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.total += len(data)
        if self.total > self._target.limit:
            raise self._target.too_large(self.total)
        return data


class _Joined(io.RawIOBase):
    """Reads several files as one stream."""

    def __init__(self, files: Sequence[Path]):
        super().__init__()
        self._files = iter(files)
        self._current: BinaryIO = io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not (count := self._current.readinto(buffer)):
            path = next(self._files, None)
            if path is None:
                return 0
            self._current.close()
            self._current = open(path, "rb", buffering=0)  # noqa: SIM115 closed at its end or with this object
        return count

    def close(self) -> None:
        self._current.close()
        super().close()
