"""Endpoints of the test Hub for accounts, repositories, references, cards and pull requests."""

import re

from . import cards
from .reading import REPO, at, readable, repository
from .storage import MAIN, Account, Commit, Content, Discussion, Repository
from .wire import Answer, Call, Refused, Route

NAME = re.compile(r"(?!-|\.)(?!.*(--|\.\.))[\w.-]{1,96}(?<!-|\.)")
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in (".bin", ".mp4", ".safetensors"))


def caller(call: Call) -> Account:
    """Who calls, with a token that may write.

    Raises:
        Refused: 401 without a token, 403 with a read-only one.
    """
    if call.token is None:
        raise Refused(401, "Invalid username or password.")
    if call.token.role != "write":
        raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
    return call.token.account


def writable(call: Call, kinds: str, name: str, by_pull: bool = False) -> Repository:
    """The repository, if the caller may change it, or open a pull request with `by_pull`."""
    repo = repository(call, kinds, name)
    account = caller(call)
    if not by_pull and not (account.writes(repo.namespace) or account.name == repo.creator):
        raise Refused(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
    return readable(call, repo) if by_pull else repo


def wants_pull(call: Call) -> bool:
    return call.query.get("create_pr") == ["1"]


def whoami(call: Call) -> Answer:
    if call.token is None:
        raise Refused(401, "Invalid username or password.")
    account = call.token.account
    access = {"type": "access_token", "accessToken": {"displayName": "test", "role": call.token.role}}
    orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in account.orgs.items()]
    return Answer(200, {"type": "user", "id": account.name, "name": account.name, "orgs": orgs, "auth": access})


def auth_check(call: Call, kinds: str, name: str, write: str | None) -> Answer:
    writable(call, kinds, name) if write else readable(call, repository(call, kinds, name))
    return Answer(200, {})


def named(call: Call, asked: dict) -> tuple[str, str]:
    """Kind and full name that a request for a repository gives; the caller's own namespace where it gives none."""
    namespace = asked.get("organization") or (call.token.account.name if call.token else "")
    kind, name = asked.get("type") or "model", asked.get("name")
    if kind not in ("model", "dataset", "space") or not isinstance(name, str) or not NAME.fullmatch(name):
        raise Refused(400, f"Invalid repo name or type: {name!r}, {kind!r}")
    return kind, f"{namespace}/{name}"


def create(call: Call) -> Answer:
    asked = call.json()
    kind, name = named(call, asked)
    namespace = name.split("/")[0]
    if call.token is None:
        raise Refused(401, "Invalid username or password.")
    if call.token.role != "write" or not call.token.account.creates(namespace):
        raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    repo = Repository(kind, name, private=asked.get("visibility") == "private")
    url = f"{call.hub.url}/{repo.path}"
    if (kind, name) in call.hub.repositories:
        raise Refused(409, f"You already created this {kind} repo: {name}", url=url)
    repo.creator = call.token.account.name
    call.hub.repositories[kind, name] = repo
    first = {".gitattributes": Content(ATTRIBUTES.encode(), large=False)}
    repo.add("refs/heads/main", None, first, "initial commit", "", repo.creator)
    return Answer(200, {"url": url, "name": name, "id": name})


def delete(call: Call) -> Answer:
    kind, name = named(call, call.json())
    writable(call, kind, name)
    del call.hub.repositories[kind, name]
    return Answer(200, b"OK")


def validate(call: Call) -> Answer:
    asked = call.json()
    errors, warnings = cards.judge(asked.get("content", ""), asked.get("repoType", "model"))
    told = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Answer(400 if errors else 200, told)


def create_branch(call: Call, kinds: str, name: str, branch: str) -> Answer:
    repo = writable(call, kinds, name)
    if branch.startswith("refs/"):
        raise Refused(400, f"Invalid reference for a branch: {branch}")
    start = at(repo, call.json().get("startingPoint"))
    return new_ref(repo, f"refs/heads/{branch}", start)


def create_tag(call: Call, kinds: str, name: str, revision: str) -> Answer:
    repo = writable(call, kinds, name)
    return new_ref(repo, f"refs/tags/{call.json()['tag']}", at(repo, revision))


def new_ref(repo: Repository, ref: str, commit: Commit) -> Answer:
    if ref in repo.refs:
        raise Refused(409, f"Reference already exists: {ref}")
    repo.refs[ref] = commit.oid
    return Answer(200, {"ref": ref, "targetCommit": commit.oid})


def delete_ref(call: Call, kinds: str, name: str, sort: str, ref: str) -> Answer:
    repo = writable(call, kinds, name)
    full = f"refs/{'tags' if sort == 'tag' else 'heads'}/{ref}"
    if full not in repo.refs:
        raise Refused(404, f"Invalid rev id: {ref}", "RevisionNotFound")
    if full == "refs/heads/main":
        raise Refused(403, "Cannot delete the main branch")
    del repo.refs[full]
    return Answer(200, {})


def new_discussion(repo: Repository, title: str, author: str, pull: bool, base: str = MAIN) -> Discussion:
    made = Discussion(len(repo.discussions) + 1, title, author, pull, base)
    repo.discussions[made.num] = made
    return made


def discuss(call: Call, kinds: str, name: str) -> Answer:
    repo, asked = writable(call, kinds, name, by_pull=True), call.json()
    made = new_discussion(repo, asked["title"], caller(call).name, asked["pullRequest"])
    if made.pull:
        made.status = "draft"
        repo.refs[made.ref] = at(repo, MAIN).oid
    return Answer(200, told(repo, made))


def told(repo: Repository, item: Discussion) -> dict:
    facts = {
        "num": item.num,
        "title": item.title,
        "author": {"name": item.author},
        "createdAt": item.date,
        "status": item.status,
        "repo": {"name": repo.name, "type": repo.kind},
        "isPullRequest": item.pull,
        "events": [],
    }
    if item.pull:
        facts |= {"changes": {"base": item.base, "mergeCommitId": item.merged_as}, "filesWithConflicts": []}
    return facts


def discussions(call: Call, kinds: str, name: str) -> Answer:
    repo = readable(call, repository(call, kinds, name))
    found = [told(repo, item) for item in repo.discussions.values()]
    return Answer(200, {"count": len(found), "start": 0, "discussions": found})


def discussed(repo: Repository, num: str) -> Discussion:
    if int(num) not in repo.discussions:
        raise Refused(404, f"no discussion {num}")
    return repo.discussions[int(num)]


def discussion(call: Call, kinds: str, name: str, num: str) -> Answer:
    repo = readable(call, repository(call, kinds, name))
    return Answer(200, told(repo, discussed(repo, num)))


def merge(call: Call, kinds: str, name: str, num: str) -> Answer:
    repo = writable(call, kinds, name)
    item = discussed(repo, num)
    base, new = at(repo, item.base), at(repo, item.ref)
    if base not in repo.history(new):
        raise Refused(409, "the base branch has moved since")
    title = f"{item.title} (#{num})"
    made = repo.add(repo.full_ref(item.base), base, new.files, title, "", caller(call).name)
    item.status, item.merged_as = "merged", made.oid
    return Answer(200, told(repo, item))


ROUTES = (
    Route("GET", r"/api/whoami-v2", "whoami", whoami),
    Route("GET", REPO + r"/auth-check(/write)?", "auth", auth_check),
    Route("POST", r"/api/repos/create", "create", create),
    Route("DELETE", r"/api/repos/delete", "delete", delete),
    Route("POST", r"/api/validate-yaml", "validate", validate),
    Route("POST", REPO + r"/branch/(.+)", "branch", create_branch),
    Route("POST", REPO + r"/tag/(.+)", "tag", create_tag),
    Route("DELETE", REPO + r"/(tag|branch)/(.+)", "delete", delete_ref),
    Route("POST", REPO + r"/discussions", "discussion", discuss),
    Route("GET", REPO + r"/discussions", "discussion", discussions),
    Route("GET", REPO + r"/discussions/(\d+)", "discussion", discussion),
    Route("POST", REPO + r"/discussions/(\d+)/merge", "discussion", merge),
)
