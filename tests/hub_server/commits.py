"""The endpoint of the test Hub that commits."""

import json
from pathlib import Path

from . import cards, xet
from .reading import REPO, at
from .repos import caller, new_discussion, wants_pull, writable
from .storage import REGULAR_LIMIT, Commit, Content, Repository
from .uploads import checked_path, decoded
from .wire import Answer, Call, Refused, Route


def commit(call: Call, kinds: str, name: str, revision: str) -> Answer:
    pull = wants_pull(call)
    repo = writable(call, kinds, name, pull)
    if call.headers.get("Content-Type") != "application/x-ndjson":
        raise Refused(415, "expected application/x-ndjson")
    header, operations = parsed(call.body.read_bytes())
    ref, head, parent = repo.full_ref(revision), at(repo, revision), header.get("parentCommit")
    if not pull and (ref is None or ref.startswith("refs/tags/")):
        raise Refused(400, f"Invalid reference for a branch: {revision}")
    if pull and parent:
        head = at(repo, parent)
    elif parent and parent != head.oid:
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for key, value in operations:
        if key == "lfsFile" and value["oid"] not in repo.large:
            xet.take(call.hub, repo, value["oid"])
        apply(repo, files, key, value)
    check_card(repo, files, head)
    author, title, message = caller(call).name, header["summary"], header.get("description", "")
    opened = new_discussion(repo, title, author, pull=True, base=revision) if pull else None
    made = repo.add(opened.ref if opened else ref, head, files, title, message, author)
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{call.hub.url}/{repo.path}/commit/{made.oid}"}
    if opened:
        answer["pullRequestUrl"] = f"{call.hub.url}/{repo.path}/discussions/{opened.num}"
    return Answer(200, answer | {"hookOutput": ""})


def parsed(body: bytes) -> tuple[dict, list[tuple[str, dict]]]:
    """Header and operations of a commit sent as lines of JSON."""
    try:
        lines = [json.loads(line) for line in body.splitlines() if line]
        keyed = [(line["key"], line["value"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(400, "Invalid ndjson") from error
    if not keyed or keyed[0][0] != "header" or not keyed[0][1].get("summary"):
        raise Refused(400, "the first line must be the header, with a summary")
    return keyed[0][1], keyed[1:]


def apply(repo: Repository, files: dict[str, Content], key: str, value: dict):
    """Apply one operation of a commit to `files`."""
    path = checked_path(value["path"].rstrip("/") if key == "deletedFolder" else value["path"])
    inside = [file for file in files if file.startswith(path + "/")]
    if key == "deletedFile" and path in files:
        del files[path]
    elif key == "deletedFolder" and inside:
        for file in inside:
            del files[file]
    elif key.startswith("deleted"):
        raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    elif inside or any(str(folder) in files for folder in Path(path).parents):
        raise Refused(400, f"{path} would be a file and a folder at once")
    elif key == "file":
        files[path] = regular(path, decoded(value["content"]))
    elif key == "lfsFile":
        files[path] = large(repo, path, value)
    else:
        raise Refused(400, f"Unknown operation: {key}")


def regular(path: str, content: bytes) -> Content:
    if len(content) > REGULAR_LIMIT:
        raise Refused(
            400, f"Your push was rejected because it contains files larger than 10 MiB. Offending file: {path}"
        )
    if b"\0" in content:
        raise Refused(400, f"Your push was rejected because it contains binary files. Offending file: {path}")
    return Content(content, large=False)


def large(repo: Repository, path: str, value: dict) -> Content:
    content = repo.large.get(value["oid"]) if value["algo"] == "sha256" else None
    if content is None or value.get("size", content.size) != content.size:
        text = "Your push was rejected because an LFS pointer pointed to a file that does not exist. Offending file: "
        raise Refused(400, text + path)
    return content


def check_card(repo: Repository, files: dict[str, Content], head: Commit):
    readme = files.get("README.md")
    if readme is not None and readme is not head.files.get("README.md"):
        errors, _ = cards.judge(readme.read().decode(), repo.kind)
        if errors:
            raise Refused(400, "Your push was rejected during YAML metadata verification: " + "; ".join(errors))


ROUTES = (Route("POST", REPO + r"/commit/(.+)", "commit", commit),)
