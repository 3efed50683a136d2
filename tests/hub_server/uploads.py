"""Endpoints of the test Hub for large files: what is one, where to put it, whether it came whole."""

import base64
import binascii
import hashlib
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from . import xet
from .reading import REPO, at
from .repos import wants_pull, writable
from .storage import Content, Repository, is_large, sha256
from .wire import Answer, Call, Refused, Route

LFS = r"/(datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects"
LFS_TYPE = "application/vnd.git-lfs+json"
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class Upload:
    """A large file on its way: the store checks it, the Hub takes it over when the client asks to verify."""

    repo: Repository
    oid: str
    size: int
    part_size: int | None
    parts: dict[int, tuple[Path, str]] = field(default_factory=dict)
    content: Content | None = None


def preupload(call: Call, kinds: str, name: str, revision: str) -> Answer:
    repo = writable(call, kinds, name, wants_pull(call))
    commit = at(repo, revision)
    answers = []
    for file in call.json()["files"]:
        path, size, sample = checked_path(file["path"]), file["size"], decoded(file["sample"])
        if type(size) is not int or len(sample) != min(size, 512):
            raise Refused(400, f"the sample of {path} is not its first 512 bytes")
        mode = "lfs" if is_large(path, size, sample) else "regular"
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if path in commit.files:
            answer["oid"] = commit.files[path].etag
        answers.append(answer)
    return Answer(200, {"files": answers})


def decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, "Invalid base64") from error


def checked_path(path: str) -> str:
    parts = path.split("/")
    if any(part in ("", ".", "..", ".git") for part in parts) or "\\" in path:
        raise Refused(400, f"Invalid path: {path!r}")
    return path


def batch(call: Call, kinds: str | None, name: str) -> Answer:
    if not call.headers.get("Content-Type", "").startswith(LFS_TYPE):
        raise Refused(415, f"expected {LFS_TYPE}")
    asked = call.json()
    if asked.get("operation") != "upload" or asked.get("hash_algo") != "sha256":
        raise Refused(422, "only uploads by sha256 are served")
    repo = writable(call, (kinds or "models").rstrip("/"), name, by_pull="ref" not in asked)
    if "ref" in asked:
        at(repo, asked["ref"]["name"])
    objects = [offer(call.hub, repo, item["oid"], item["size"], asked["transfers"]) for item in asked["objects"]]
    multipart = any("chunk_size" in item.get("actions", {}).get("upload", {}).get("header", {}) for item in objects)
    answer = {"transfer": "multipart" if multipart else "basic", "objects": objects}
    return Answer(200, answer, {"Content-Type": LFS_TYPE})


def offer(hub, repo: Repository, oid: str, size: int, transfers: list[str]) -> dict:
    """Where to put a large file, or nothing to do if the repository has it."""
    told = {"oid": oid, "size": size, "authenticated": True}
    if not SHA256.fullmatch(oid) or type(size) is not int or size < 1:
        return told | {"error": {"code": 422, "message": "invalid oid or size"}}
    if oid in repo.large:
        if repo.large[oid].size != size:
            return told | {"error": {"code": 422, "message": f"{oid} has another size"}}
        return told
    parts = -(-size // hub.part_size)
    many = parts > 1 and "multipart" in transfers
    ticket = hub.ticket(Upload(repo, oid, size, hub.part_size if many else None))
    put = f"{hub.store_url}/upload/{ticket}"
    upload = {"href": put}
    if many:
        header = {"chunk_size": str(hub.part_size)} | {str(n): f"{put}/{n}" for n in range(1, parts + 1)}
        upload = {"href": f"{hub.url}/api/complete_multipart/{ticket}", "header": header}
    verify = {"href": f"{hub.url}/{repo.path}.git/info/lfs/objects/verify"}
    return told | {"actions": {"upload": upload, "verify": verify}}


def ticketed(call: Call, ticket: str) -> Upload:
    upload = call.hub.uploads.get(ticket)
    if upload is None:
        raise Refused(403, "Request has expired")
    return upload


def put(call: Call, ticket: str, part: str | None) -> Answer:
    """The store takes a file, or a part of one."""
    upload = ticketed(call, ticket)
    if (part is None) != (upload.part_size is None):
        raise Refused(400, "this address is not for that")
    size, number = upload.size, int(part or 1)
    if part:
        size = min(upload.part_size, upload.size - upload.part_size * (number - 1))
    received = call.body.stat().st_size
    if received != size:
        raise Refused(400, f"IncompleteBody: {received} bytes came instead of {size}")
    if part is None:
        keep(call.hub, upload, call.body)
        return Answer(200, b"", {"ETag": f'"{upload.oid}"'})
    kept = call.hub.folder / f"{ticket}.{number}"
    call.body.replace(kept)
    etag = f'"{hashlib.md5(kept.read_bytes()).hexdigest()}"'
    upload.parts[number] = kept, etag
    return Answer(200, b"", {"ETag": etag})


def keep(hub, upload: Upload, file: Path):
    """Take a whole file into the store.

    Raises:
        Refused: If it is not the file that was announced.
    """
    if sha256(file) != upload.oid:
        raise Refused(400, "XAmzContentSHA256Mismatch: the content does not have the announced sha256")
    kept = hub.folder / upload.oid
    file.replace(kept)
    upload.content = Content(kept, large=True)


def complete(call: Call, ticket: str) -> Answer:
    upload = ticketed(call, ticket)
    asked = call.json()
    told = {part["partNumber"]: part["etag"] for part in asked["parts"]}
    parts = {number: etag for number, (_, etag) in upload.parts.items()}
    if asked["oid"] != upload.oid or told != parts or len(parts) != -(-upload.size // upload.part_size):
        raise Refused(400, "InvalidPart: parts are missing or have other ETags")
    with open(call.body, "wb") as whole:
        for number in sorted(parts):
            with open(upload.parts[number][0], "rb") as part:
                shutil.copyfileobj(part, whole)
    keep(call.hub, upload, call.body)
    return Answer(200, {})


def verify(call: Call, kinds: str | None, name: str) -> Answer:
    """The Hub takes over what lies in the store."""
    asked = call.json()
    repo = writable(call, (kinds or "models").rstrip("/"), name, by_pull=True)
    for upload in call.hub.uploads.values():
        if upload.repo is repo and upload.oid == asked["oid"] and upload.content:
            if upload.size != asked["size"]:
                raise Refused(422, "the size does not match")
            repo.large[upload.oid] = upload.content
            return Answer(200, {})
    raise Refused(404, f"no object {asked['oid']} was uploaded")


def xet_token(call: Call, kinds: str, name: str, revision: str) -> Answer:
    repo = writable(call, kinds, name, wants_pull(call))
    if not wants_pull(call):
        at(repo, revision)
    return xet.token(call, repo)


ROUTES = (
    Route("POST", REPO + r"/preupload/(.+)", "preupload", preupload),
    Route("GET", REPO + r"/xet-write-token/(.+)", "xet-token", xet_token),
    Route("POST", LFS + r"/batch", "batch", batch),
    Route("POST", LFS + r"/verify", "verify", verify),
    Route("POST", r"/api/complete_multipart/(\w+)", "complete", complete),
)
STORE_ROUTES = (Route("PUT", r"/upload/(\w+)(?:/(\d+))?", "upload", put),)
