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
from small import files_of

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
