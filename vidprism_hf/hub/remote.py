"""A branch of a repository on the Hub: the requests of a push, with bounded retries."""

import reprlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, HfApi, get_session
from huggingface_hub.constants import REGEX_COMMIT_OID
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from .errors import PushError
from .pushed_files import LocalFile
from .retries import OddAnswer, Patience, Tries, expect, repeat, understood

T = TypeVar("T")
README = "README.md"
MAIN = "main"
COMMIT = "the commit"


class Remote:
    """A branch of a repository; idempotent requests are retried, within limits.

    Args:
        api: The client.
        repo_id: `org/name`.
        revision: Branch; None for main.
        patience: Limits of retries and time-outs.
    """

    def __init__(self, api: HfApi, repo_id: str, revision: str | None, patience: Patience):
        self.api, self.repo_id, self.revision, self.patience = api, repo_id, revision or MAIN, patience
        self.step = ""  # current step, for error messages

    def tries(self, step: str, **bounds: int) -> Tries:
        """Returns the retry state of a step, optionally with other limits."""
        return Tries(f"{self.repo_id}: {step}", replace(self.patience, **bounds), self.api.token)

    def ask(self, step: str, call: Callable[[], T]) -> T:
        """Makes an idempotent request, with retries."""
        self.step = step
        return repeat(lambda: understood(call), self.tries(step))

    @property
    def url(self) -> str:
        url = f"{self.api.endpoint}/{self.repo_id}"
        return url if self.revision == MAIN else f"{url}/tree/{quote(self.revision, safe='/')}"

    def visibility(self) -> bool | None:
        """Returns whether the repository is private; None if this token sees no such repository."""
        look = self.api.repo_info
        try:
            return self.ask("the repository lookup", lambda: expect(look(self.repo_id).private, bool))
        except RepositoryNotFoundError:
            return None

    def create(self, private: bool | None) -> bool | None:
        """Creates the repository, unless an earlier attempt or somebody else has.

        Returns:
            Whether an existing repository is private; otherwise the argument.

        Raises:
            PushError: If the name is taken.
        """
        try:
            self.ask("the creation of the repository", lambda: self.api.create_repo(self.repo_id, private=private))
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            found = self.visibility()
            if found is None:
                raise PushError(
                    "the name is taken by a repository that this token cannot see; choose another one"
                ) from error
            return found
        return private

    def refs(self, kind: str) -> dict[str, str]:
        """Returns commits by name of the "branches" or "tags"."""

        def look() -> dict[str, str]:
            found = getattr(self.api.list_repo_refs(self.repo_id), kind)
            return {expect(ref.name, str): expect(ref.target_commit, str) for ref in found}

        return self.ask("the branch listing", look)

    def make_branch(self) -> None:
        """Creates the branch if it does not exist.

        Raises:
            PushError: If the name is a tag or a commit.
        """
        if self.revision.startswith("refs/pr/") or self.revision in self.refs("branches"):
            return
        try:
            self.head()
        except RevisionNotFoundError:
            make = self.api.create_branch
            self.ask("the new branch", lambda: make(self.repo_id, branch=self.revision, exist_ok=True))
        else:
            raise PushError(f"--revision {self.revision}: is a tag or a commit; name a branch")

    def head(self) -> str:
        """Returns the branch's commit."""
        look = self.api.repo_info
        return self.ask("the branch lookup", lambda: commit_id(look(self.repo_id, revision=self.revision).sha))

    def tree(self, revision: str) -> dict[str, RepoFile]:
        """Returns the files of a commit."""

        def look() -> dict[str, RepoFile]:
            entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
            found = {expect(entry.path, str): entry for entry in entries if isinstance(entry, RepoFile)}
            # The client also finds no files in an answer of `{}`; existing files would then be overwritten.
            if not found and self.api.repo_info(self.repo_id, revision=revision).siblings:
                raise OddAnswer("no files, where the repository has some")
            return found

        return self.ask("the file listing", look)

    def readme(self, commit: str, entry: RepoFile) -> bytes:
        """Downloads the README of a commit and checks it against its entry in the list of files."""
        url = f"{self.api.endpoint}/{self.repo_id}/resolve/{commit}/{README}"

        def fetch() -> bytes:
            answer = get_session().get(url, headers=build_hf_headers(token=self.api.token))
            hf_raise_for_status(answer)
            if not LocalFile(README, answer.content).is_same(entry):
                raise OddAnswer(f"the content is not that of the {README} in the list of files")
            return answer.content

        return self.ask("the README download", fetch)

    def upload(self, additions: list[CommitOperationAdd], create_pr: bool) -> None:
        """Uploads the large files that the Hub does not have yet."""
        send = self.api.preupload_lfs_files
        settings = {"revision": self.revision, "create_pr": create_pr, "free_memory": False}
        self.ask("the upload", lambda: send(self.repo_id, additions, **settings))
        if ignored := [file.path_in_repo for file in additions if file._should_ignore]:
            named = ", ".join(ignored)
            raise PushError(f"a commit lacks {named}, which the repository's .gitignore lists; remove them there")

    def commit(self, operations: list, message: str, head: str, create_pr: bool) -> tuple[str, str]:
        """Commits, without retries.

        Returns:
            URL of the branch or pull request, and the commit.
        """
        self.step = COMMIT
        settings = {"commit_message": message, "revision": self.revision, "parent_commit": head, "create_pr": create_pr}

        def commit() -> tuple[str, str]:
            made = self.api.create_commit(self.repo_id, operations, **settings)
            return expect(made.pr_url, str, type(None)) or self.url, commit_id(made.oid)

        return understood(commit)

    def landed(self, since: str, missing: Callable[[dict[str, RepoFile]], list[str]]) -> str | None:
        """Returns the first complete commit after `since`, if any."""
        look = self.api.list_repo_commits
        commits = self.ask("the commit listing", lambda: look(self.repo_id, revision=self.revision))
        names = [commit.commit_id for commit in commits]
        later = names[: names.index(since)] if since in names else []
        return next((name for name in reversed(later) if not missing(self.tree(name))), None)

    def proposed(self, title: str, missing: Callable[[dict[str, RepoFile]], list[str]]) -> tuple[str, str] | None:
        """Returns URL and commit of our open pull request with all files, if any."""
        author = (self.account() or (None,))[0]
        kind = {"discussion_type": "pull_request", "discussion_status": "open", "author": author}
        look = self.api.get_repo_discussions
        found = self.ask("the pull request listing", lambda: list(look(self.repo_id, **kind)))
        for request in found:
            ref = f"refs/pr/{request.num}"
            if request.is_pull_request and request.title == title and not missing(self.tree(ref)):
                return request.url, Remote(self.api, self.repo_id, ref, self.patience).head()
        return None

    def account(self) -> tuple[str, str] | None:
        """Returns the name of the token's owner and the token's role, if known."""
        try:
            told = self.api.whoami()
            return expect(told.get("name", ""), str), told.get("auth", {}).get("accessToken", {}).get("role", "")
        except Exception:  # only needed for a better message or a shorter list
            return None

    def tag(self, name: str, commit: str) -> None:
        """Tags a commit.

        Raises:
            PushError: If the tag exists at another one.
        """
        try:
            self.ask("the tag", lambda: self.api.create_tag(self.repo_id, tag=name, revision=commit))
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            if self.refs("tags").get(name) != commit:
                raise PushError(f"--tag {name}: already exists at another commit; choose another name") from error


def commit_id(name: Any) -> str:
    """Checks a commit hash of an answer.

    Raises:
        OddAnswer: If it is not one.
    """
    if not REGEX_COMMIT_OID.fullmatch(expect(name, str)):
        raise OddAnswer(f"{reprlib.repr(name)} instead of a commit hash")
    return name
