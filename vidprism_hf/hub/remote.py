"""One branch of a repository on the Hub: what `vidprism push` asks of it, each request within bounds."""

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

from .pushed_files import LocalFile
from .refusals import PushError
from .retries import OddAnswer, Patience, Tries, expect, repeat, understood

T = TypeVar("T")
README = "README.md"
MAIN = "main"
COMMIT = "the commit"


class Remote:
    """A branch of a repository; every request that may be repeated is, within bounds.

    Args:
        api: The client.
        repo_id: `org/name`.
        revision: Branch; None for main.
        patience: Bounds.
    """

    def __init__(self, api: HfApi, repo_id: str, revision: str | None, patience: Patience):
        self.api, self.repo_id, self.revision, self.patience = api, repo_id, revision or MAIN, patience
        self.step = ""  # under way, for the message if it fails

    def tries(self, step: str, **bounds: int) -> Tries:
        """A count of the failures of a step, with other bounds than the usual ones if some are given."""
        return Tries(f"{self.repo_id}: {step}", replace(self.patience, **bounds), self.api.token)

    def ask(self, step: str, call: Callable[[], T]) -> T:
        """Calls what does no harm when it is done twice."""
        self.step = step
        return repeat(lambda: understood(call), self.tries(step))

    @property
    def url(self) -> str:
        url = f"{self.api.endpoint}/{self.repo_id}"
        return url if self.revision == MAIN else f"{url}/tree/{quote(self.revision, safe='/')}"

    def visibility(self) -> bool | None:
        """Whether the repository is private; None if there is none that this token sees."""
        look = self.api.repo_info
        try:
            return self.ask("a look at the repository", lambda: expect(look(self.repo_id).private, bool))
        except RepositoryNotFoundError:
            return None

    def create(self, private: bool | None) -> bool | None:
        """Makes the repository, or finds that an earlier try, or somebody else, has made it.

        Returns:
            Whether what was found is private; what was asked for where there was nothing.

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
        """Commits by the names of the "branches" or "tags"."""

        def look() -> dict[str, str]:
            found = getattr(self.api.list_repo_refs(self.repo_id), kind)
            return {expect(ref.name, str): expect(ref.target_commit, str) for ref in found}

        return self.ask("a look at the branches", look)

    def make_branch(self) -> None:
        """Makes sure that the branch is there.

        Raises:
            PushError: If its name is a tag's or a commit's.
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
        """The branch's commit."""
        look = self.api.repo_info
        return self.ask("a look at the branch", lambda: commit_id(look(self.repo_id, revision=self.revision).sha))

    def tree(self, revision: str) -> dict[str, RepoFile]:
        """The files of a commit."""

        def look() -> dict[str, RepoFile]:
            entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
            found = {expect(entry.path, str): entry for entry in entries if isinstance(entry, RepoFile)}
            # The client finds no files in `{}`, too, and what is there would be written over.
            if not found and self.api.repo_info(self.repo_id, revision=revision).siblings:
                raise OddAnswer("no files, where the repository has some")
            return found

        return self.ask("a look at the files", look)

    def readme(self, commit: str, entry: RepoFile) -> bytes:
        """The README of a commit, which its list of files has an entry of."""
        url = f"{self.api.endpoint}/{self.repo_id}/resolve/{commit}/{README}"

        def fetch() -> bytes:
            answer = get_session().get(url, headers=build_hf_headers(token=self.api.token))
            hf_raise_for_status(answer)
            if not LocalFile(README, answer.content).is_same(entry):
                raise OddAnswer(f"the content is not that of the {README} in the list of files")
            return answer.content

        return self.ask("a look at the README", fetch)

    def upload(self, additions: list[CommitOperationAdd], create_pr: bool) -> None:
        """Sends the large files; what the Hub has by now is not sent again."""
        send = self.api.preupload_lfs_files
        settings = {"revision": self.revision, "create_pr": create_pr, "free_memory": False}
        self.ask("the upload", lambda: send(self.repo_id, additions, **settings))
        if ignored := [file.path_in_repo for file in additions if file._should_ignore]:
            named = ", ".join(ignored)
            raise PushError(f"a commit lacks {named}, which the repository's .gitignore names; take that out of it")

    def commit(self, operations: list, message: str, head: str, create_pr: bool) -> tuple[str, str]:
        """Commits, once.

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
        """The first whole commit after `since`, if there is one."""
        look = self.api.list_repo_commits
        commits = self.ask("a look at the commits", lambda: look(self.repo_id, revision=self.revision))
        names = [commit.commit_id for commit in commits]
        later = names[: names.index(since)] if since in names else []
        return next((name for name in reversed(later) if not missing(self.tree(name))), None)

    def proposed(self, title: str, missing: Callable[[dict[str, RepoFile]], list[str]]) -> tuple[str, str] | None:
        """URL and commit of our open pull request that is whole, if there is one."""
        author = (self.account() or (None,))[0]
        kind = {"discussion_type": "pull_request", "discussion_status": "open", "author": author}
        look = self.api.get_repo_discussions
        found = self.ask("a look at the pull requests", lambda: list(look(self.repo_id, **kind)))
        for request in found:
            ref = f"refs/pr/{request.num}"
            if request.is_pull_request and request.title == title and not missing(self.tree(ref)):
                return request.url, Remote(self.api, self.repo_id, ref, self.patience).head()
        return None

    def account(self) -> tuple[str, str] | None:
        """Name of the token's owner and role of the token, if the Hub tells."""
        try:
            told = self.api.whoami()
            return expect(told.get("name", ""), str), told.get("auth", {}).get("accessToken", {}).get("role", "")
        except Exception:  # asked for a better message, or a shorter list, only
            return None

    def tag(self, name: str, commit: str) -> None:
        """Tags a commit.

        Raises:
            PushError: If the tag is at another one.
        """
        try:
            self.ask("the tag", lambda: self.api.create_tag(self.repo_id, tag=name, revision=commit))
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            if self.refs("tags").get(name) != commit:
                raise PushError(f"--tag {name}: is there, at another commit; choose another name") from error


def commit_id(name: Any) -> str:
    """The name of a commit.

    Raises:
        OddAnswer: If it is none.
    """
    if not REGEX_COMMIT_OID.fullmatch(expect(name, str)):
        raise OddAnswer(f"{reprlib.repr(name)} where a commit's name belongs")
    return name
