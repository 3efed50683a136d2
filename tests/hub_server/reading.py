"""Endpoints of the test Hub that read: information, listings, references, files."""

import re
from urllib.parse import quote, urlencode

import yaml

from .cards import front_matter, judge_results
from .storage import Commit, Content, Repository
from .wire import Answer, Call, Refused, Route

REPO = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"
SPECIAL = re.compile(r"(refs/(?:pr|convert)/[^/]+)(?:/(.*))?")


def repository(call: Call, kinds: str, name: str) -> Repository:
    """The repository, if the caller may know that it exists.

    Raises:
        Refused: 401 without a token, 404 with one, as the real Hub does for missing and private repositories.
    """
    found = call.hub.repositories.get((kinds.rstrip("s"), name))
    visible = found and (not found.private or (call.token and call.token.account.sees(found.namespace)))
    if visible:
        return found
    if call.token is None:
        raise Refused(401, "Invalid username or password.", "RepoNotFound")
    raise Refused(404, "Repository not found", "RepoNotFound")


def readable(call: Call, repo: Repository) -> Repository:
    """The repository, if the caller may read its files."""
    account = call.token and call.token.account
    if not repo.gated or (account and (account.name in repo.allowed or account.writes(repo.namespace))):
        return repo
    ask = "You must have access to it and be authenticated to access it. Please log in."
    if account:
        ask = f"Visit {call.hub.url}/{repo.path} to ask for access."
    text = f"Access to {repo.kind} {repo.name} is restricted and you are not in the authorized list. {ask}"
    raise Refused(403 if account else 401, text, "GatedRepo")


def at(repo: Repository, revision: str | None) -> Commit:
    commit = repo.commit(revision or "main")
    if commit is None:
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def large_facts(content: Content, key: str = "oid") -> dict:
    return {key: content.sha256, "size": content.size, "pointerSize": len(content.pointer)}


def info(call: Call, kinds: str, name: str, revision: str | None = None) -> Answer:
    repo = repository(call, kinds, name)
    commit = at(repo, revision)
    siblings = []
    for path, content in commit.files.items():
        sibling = {"rfilename": path}
        if "blobs" in call.query:
            sibling |= {"size": content.size, "blobId": content.oid}
            sibling |= {"lfs": large_facts(content, "sha256")} if content.large else {}
        siblings.append(sibling)
    card = card_of(commit)
    facts = {
        "_id": repo.name,
        "id": repo.name,
        "author": repo.namespace,
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": repo.created,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags") or [],
        "cardData": card,
        "siblings": siblings,
    }
    if repo.kind == "model":
        facts |= {"modelId": repo.name, "evalResults": list(evaluations(commit))}
        facts |= {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
    return Answer(200, facts)


def evaluations(commit: Commit):
    """Results in .eval_results/ as the Hub tells them, with what is wrong with a file in place of its results."""
    for path, content in commit.files.items():
        if path.startswith(".eval_results/") and path.endswith((".yaml", ".yml")):
            text = content.read().decode()
            error = judge_results(text)
            found = [{"error": error}] if error else [{"data": entry} for entry in yaml.safe_load(text)]
            yield from ({"filename": path} | entry for entry in found)


def card_of(commit: Commit) -> dict:
    """The metadata of the README; nothing where it is missing or no mapping."""
    if "README.md" not in commit.files:
        return {}
    try:
        return front_matter(commit.files["README.md"].read().decode()) or {}
    except ValueError:
        return {}


def tree_entry(commit: Commit, path: str, expand: bool) -> dict | None:
    content = commit.files.get(path)
    if content is not None:
        entry = {"type": "file", "oid": content.oid, "size": content.size, "path": path}
        entry |= {"lfs": large_facts(content)} if content.large else {}
    elif any(file.startswith(path + "/") for file in commit.files):
        entry = {"type": "directory", "oid": Content(path.encode(), False).oid, "size": 0, "path": path}
    else:
        return None
    if expand:
        entry["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": commit.date}
    return entry


def below(commit: Commit, folder: str, recursive: bool) -> list[str]:
    """Paths of the files and folders in a folder ("" for all)."""
    prefix = folder + "/" if folder else ""
    paths = set()
    for file in commit.files:
        if file.startswith(prefix):
            parts = file[len(prefix) :].split("/")
            depths = range(1, len(parts) + 1) if recursive else (1,)
            paths |= {prefix + "/".join(parts[:depth]) for depth in depths}
    return sorted(paths)


def truth(call: Call, name: str) -> bool:
    return call.query.get(name, ["false"])[0].lower() in ("true", "1")


def tree(call: Call, kinds: str, name: str, revision: str, folder: str | None = None) -> Answer:
    repo = repository(call, kinds, name)
    if folder and revision == "refs":  # a special reference that was not quoted
        revision, folder = SPECIAL.fullmatch(f"{revision}/{folder}").groups()
    commit, folder, expand = at(repo, revision), (folder or "").strip("/"), truth(call, "expand")
    paths = [folder] if folder in commit.files else below(commit, folder, truth(call, "recursive"))
    if folder and not paths:
        raise Refused(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
    start = int(call.query.get("cursor", ["0"])[0])
    end = start + call.hub.page_size
    headers = {}
    if end < len(paths):
        query = {name: values[0] for name, values in call.query.items()} | {"cursor": end}
        headers["Link"] = f'<{call.hub.url}{call.path}?{urlencode(query)}>; rel="next"'
    return Answer(200, [tree_entry(commit, path, expand) for path in paths[start:end]], headers)


def paths_info(call: Call, kinds: str, name: str, revision: str) -> Answer:
    commit = at(repository(call, kinds, name), revision)
    form = call.form()
    expand = form.get("expand", ["false"])[0].lower() == "true"
    entries = (tree_entry(commit, path.strip("/"), expand) for path in form.get("paths", []))
    return Answer(200, [entry for entry in entries if entry])


def refs(call: Call, kinds: str, name: str) -> Answer:
    repo = repository(call, kinds, name)

    def listed(prefix: str) -> list[dict]:
        return [
            {"name": ref[len(prefix) :], "ref": ref, "targetCommit": oid}
            for ref, oid in repo.refs.items()
            if ref.startswith(prefix)
        ]

    found = {"branches": listed("refs/heads/"), "converts": listed("refs/convert/"), "tags": listed("refs/tags/")}
    return Answer(200, found | ({"pullRequests": listed("refs/pr/")} if "include_prs" in call.query else {}))


def commits(call: Call, kinds: str, name: str, revision: str) -> Answer:
    repo = repository(call, kinds, name)
    listed = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": commit.date,
        }
        for commit in repo.history(at(repo, revision))
    ]
    return Answer(200, listed)


def resolve(call: Call, kinds: str | None, name: str, revision: str, path: str) -> Answer:
    """A file: regular ones at once, large ones by a redirect to their store."""
    if revision == "refs":
        revision, path = SPECIAL.fullmatch(f"{revision}/{path}").groups()
    repo = readable(call, repository(call, (kinds or "models/").rstrip("/"), name))
    commit = at(repo, revision)
    headers = {"X-Repo-Commit": commit.oid}
    content = commit.files.get(path)
    if content is None:
        refused = Refused(404, "Entry not found", "EntryNotFound")
        refused.answer.headers |= headers
        raise refused
    if not content.large:
        return Answer(200, content, headers | {"Content-Type": "text/plain; charset=utf-8"})
    headers |= {"X-Linked-Etag": f'"{content.etag}"', "X-Linked-Size": str(content.size)}
    headers["Location"] = f"{call.hub.store_url}/{repo.path}/{content.sha256}/{quote(path.split('/')[-1])}"
    return Answer(302, b"", headers)


def stored(call: Call, kinds: str | None, name: str, sha256: str) -> Answer:
    """The store of large files, which knows no tokens: whoever has the address may read."""
    repo = call.hub.repositories.get(((kinds or "models/").rstrip("s/"), name))
    if repo is None or sha256 not in repo.large:
        raise Refused(403, "Access Denied")
    return Answer(200, repo.large[sha256], {"Content-Type": "application/octet-stream"})


ROUTES = (
    Route("GET", REPO, "info", info),
    Route("GET", REPO + r"/revision/(.+)", "info", info),
    Route("GET", REPO + r"/tree/([^/]+)(?:/(.*))?", "tree", tree),
    Route("POST", REPO + r"/paths-info/(.+)", "paths", paths_info),
    Route("GET", REPO + r"/refs", "refs", refs),
    Route("GET", REPO + r"/commits/(.+)", "commits", commits),
    Route("GET", r"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve", resolve),
)
STORE_ROUTES = (Route("GET", r"/(datasets/|spaces/)?([^/]+/[^/]+)/(\w{64})/[^/]*", "content", stored),)
