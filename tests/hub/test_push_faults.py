"""The fault matrix of a push: it ends published, once and whole, or with one clear error and the export whole."""

import socket
import threading
from dataclasses import replace

import httpx2
import pytest
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory
from push_helpers import (
    QUICK,
    brisk,
    failed,
    first_commit,
    not_published,
    pauses,
    push,
    pushed_once,
    repo_of,
    with_bytes,
)
from small import complaint, files_of

from vidprism_hf.cli import main
from vidprism_hf.hub.refusals import PushError

pytest_plugins = ["hub_server.fixtures"]
pytestmark = pytest.mark.usefixtures("brisk")

__all__ = ["brisk", "pauses"]

READING = [pytest.param(step, marks=pytest.mark.slow) for step in ("info", "tree")]
WRITING = ["create", "validate", "preupload", "batch", "upload", "verify", "commit"]
STEPS = READING + WRITING
IMPATIENT = replace(QUICK, timeout=0.4)


# 500, 429


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("status", [500, pytest.param(503, marks=pytest.mark.slow)])
def test_an_error_once(hub, api, exported, step, status):
    hub.fault(step, status=status)
    push(hub, api.token, exported)
    assert status in {entry.status for entry in hub.requests if entry.step == step}
    pushed_once(hub, exported)


@pytest.mark.parametrize("step", STEPS)
def test_an_error_for_ever(hub, api, exported, step):
    hub.fault(step, status=500, times=None)
    told = failed(hub, api.token, exported)
    assert "the Hub fails at" in told
    assert "push again later" in told
    assert hub.count(step) <= 3 * 6  # our tries, and the client's in each
    not_published(hub)
    hub.heal()
    push(hub, api.token, exported)
    pushed_once(hub, exported)


@pytest.mark.parametrize("step", STEPS)
def test_the_pause_that_is_asked_for_is_made(hub, api, exported, pauses, step):
    hub.fault(step, status=429, retry_after=2)
    push(hub, api.token, exported)
    assert [pause for pause in pauses if pause >= 2] in ([2.0], [3.0])  # the client adds a second
    pushed_once(hub, exported)


@pytest.mark.parametrize("step", STEPS)
def test_a_pause_that_is_too_long_is_not_made(hub, api, exported, pauses, step):
    hub.fault(step, status=429, retry_after=3600, times=None)
    told = failed(hub, api.token, exported)
    assert "pause of 3600 s" in told
    assert hub.count(step) == 1
    assert pauses == []
    not_published(hub)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", [{"status": 500}, {"reset": True}])
def test_no_try_begins_when_a_step_has_failed_for_too_long(hub, api, exported, pauses, step, fault):
    """Neither one of ours nor one of the client's."""
    hub.fault(step, times=None, **fault)
    told = failed(hub, api.token, exported, patience=replace(QUICK, tries=50, step_limit=0))
    assert "to go on from there" in told
    assert hub.count(step) == 1
    assert len(pauses) <= 1
    hub.heal()
    push(hub, api.token, exported)
    pushed_once(hub, exported)


def test_an_answer_that_makes_the_client_repeat_for_ever(hub, api, exported):
    message = "Cannot create repo: another conflicting operation is in progress"
    hub.fault("create", status=409, message=message, times=None)
    assert "another conflicting operation" in failed(hub, api.token, exported)
    assert hub.count("create") == 3
    hub.heal()
    hub.fault("create", status=409, message=message)
    push(hub, api.token, exported)
    pushed_once(hub, exported)


# The connection


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.slow), "during", "after"])
@pytest.mark.parametrize("what", ["reset", pytest.param("cut", marks=pytest.mark.slow)])
def test_a_connection_that_breaks(hub, api, exported, step, when, what):
    hub.fault(step, when=when, **{what: True})
    push(hub, api.token, exported)
    assert [fault.times for fault in hub.faults.waiting] == [0]  # it struck
    pushed_once(hub, exported)


@pytest.mark.parametrize("step", STEPS)
def test_a_server_that_never_answers_once(hub, api, exported, step):
    hub.fault(step, hang=True, when="after")
    push(hub, api.token, exported, patience=IMPATIENT)
    pushed_once(hub, exported)


@pytest.mark.parametrize("step", STEPS)
def test_a_server_that_never_answers(hub, api, exported, step):
    hub.fault(step, hang=True, times=None)
    told = failed(hub, api.token, exported, patience=replace(IMPATIENT, step_limit=0.5))
    assert "to go on from there" in told
    assert 1 < hub.count(step) <= 3
    not_published(hub)
    hub.heal()
    push(hub, api.token, exported)
    pushed_once(hub, exported)


DRIPPED = replace(QUICK, answer_limit=0.3, step_limit=0)


@pytest.mark.parametrize("step", ["create", "validate", "preupload", "batch", "commit"])
def test_an_answer_that_drips_once(hub, api, exported, step):
    """A byte now and then keeps every single read in time; here the answer's head came at once."""
    hub.fault(step, drip=0.1, when="during")
    push(hub, api.token, exported, patience=replace(DRIPPED, step_limit=5))
    assert hub.count(step) == (1 if step == "commit" else 2)
    # What may have been done is looked for: the repository that was asked for, the commit.
    assert hub.count("info") == (2 if step in ("preupload", "batch") else 3)
    pushed_once(hub, exported)


@pytest.mark.parametrize("step", STEPS)
def test_answers_that_drip(hub, api, exported, step):
    """Head and body of each; what was asked for is done, and stored."""
    hub.fault(step, drip=0.1, when="after", times=None)
    assert "to go on from there" in failed(hub, api.token, exported, patience=DRIPPED)
    assert hub.count(step) == 1
    hub.heal()
    push(hub, api.token, exported)
    pushed_once(hub, exported)


@pytest.fixture
def small_buffers():
    """A client that cannot hand a whole file over to the system at once."""

    def factory():
        transport = httpx2.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)])
        return httpx2.Client(transport=transport, follow_redirects=True, timeout=None)

    set_client_factory(factory)
    yield
    set_client_factory(default_client_factory)


def test_an_upload_takes_as_long_as_bytes_flow(hub, api, exported, small_buffers):
    hub.fault("upload", drip=0.03, when="before")  # two seconds for the file
    push(hub, api.token, exported, patience=replace(QUICK, timeout=1, answer_limit=1, step_limit=0))
    assert hub.count("upload") == 1
    pushed_once(hub, exported)


def test_a_dead_network(hub, api, exported):
    for passed in range(6):  # requests before it dies
        hub.fault("any", reset=True, times=None, skip=passed)
        assert "cannot be reached" in failed(hub, api.token, exported)
        hub.heal()
        if hub.repositories:
            assert len(first_commit(hub).files) in (1, 1 + len(files_of(exported)))
    push(hub, api.token, exported)
    pushed_once(hub, exported)


@pytest.mark.parametrize("status", [500, 502, 504])
def test_an_error_after_the_commit_was_stored(hub, api, exported, status):
    hub.fault("commit", status=status, when="after")
    result = push(hub, api.token, exported)
    pushed_once(hub, exported)
    assert hub.count("commit") == 1
    assert result.commit == first_commit(hub).oid
    assert set(result.uploaded) == set(files_of(exported))


def test_a_stored_commit_that_others_have_built_on(hub, api, exported, tmp_path):
    """Our commit is stored, its answer lost, and another one replaces our files: ours is not repeated."""
    hub.fault("commit", status=504, when="after")
    hub.fault("info", delay=1.0, skip=2)  # the look at the head after the failure
    other = with_bytes(tmp_path / "other", {"config.json": b"{}"})

    def build_on():
        hub.wait_for("commit")
        hub.add_model("alice/m", other)

    with running(build_on):
        result = push(hub, api.token, exported)
    repo = repo_of(hub)
    assert len(repo.commits) == 3
    assert result.commit == repo.commit("main").parent
    assert hub.count("commit") == 1


def test_creating_and_tagging_whose_answers_are_lost(hub, api, exported):
    hub.fault("create", status=500, when="after")
    hub.fault("tag", reset=True, when="after")
    hub.fault("branch", reset=True, when="after")
    result = push(hub, api.token, exported, revision="b", tag="v1")
    assert repo_of(hub).refs["refs/tags/v1"] == result.commit == repo_of(hub).commit("b").oid


@pytest.mark.parametrize("step", ["refs", "branch", "tag"])
def test_branches_and_tags_that_fail_for_ever(hub, api, exported, step):
    hub.fault(step, status=500, times=None)
    told = failed(hub, api.token, exported, revision="b", tag="v1")
    assert ("published as commit" in told) == (step == "tag")
    hub.heal()
    result = push(hub, api.token, exported, revision="b", tag="v1")
    assert repo_of(hub).refs["refs/tags/v1"] == result.commit
    assert len(repo_of(hub).commits) == 2


def test_a_pull_request_whose_answer_is_lost(hub, api, exported, tmp_path):
    hub.add_model("org/m", with_bytes(tmp_path / "old", {"a.txt": b"a"}))
    hub.fault("commit", reset=True, when="after")
    result = push(hub, api.token, exported, repo="org/m", create_pr=True)
    repo = repo_of(hub, "org/m")
    assert list(repo.discussions) == [1]
    assert result.url.endswith("/org/m/discussions/1")
    assert len(repo.commits) == 2


# Rights


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("status", "words"), [(401, "does not know this token"), (403, "may not")])
def test_a_refusal_at_each_step(hub, api, exported, step, status, words):
    hub.fault(step, status=status, times=None)
    told = failed(hub, api.token, exported)
    assert words in told
    assert hub.count(step) == 1
    not_published(hub)
    hub.heal()
    push(hub, api.token, exported)
    pushed_once(hub, exported)


# Others at the same time


class running:
    """Runs a function beside the block."""

    def __init__(self, function):
        self.thread = threading.Thread(target=function)

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.thread.join()


def test_a_commit_in_between(hub, api, exported, tmp_path):
    hub.fault("commit", delay=1.0)
    other = with_bytes(tmp_path / "other", {"paper.txt": b"text"})

    def commit():
        hub.wait_for("verify")
        hub.add_model("alice/m", other)

    with running(commit):
        push(hub, api.token, exported)
    repo = repo_of(hub)
    assert set(repo.commit("main").files) == {"paper.txt", *files_of(exported)}
    assert [entry.status for entry in hub.requests if entry.step == "commit"] == [412, 200]
    assert len(repo.commits) == 3
    assert hub.count("upload") == 1


def test_commits_in_between_for_ever(hub, api, exported):
    hub.fault("commit", status=412, times=None)
    assert "others committed each time" in failed(hub, api.token, exported)
    assert 3 < hub.count("commit") < 30
    not_published(hub)


# Go on


def test_of_several_large_files_those_that_arrived_are_not_sent_again(hub, api, exported, tmp_path):
    from vidprism_hf import VidPrismForVideoClassification

    folder = with_bytes(tmp_path / "shards", files_of(exported))
    model = VidPrismForVideoClassification.from_pretrained(exported)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="400KB", save_original_format=False)
    shards = len(list(folder.glob("*.safetensors")))
    hub.fault("upload", reset=True, when="during", skip=shards - 1, times=None)
    failed(hub, api.token, folder)
    hub.heal()
    before = len([entry for entry in hub.requests if entry.step == "upload" and entry.status == 200])
    push(hub, api.token, folder)
    pushed_once(hub, folder)
    done = [entry for entry in hub.requests if entry.step == "upload" and entry.status == 200]
    assert (before, len(done)) == (shards - 1, shards)


def test_large_files_in_parts(hub, api, exported):
    hub.part_size = 100_000
    hub.fault("upload", reset=True, when="during")
    hub.fault("complete", status=500)
    push(hub, api.token, exported)
    pushed_once(hub, exported)


# Answers that no Hub gives

PAGE = b"<html><head><title>Log in</title></head><body>" + b"Please log in. " * 100 + b"</body></html>"
ODD = {
    "page": {"body": PAGE, "kind": "text/html"},
    "page as JSON": {"body": PAGE},
    "list": {"body": b'["a", 1]'},
    "text": {"body": b'"text"'},
    "number": {"body": b"7"},
    "null": {"body": b"null"},
    "nothing": {"body": b""},
    "empty": {"body": b"{}"},
    "truncated": {"body": b'{"files": [{"path": "config.json", "uploadMo'},
    "no text": {"body": b"\xff\xfe\x00{"},
    "deep": {"body": b"[" * 200_000},
    "redirects": {"redirect": True},
    "numbers": {
        "body": b'{"id": 1, "modelId": 2, "sha": 3, "private": 4, "siblings": 5, "url": 6, "files": 7, "objects": 8, '
        b'"commitOid": 9, "commitUrl": 10, "pullRequestUrl": 11, "errors": 12, "warnings": 13, "name": 14, '
        b'"branches": 15, "tags": 16, "converts": 17, "discussions": 18, "auth": 19, "count": 20}'
    },
    "lists of other things": {
        "body": b'{"files": [{"path": 1, "uploadMode": 2, "shouldIgnore": 3}], "objects": [{"oid": 1, "size": "x", '
        b'"actions": [1]}], "branches": [{"name": 1, "ref": 2, "targetCommit": 3}], "tags": [null], "converts": [], '
        b'"sha": ["a"], "private": "false", "commitOid": {}, "commitUrl": [], "url": {}, "errors": {"a": 1}}'
    },
    "a list of other things": {"body": b'[{"type": "file", "path": 1, "size": "x", "oid": 2, "lfs": 3}, null]'},
}
ASKED = [*("info", "tree"), *WRITING, *("refs", "branch", "tag")]


def told(hub, token, folder, **settings) -> str:
    """The line in which a push says why it failed, if it did."""
    try:
        push(hub, token, folder, **settings)
    except PushError as error:
        return str(error)
    return ""


def odd_cases():
    """Each answer at each step; quickly each answer at one of them."""
    for row, odd in enumerate(ODD):
        for column, step in enumerate(ASKED):
            for when in ("before", "after"):
                quick = row % len(ASKED) == column and when == "after"
                yield pytest.param(odd, step, when, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("odd", "step", "when"), list(odd_cases()))
def test_an_odd_answer_ends_in_one_line_or_a_whole_push(hub, api, exported, odd, step, when):
    """Whatever is answered at a step, what is on the branch is nothing or all, and pushing again brings it there."""
    settings = {"revision": "b", "tag": "v1"} if step in ("refs", "branch", "tag") else {}
    branch = settings.get("revision", "main")
    hub.fault(step, times=None, when=when, **ODD[odd])
    before = files_of(exported)
    line = told(hub, api.token, exported, **settings)
    assert len(line.splitlines()) <= 1
    assert len(line) < 1200
    assert api.token not in line
    assert hub.count(step) <= 3 * 6 * 21  # our tries, the client's in each, and the redirects of each
    assert files_of(exported) == before
    there = hub.repositories.get(("model", "alice/m"))
    found, whole = there and there.commit(branch), {".gitattributes", *before}
    assert found is None or set(found.files) in ({".gitattributes"}, whole)
    hub.heal()
    push(hub, api.token, exported, **settings)
    assert set(repo_of(hub).commit(branch).files) == whole
    assert len(repo_of(hub).commits) == 2


@pytest.mark.parametrize("odd", [pytest.param(odd, marks=[pytest.mark.slow] * (odd != "numbers")) for odd in ODD])
def test_an_odd_answer_to_a_pull_request(hub, api, exported, tmp_path, odd):
    hub.add_model("org/m", with_bytes(tmp_path / "old", {"a.txt": b"a"}))
    for step in ("discussion", "commit", "whoami"):
        hub.fault(step, times=None, when="before" if "redirect" in ODD[odd] else "after", **ODD[odd])
        assert len(told(hub, api.token, exported, repo="org/m", create_pr=True).splitlines()) <= 1
        hub.heal()
    push(hub, api.token, exported, repo="org/m", create_pr=True)
    assert set(repo_of(hub, "org/m").commit("main").files) == {"a.txt"}
    assert list(repo_of(hub, "org/m").discussions) == [1]


@pytest.mark.parametrize("step", ["resolve", "info", "tree"])
@pytest.mark.parametrize("odd", ["page", "empty", "redirects"])
def test_a_readme_is_not_taken_from_an_odd_answer(hub, api, exported, tmp_path, step, odd):
    mine = files_of(exported)["README.md"] + b"\nMine.\n"
    hub.add_model("alice/m", with_bytes(tmp_path / "old", {"README.md": mine}))
    hub.fault(step, times=None, **ODD[odd])
    assert "as no Hub does" in failed(hub, api.token, exported)
    assert set(first_commit(hub).files) == {"README.md"}
    hub.heal()
    push(hub, api.token, exported)
    assert first_commit(hub).files["README.md"].read().endswith(b"\nMine.\n")


def test_an_answer_without_an_end_is_not_read_to_it(hub, api, exported, monkeypatch):
    monkeypatch.setattr("vidprism_hf.hub.retries.MOST_BYTES", 1 << 20)
    hub.fault("info", body=b" " * (2 << 20), times=None)
    assert "the answer is larger than 1 MiB" in failed(hub, api.token, exported)


def test_the_command_says_it_in_one_line(hub, api, exported, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("vidprism_hf.hub.push.Patience", lambda: QUICK)
    monkeypatch.setattr("vidprism_hf.hub.push.get_token", lambda: api.token)
    hub.fault("commit", times=None, **ODD["page"])
    assert main(["push", str(exported), "--repo", "alice/m"]) == 1
    assert "answers the commit as no Hub does" in complaint(capsys)
