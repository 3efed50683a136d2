"""Unpack archives of clips: zip, tar with any compression, and tar in several parts, safely and all or nothing.

Only files, folders and links that stay inside the folder are made. This is written out rather than left to
`tarfile`'s data filter, so that it holds on Python versions without it and for zip alike.
"""

import bz2
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
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..tables import DataError

MARKER = ".unpacked.json"
_SUFFIX = re.compile(r"\.(zip|tar|tar\.gz|tgz|tar\.bz2|tbz2?|tar\.xz|txz|rar|7z)$", re.IGNORECASE)
# Parts of one archive: x.tar.gz.part-aa, x.tar.gz.partaa, x.tar.gz.aa, x.tgz-00, x.tar.001; SSv2's x-00 has no suffix.
_PART = re.compile(
    r"(?P<name>.+\.(?:tar|tar\.gz|tgz|tar\.bz2|tar\.xz|txz|zip))[._-](?:part[._-]?)?(?P<part>[a-z]{2,3}|\d{2,3})$"
    r"|(?P<bare>[^.]+)-(?P<number>\d\d)$",
    re.IGNORECASE,
)
_LEFT_OUT = ("__MACOSX", ".DS_Store")
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError)


def archive_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Finds the archives among file names.

    Args:
        names: File names, with `/` between folders.

    Returns:
        For each archive its name without suffix and the files it consists of, parts in their order.

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
            raise DataError(f"{whole}: {len(order)} of its parts are here, one before or between them is missing")
        groups.setdefault(_SUFFIX.sub("", whole), []).extend(numbered[number] for number in order)
    clash = next((files for files in groups.values() if len(files) > 1 and _SUFFIX.search(files[0])), None)
    if clash:
        raise DataError(f"{clash[0]}: {clash[1]} has the same name but for its suffix; keep one of them")
    return groups


def unpack(
    archive: str | os.PathLike | Sequence[str | os.PathLike], folder: str | os.PathLike, strip: bool = False
) -> Path:
    """Unpacks an archive into a folder of its own, which appears only when it is complete.

    It is unpacked beside the folder and then renamed. What a cut-off run left is removed first; a folder that
    this archive was unpacked into before is left as it is. Two processes must not unpack into one folder at once.

    Args:
        archive: The file, or the parts of a tar archive in their order.
        folder: The folder to make.
        strip: Whether a single top folder that is called like `folder` or like the archive becomes the folder itself.

    Returns:
        The folder.

    Raises:
        DataError: If the archive is damaged, unsafe or of another kind, or the folder holds something else.
    """
    files = [Path(archive)] if isinstance(archive, (str, os.PathLike)) else [Path(part) for part in archive]
    folder = Path(folder)
    if _already_unpacked(files, folder):
        return folder
    beside = folder.parent / f".{folder.name}.unpacking"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        _unpack(files, _Target(files[0], beside / "files"))
        content = _content(files, folder, beside / "files", strip)
        sizes = [[path.name, path.stat().st_size] for path in files]
        (content / MARKER).write_text(json.dumps({"archives": sizes}), encoding="utf-8")
        os.replace(content, folder)
    except OSError as error:
        # Compression errors are OSErrors too, but no call of the system has given them a number.
        if error.errno is None:
            raise _damaged(files[0], error) from error
        raise DataError(
            f"{error.filename or files[0]}: unpacking failed ({error.strerror}); start again when it is mended"
        ) from error
    except _DAMAGED as error:
        raise _damaged(files[0], error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _part_number(text: str) -> int:
    if text.isdigit():
        return int(text)
    number = 0
    for letter in text.lower():
        number = 26 * number + ord(letter) - ord("a")
    return number


def _damaged(archive: Path, error: BaseException) -> DataError:
    cause = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{archive}: is damaged or cut off ({cause}); remove it and fetch it again")


def _already_unpacked(files: list[Path], folder: Path) -> bool:
    if not folder.exists():
        return False
    try:
        known = json.loads((folder / MARKER).read_text(encoding="utf-8"))["archives"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder}: was not unpacked from {files[0].name}; move it away") from None
    # The archive itself may be gone by now: to free its space is a good reason to have unpacked it.
    pairs = zip(files, known, strict=False)
    sizes = [[path.name, path.stat().st_size if path.exists() else size] for path, (_, size) in pairs]
    if sizes != known or len(files) != len(known):
        raise DataError(f"{folder}: was unpacked from another archive than {files[0]}; remove it")
    return True


def _content(files: list[Path], folder: Path, unpacked: Path, strip: bool) -> Path:
    tops = os.listdir(unpacked)
    names = {folder.name.lower(), next(iter(archive_groups([files[0].name])), "").lower()}
    if strip and len(tops) == 1 and tops[0].lower() in names and (unpacked / tops[0]).is_dir():
        return unpacked / tops[0]
    return unpacked


@dataclass
class _Target:
    """The folder that members are written into.

    Attributes:
        archive: Named in messages.
        root: The folder.
        links: Links to make once all files are written, so that no file is ever written through one:
            (member's name, target, whether it is a hard link).
    """

    archive: Path
    root: Path
    links: list[tuple[str, str, bool]] = field(default_factory=list)

    def __post_init__(self):
        self.root.mkdir()

    def path(self, name: str) -> Path | None:
        """Where a member goes; None if it is left out."""
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\0" in name or re.match(r"[A-Za-z]:", name):
            raise self.unsafe(name, "would be written outside the folder")
        if not parts or parts[0] == _LEFT_OUT[0] or parts[-1] == _LEFT_OUT[1]:
            return None
        return self.root.joinpath(*parts)

    def folder(self, name: str) -> None:
        path = self.path(name)
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)

    def file(self, name: str, content: BinaryIO) -> None:
        path = self.path(name)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                shutil.copyfileobj(content, file, 1 << 20)

    def make_links(self) -> None:
        root = os.path.realpath(self.root)
        made = []
        for name, target, hard in self.links:
            path = self.path(name)
            if path is None:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if hard:
                linked = self.path(target)
                if linked is None or not linked.is_file() or linked.is_symlink():
                    raise self.unsafe(name, f"is a link to {target}, which the archive does not hold")
                os.link(linked, path)
            else:
                os.symlink(target, path)
                made.append((name, path))
        for name, path in made:
            real = os.path.realpath(path)
            if os.path.commonpath([real, root]) != root or not os.path.exists(real):
                raise self.unsafe(name, "is a link that leaves the folder or leads nowhere")

    def unsafe(self, name: str, what: str) -> DataError:
        return DataError(f"{self.archive}: member {name!r} {what}; nothing was unpacked, do not trust this archive")


def _unpack(files: list[Path], target: _Target) -> None:
    suffix = files[0].suffix.lower()
    if suffix in (".rar", ".7z"):
        tool = "unrar x" if suffix == ".rar" else "7z x"
        raise DataError(
            f"{files[0]}: {suffix[1:]} archives are not read here; unpack it with `{tool}` (or `bsdtar -xf`) into a "
            "folder and give that folder as data.source"
        )
    with _Joined(files) as joined:
        start = joined.peek(4)
    if start[:2] == b"PK":
        if len(files) > 1:
            raise DataError(f"{files[0]}: zip in several parts is not read; join it with `zip -s 0` first")
        _unpack_zip(files[0], target)
    else:
        _unpack_tar(files, target)
    target.make_links()


def _unpack_zip(path: Path, target: _Target) -> None:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = _zip_name(info)
            if info.flag_bits & 0x1:
                raise DataError(f"{path}: is encrypted; unpack it by hand and give the folder as data.source")
            if info.is_dir():
                target.folder(name)
            elif stat.S_ISLNK(info.external_attr >> 16):
                target.links.append((name, os.fsdecode(archive.read(info)), False))
            else:
                try:
                    content = archive.open(info)
                except NotImplementedError as error:
                    raise DataError(f"{path}: {error} ({name}); unpack it by hand") from error
                with content:
                    target.file(name, content)


def _zip_name(info: zipfile.ZipInfo) -> str:
    name = info.filename.replace("\\", "/")
    if info.flag_bits & 0x800:
        return name
    # Without the flag names are cp437 by the standard and UTF-8 in practice.
    try:
        return name.encode("cp437").decode("utf-8")
    except UnicodeError:
        return name


def _unpack_tar(files: list[Path], target: _Target) -> None:
    # Not tarfile's own way of reading a compressed stream, which skips the checksum at its end.
    with _Joined(files) as joined, _decompressed(joined) as stream:
        counted = _Counted(stream)
        with tarfile.open(fileobj=counted, mode="r|") as archive:
            for member in archive:
                if member.isdir():
                    target.folder(member.name)
                elif member.isreg():
                    target.file(member.name, archive.extractfile(member))
                elif member.islnk() or member.issym():
                    target.links.append((member.name, member.linkname, member.islnk()))
                else:
                    raise target.unsafe(member.name, "is neither a file, a folder nor a link")
            end = archive.offset
        while counted.read(1 << 20):
            pass
        if counted.total < end + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("there is no end mark")


def _decompressed(joined: "_Joined") -> BinaryIO:
    start = joined.peek(6)
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=joined)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(joined)
    return lzma.LZMAFile(joined) if start.startswith(b"\xfd7zXZ") else joined


class _Counted:
    """A stream that knows how much of it has been read."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self.total = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.total += len(data)
        return data


class _Joined(io.BufferedReader):
    """Reads files one after the other as if they were one."""

    def __init__(self, files: Sequence[Path]):
        super().__init__(_Chain(files), 1 << 20)


class _Chain(io.RawIOBase):
    def __init__(self, files: Sequence[Path]):
        super().__init__()
        self._files = iter(files)
        self._current: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while True:
            if self._current is None:
                path = next(self._files, None)
                if path is None:
                    return 0
                self._current = open(path, "rb", buffering=0)  # noqa: SIM115 closed when it is read or with this object
            count = self._current.readinto(buffer)
            if count:
                return count
            self._current.close()
            self._current = None

    def close(self) -> None:
        if self._current is not None:
            self._current.close()
        super().close()
