"""Uploads by Xet: hf-xet writes into a folder that the token's answer names, and a commit reads it from there.

`casUrl="local:///folder"` is a way of hf-xet for its own tests, not documented: tests skip where it is gone. Only
uploads go this way; downloads of the same files are redirects over HTTP, as for clients without hf-xet. The
layout of shards is documented at huggingface.co/docs/xet/shard.
"""

import os
import shutil
import struct
import time
from pathlib import Path

from .storage import Content, Repository, sha256
from .wire import Answer, Call

ENTRY = 48  # bytes of every record in a shard
LAST = b"\xff" * 32
VERIFIED, WITH_SHA256 = 1 << 31, 1 << 30


def token(call: Call, repo: Repository) -> Answer:
    """Leave to write into a new folder; hf-xet locks a folder for as long as its process lives."""
    folder = call.hub.folder / f"xet-{time.monotonic_ns()}"
    folder.mkdir()
    repo.xet_folders.append(folder)
    told = {"casUrl": f"local://{folder}", "accessToken": "xet", "exp": int(time.time()) + 3600}
    headers = {"X-Xet-Cas-Url": told["casUrl"], "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(told["exp"])}
    return Answer(200, told, headers)


def take(hub, repo: Repository, oid: str):
    """Make a large file that came by Xet an object of the repository, if it is there and whole."""
    for folder in repo.xet_folders:
        for shard in (folder / "xet" / "xorbs" / "shards").glob("*.mdb"):
            name = names_by_sha256(shard.read_bytes()).get(oid)
            file = rebuild(hub, folder, name) if name else None
            if file and sha256(file) == oid:
                repo.large[oid] = Content(file, large=True)
                return


def rebuild(hub, folder: Path, name: str) -> Path:
    """Put a file together from a copy of the folder, as the client holds the lock of the folder itself."""
    import hf_xet  # only here, as only clients with hf-xet upload this way

    copy = hub.folder / f"xet-{time.monotonic_ns()}"
    shutil.copytree(folder / "xet" / "xorbs", copy / "xet" / "xorbs", copy_function=link_or_copy)
    file = copy / "file"
    endpoint, until = f"local://{copy}", int(time.time()) + 3600
    with hf_xet.XetSession().new_file_download_group(endpoint, "xet", until) as group:
        group.start_download_file(hf_xet.XetFileInfo(name), str(file))
    return file


def link_or_copy(source: str, target: str):
    """Only the data base is ever written to again."""
    (shutil.copy if source.endswith(".redb") else os.link)(source, target)


def names_by_sha256(shard: bytes) -> dict[str, str]:
    """Xet's names of the files in a shard by their sha256."""
    names, at = {}, ENTRY
    while shard[at : at + 32] != LAST:
        name = hexadecimal(shard[at : at + 32])
        flags, count = struct.unpack_from("<II", shard, at + 32)
        at += ENTRY * (1 + count * (2 if flags & VERIFIED else 1))
        if flags & WITH_SHA256:
            names[hexadecimal(shard[at : at + 32])] = name
            at += ENTRY
    return names


def hexadecimal(hash: bytes) -> str:
    """A hash as Xet writes it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hash))
