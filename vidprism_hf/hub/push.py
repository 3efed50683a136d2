"""`vidprism push`: an exported model to a repository of the Hub, once and whole.

What differs from the repository's tree is uploaded and committed on top of the commit that it was compared with
(`parent_commit`). After a failure with an unknown outcome the branch is looked at first: what has arrived is not
sent again. The exported folder is only read; the published card differs from its own in the name of the model.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from ..errors import LOG_IN, UserError, first_line, printable, printable_lines
from ..util import preview
from .card import addressed
from .card_merge import is_kept, left_out, merge_card, states_license
from .own_files import NotOwn
from .pushed_files import RESULTS, WRITTEN, LocalFile, read_export
from .refusals import PushError, explain
from .remote import COMMIT, MAIN, README, Remote
from .retries import MOVED_STATUS, HubError, Patience, bounded_client, read_failure, safe

DESCRIPTION = """Publish an exported model on the Hub. Links that leave the folder are refused; hard links cannot be
told from files, so look through a folder that comes from somebody else before you push it."""
MESSAGE = "Upload a VidPrism model"
SENT = ("new", "changed")
TO_REPLACE = f"to have the local one instead, delete {README} on the Hub and push again"
# Pushes of others that we let go first; each of them has a pause of its own.
MOVES = 20


@dataclass(frozen=True)
class PushedFile:
    """One file of a push: `state` is new, changed, unchanged, removed, or kept (a person's README of the Hub)."""

    path: str
    size: int
    state: str


@dataclass(frozen=True)
class PushResult:
    """What a push did, or would do.

    Args:
        url: Of the repository, branch or pull request.
        commit: That holds the folder's files; None for a dry run on a repository that is not there.
        files: Every file, sorted by name.
        notes: What the user should know, one line each.
        card: The README as it is, or would be, on the Hub.
    """

    url: str
    commit: str | None
    files: list[PushedFile]
    notes: list[str]
    card: str

    @property
    def uploaded(self) -> dict[str, int]:
        """Sizes in bytes of the files that were sent, by name."""
        return {file.path: file.size for file in self.files if file.state in SENT}

    @property
    def unchanged(self) -> list[str]:
        """Files that the Hub had."""
        return [file.path for file in self.files if file.state == "unchanged"]


@dataclass
class Plan:
    """What a push sends, against one commit of the branch.

    Args:
        files: Every file, and what becomes of it.
        wanted: What the branch is to hold afterwards; with the merged README, without one that stays.
        removed: Names of files that must not stay.
        card: The README as it will be.
        notes: What the user should know.
    """

    files: list[PushedFile]
    wanted: dict[str, LocalFile]
    removed: list[str]
    card: str
    notes: list[str]

    @property
    def operations(self) -> list[CommitOperationAdd | CommitOperationDelete]:
        """New ones each time, as the client wears them out."""
        sent = [self.wanted[file.path].operation() for file in self.files if file.state in SENT]
        return sent + [CommitOperationDelete(path) for path in self.removed]

    def missing(self, tree: dict[str, RepoFile]) -> list[str]:
        """What a commit's files lack, or have too much."""
        lacking = [path for path, file in self.wanted.items() if path not in tree or not file.is_same(tree[path])]
        return lacking + stale(tree, self.wanted)


def make_plan(files: dict[str, LocalFile], tree: dict[str, RepoFile], readme: Callable[[RepoFile], bytes]) -> Plan:
    """Compares the folder with the files of a commit.

    Args:
        files: Of the folder.
        tree: Of the repository.
        readme: Gives the content of the repository's README.
    """
    wanted, kept, notes = dict(files), False, []
    card = files[README].source.decode()
    if README in tree and not files[README].is_same(tree[README]):
        card, kept, notes = merge_readme(readme(tree[README]), card)
        wanted[README] = LocalFile(README, card.encode())
    listed = []
    for path, file in wanted.items():
        same = path in tree and file.is_same(tree[path])
        state = "new" if path not in tree else "unchanged" if same else "changed"
        listed.append(PushedFile(path, file.info.size, "kept" if kept and path == README else state))
    removed = stale(tree, files)
    listed += [PushedFile(path, tree[path].size, "removed") for path in removed]
    others = sorted(path for path in tree.keys() - files.keys() if RESULTS.fullmatch(path))
    notes += [f"{path}: not of this export, and stays; it may be of other weights" for path in others]
    if kept:
        del wanted[README]
    return Plan(sorted(listed, key=lambda file: file.path), wanted, removed, card, notes)


def stale(tree: dict[str, RepoFile], files: dict[str, LocalFile]) -> list[str]:
    """Files of an earlier export that this one has not got."""
    return sorted(path for path in tree.keys() - files.keys() if WRITTEN.fullmatch(path))


def merge_readme(present: bytes, local: str) -> tuple[str, bool, list[str]]:
    """The README to publish where the Hub has another one.

    Returns:
        Its text, whether it is the Hub's as it stands, and a note where something of the local one is not published.
    """
    try:
        text = present.decode()
    except UnicodeDecodeError:
        text, kept = present.decode(errors="replace"), True
    else:
        kept = is_kept(text, local)
    if kept:
        told = f"{README}: a person's on the Hub, and stays as it is; the local one is not published; {TO_REPLACE}"
        return text, True, [told]
    # A licence that the run was told stands in the generated part too: the metadata must not say another.
    merged = merge_card(text, local, anew={"license"} if states_license(local) else ())
    parts = ", ".join(left_out(local, merged))
    told = f"{README}: differs from the local one, and stays on the Hub as it is: {parts}; {TO_REPLACE}"
    return merged, False, [told] if parts else []


def push_export(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    patience: Patience | None = None,
) -> PushResult:
    """Publishes an exported model: what differs from the repository, in one commit.

    Args:
        folder: The export; it is only read.
        repo_id: `org/name`; made if it is not there.
        private: Whether a new repository is private; None for the owner's default.
        revision: Branch; made if it is not there. None for main.
        tag: For the commit that holds the files.
        create_pr: Propose the change as a pull request.
        message: Of the commit.
        dry_run: Only compare.
        token: None for the saved one, or HF_TOKEN.
        endpoint: Address of the Hub, if it is not the usual one.
        patience: How often failed steps are repeated, and time-outs.

    Raises:
        PushError: One line: what is wrong, what to do. Pushing again goes on from what has arrived.
    """
    folder, patience = Path(folder), patience or Patience()
    token = token or get_token()
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(f"--repo {first_line(error)}") from error
    if "/" not in repo_id:
        raise PushError(f"--repo {repo_id}: name its owner too, as org/{repo_id}")
    if create_pr and tag:
        raise PushError("--tag: names a published commit, so it does not go with --create-pr; tag what is merged")
    if token is None and not dry_run:
        raise PushError(f"{repo_id}: no token; {LOG_IN}")
    try:
        files, others = read_export(folder)
    except NotOwn as error:
        raise PushError(str(error)) from error
    except OSError as error:
        raise PushError(
            f"{error.filename or folder}: cannot be read ({error.strerror or first_line(error)})"
        ) from error
    files[README] = LocalFile(README, addressed(files[README].source.decode(), repo_id).encode())
    remote = Remote(HfApi(endpoint=endpoint, token=token), repo_id, revision, patience)
    ask = Ask(private, tag, create_pr, message or MESSAGE)
    with bounded_client(patience):
        try:
            result = compare(remote, files, ask) if dry_run else publish(remote, files, ask)
        except PushError as error:
            raise PushError(safe(f"{repo_id}: {error}", token)) from error.__cause__
        except Exception as error:
            told = explain(error, remote.step, remote.api.endpoint, remote.account)
            if told is None:
                raise
            raise PushError(safe(f"{repo_id}: {told}", token)) from error
    notes = [*result.notes, *(f"{path}: no file of an export; left out" for path in others)]
    if remote.revision != MAIN and not create_pr:
        notes.append(f"{README}: its snippets load main; pass revision={remote.revision!r} to load this branch")
    return replace(result, notes=[safe(note, token) for note in notes])


@dataclass(frozen=True)
class Ask:
    """What the user asks for."""

    private: bool | None
    tag: str | None
    create_pr: bool
    message: str


def compare(remote: Remote, files: dict[str, LocalFile], ask: Ask) -> PushResult:
    """What a push would do; changes nothing."""
    is_private, tree, head = remote.visibility(), {}, None
    check_visibility(is_private, ask)
    if is_private is not None:
        try:
            head = remote.head()
        except RevisionNotFoundError:
            head = Remote(remote.api, remote.repo_id, None, remote.patience).head()  # where the branch would start
        tree = remote.tree(head)
    plan = make_plan(files, tree, partial(remote.readme, head))
    if is_private is None:
        plan.notes.append(f"{remote.repo_id} is not there, or cannot be seen; a push would make it")
    return PushResult(remote.url, head, plan.files, plan.notes, plan.card)


def check_visibility(is_private: bool | None, ask: Ask) -> None:
    """Refuses to put in public what was to be private.

    Raises:
        PushError: If that would happen, or there is nothing to propose a change to.
    """
    if is_private is False and ask.private:
        raise PushError("is there and public, so --private cannot be had; make it private on the Hub first")
    if is_private is None and ask.create_pr:
        raise PushError(
            "there is no such repository, or this token cannot see it; --create-pr needs one, push without it"
        )


def publish(remote: Remote, files: dict[str, LocalFile], ask: Ask) -> PushResult:
    """Makes what is missing, sends what differs, and looks whether all has arrived."""
    is_private = remote.visibility()
    check_visibility(is_private, ask)
    if is_private is None:
        check_visibility(remote.create(ask.private), ask)
    if remote.revision != MAIN and not ask.create_pr:
        remote.make_branch()
    tags = remote.refs("tags") if ask.tag else {}
    if ask.tag in tags:
        check_tag(remote, files, ask.tag, tags[ask.tag])
    url, commit, plan = send(remote, files, ask)
    if ask.tag:
        try:
            remote.tag(ask.tag, commit)
        except Exception as error:
            told = explain(error, remote.step, remote.api.endpoint, remote.account) or first_line(error)
            done = "published" if plan.operations else "there already"
            raise PushError(f"{done} as commit {commit}, but not tagged {ask.tag}: {told}") from error
    return PushResult(url, commit, plan.files, plan.notes, plan.card)


def check_tag(remote: Remote, files: dict[str, LocalFile], tag: str, commit: str) -> None:
    """Refuses a tag that stands for something else, before anything is sent.

    Raises:
        PushError: If it does.
    """
    if commit != remote.head() or make_plan(files, remote.tree(commit), partial(remote.readme, commit)).operations:
        raise PushError(f"--tag {tag}: is there, at another commit; choose another name")


def send(remote: Remote, files: dict[str, LocalFile], ask: Ask) -> tuple[str, str, Plan]:
    """Uploads and commits until the branch, or a pull request, holds the files.

    Returns:
        URL, commit, and what was sent.
    """
    sent: Plan | None = None  # by a commit whose answer was lost
    on_top_of, lost, moved = "", remote.tries(COMMIT), remote.tries(COMMIT, tries=MOVES)
    while True:
        head = remote.head()
        tree = remote.tree(head)
        if sent and not sent.missing(tree):
            return remote.url, head, sent
        if sent and on_top_of != head and (commit := remote.landed(on_top_of, sent.missing)):
            return remote.url, commit, sent
        plan = make_plan(files, tree, partial(remote.readme, head))
        operations = plan.operations
        if not operations:
            return remote.url, head, plan
        if ask.create_pr and (found := remote.proposed(ask.message, plan.missing)):
            return *found, sent or plan
        remote.upload([step for step in operations if isinstance(step, CommitOperationAdd)], ask.create_pr)
        try:
            url, commit = remote.commit(operations, ask.message, head, ask.create_pr)
        except Exception as error:
            if read_failure(error).status in MOVED_STATUS:  # a "no" that is sure: others were faster
                moved.pause(error, passing=True)
            else:
                lost.pause(error)
                sent, on_top_of = plan, on_top_of or head
            continue
        check_arrived(remote, plan, commit)
        return url, commit, plan


def check_arrived(remote: Remote, plan: Plan, commit: str) -> None:
    """Compares a commit with what was sent: a repository's .gitignore makes the client leave files out.

    Raises:
        PushError: If something is missing.
    """
    try:
        missing = plan.missing(remote.tree(commit))
    except (httpx2.HTTPError, HubError, ConnectionError) as error:
        cause = read_failure(error).cause
        plan.notes.append(f"published, but the Hub could not be asked for what has arrived ({cause})")
        return
    if missing:
        raise PushError(f"commit {commit} lacks {preview(missing, 20)}; is it in the repository's .gitignore?")


def main(argv: list[str]) -> int:
    """`vidprism push`; the last line printed is the URL and the commit."""
    parser = argparse.ArgumentParser("vidprism push", description=DESCRIPTION)
    parser.add_argument("folder", type=Path, help="the export, such as runs/demo/export")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="the repository; made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch; made if it is not there (default: main)")
    parser.add_argument("--tag", help="tag the commit, such as v1")
    parser.add_argument("--create-pr", action="store_true", help="propose the change as a pull request")
    parser.add_argument("--message", help=f"of the commit (default: {MESSAGE!r})")
    parser.add_argument("--dry-run", action="store_true", help="send nothing; list the files and print the card")
    settings = vars(parser.parse_args(argv))
    result = push_export(settings.pop("folder"), settings.pop("repo"), **settings)
    print_result(result, settings["dry_run"], settings["tag"])
    return 0


def print_result(result: PushResult, dry_run: bool, tag: str | None) -> None:
    """Files, notes and tag; the card for a dry run; URL and commit."""
    for file in result.files:
        print(f"{file.state:<9} {file.size:>13,} bytes  {printable(file.path)}")
    for note in result.notes:
        print(f"note: {printable(note)}")
    total = sum(result.uploaded.values())
    print(f"{'To send' if dry_run else 'Sent'}: {len(result.uploaded)} files, {total:,} bytes")
    if tag:
        print(f"{'To tag' if dry_run else 'Tagged'}: {tag}")
    if dry_run:
        print(f"\n{printable_lines(result.card)}\n")
    print(printable(result.url), result.commit or "(no commit yet)")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"vidprism push: {error}")
