"""The fault matrix of a push: it ends published, once and whole, or with one clear error and the export whole."""

import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from push_helpers import QUICK, brisk, first_commit, push, pushed_once, repo_of, with_bytes
from small import files_of, tiny_export

from vidprism_hf.hub.refusals import PushError

pytest_plugins = ["hub_server.fixtures"]
pytestmark = pytest.mark.usefixtures("brisk")

__all__ = ["brisk"]

READING = [pytest.param(step, marks=pytest.mark.slow) for step in ("info", "tree")]
WRITING = ["create", "validate", "preupload", "batch", "upload", "verify", "commit"]
STEPS = READING + WRITING
IMPATIENT = replace(QUICK, timeout=0.4)


def failed(hub, token, folder, patience=QUICK, **settings) -> str:
    """The one line in which a push says why it failed; nothing is published by it and the export is whole."""
    before = files_of(folder)
    with pytest.raises(PushError) as caught:
        push(hub, token, folder, patience=patience, **settings)
    assert len(str(caught.value).splitlines()) == 1
    assert token not in str(caught.value)
    assert files_of(folder) == before
    return str(caught.value)


def not_published(hub, name="alice/m"):
    if ("model", name) in hub.repositories:
        assert list(first_commit(hub, name).files) == [".gitattributes"]


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
def test_too_many_requests(hub, api, exported, step):
    hub.fault(step, status=429, retry_after=0)
    push(hub, api.token, exported)
    pushed_once(hub, exported)


@pytest.mark.parametrize("step", ["create", "commit"])
def test_the_pause_that_is_asked_for_is_made(hub, api, exported, step):
    hub.fault(step, status=429, retry_after=1)
    started = time.monotonic()
    push(hub, api.token, exported)
    assert time.monotonic() - started > 1
    pushed_once(hub, exported)


def test_the_client_makes_the_pause_that_is_asked_for(hub, api, exported, brisk):
    hub.fault("preupload", status=429, retry_after=3)
    push(hub, api.token, exported)
    assert brisk == [4.0]  # the client adds a second


@pytest.mark.parametrize("step", STEPS)
def test_a_pause_that_is_too_long_is_not_made(hub, api, exported, brisk, step):
    hub.fault(step, status=429, retry_after=3600, times=None)
    told = failed(hub, api.token, exported)
    assert "pause of 3600 s" in told
    assert hub.count(step) == 1
    assert brisk == []
    not_published(hub)


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


@pytest.mark.parametrize("step", ["info", "create", "commit"])
def test_a_server_that_never_answers(hub, api, exported, step):
    hub.fault(step, hang=True, times=None)
    started = time.monotonic()
    assert "cannot be reached" in failed(hub, api.token, exported, patience=IMPATIENT)
    assert time.monotonic() - started < 10
    not_published(hub)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["preupload", "batch", "upload", "verify"])
def test_a_server_that_never_answers_what_the_client_repeats(hub, api, exported, step):
    hub.fault(step, hang=True, times=None)
    assert "cannot be reached" in failed(hub, api.token, exported, patience=replace(IMPATIENT, tries=2))
    not_published(hub)


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


PUSH = """
import sys
from vidprism_hf.errors import UserError
from vidprism_hf.hub.push import main
try:
    main(sys.argv[1:])
except UserError as error:
    sys.exit(str(error))
"""


def start(hub, token, folder, home, xet=False, **more):
    environment = hub.environment(home, token, xet) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | more
    command = [sys.executable, "-c", PUSH, str(folder), "--repo", "alice/m"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def last_line(process) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    return out.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False])
def test_two_pushes_at_the_same_time(hub, api, exported, tmp_path, same):
    other = exported if same else tiny_export(tmp_path / "other", seed=1)
    hub.fault("create", delay=3.0)  # long enough for both to have looked
    hub.fault("commit", delay=2.0)
    processes = [start(hub, api.token, folder, tmp_path / "home") for folder in (exported, other)]
    commits = [last_line(process).split()[1] for process in processes]
    repo = repo_of(hub)
    assert len(repo.commits) == (2 if same else 3)
    assert len(repo.history(repo.commit("main"))) == len(repo.commits)
    for commit, folder in zip(commits, (exported, other), strict=True):
        files = {path: content.read() for path, content in repo.commit(commit).files.items()}
        assert files.items() >= files_of(folder).items()


# Kill and go on


@pytest.mark.slow
@pytest.mark.parametrize("step", ["upload", "verify", "commit"])
def test_a_push_that_was_killed_goes_on(hub, api, exported, tmp_path, step):
    hub.fault(step, hang=True, when="during" if step == "upload" else "after")
    before = files_of(exported)
    process = start(hub, api.token, exported, tmp_path / "home")
    hub.wait_for(step)
    process.kill()
    process.communicate()
    assert process.returncode == -9
    assert files_of(exported) == before
    hub.heal()
    uploads = hub.count("upload")
    last_line(start(hub, api.token, exported, tmp_path / "home"))
    pushed_once(hub, exported)
    assert hub.count("upload") - uploads == (1 if step == "upload" else 0)  # what has arrived is not sent again


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


# Xet


@pytest.fixture
def xet():
    """hf-xet, which needs a process for each push: it holds the lock of its folder for as long as it lives."""
    pytest.importorskip("hf_xet")


@pytest.mark.slow
def test_the_xet_path(hub, api, exported, tmp_path, xet):
    last_line(start(hub, api.token, exported, tmp_path / "home", xet=True))
    assert hub.count("xet-token") > 0
    assert hub.count("upload") == 0
    pushed_once(hub, exported)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "fault"),
    [
        ("xet-token", {"status": 500}),
        ("xet-token", {"reset": True}),
        ("xet-token", {"status": 429, "retry_after": 0}),
        ("commit", {"reset": True, "when": "after"}),
        ("commit", {"status": 500}),
    ],
)
def test_a_fault_on_the_xet_path(hub, api, exported, tmp_path, xet, step, fault):
    hub.fault(step, **fault)
    last_line(start(hub, api.token, exported, tmp_path / "home", xet=True))
    pushed_once(hub, exported)


@pytest.mark.slow
@pytest.mark.parametrize(("status", "words"), [(401, "does not know this token"), (403, "may not")])
def test_a_refusal_on_the_xet_path(hub, api, exported, tmp_path, xet, status, words):
    hub.fault("xet-token", status=status, times=None)
    process = start(hub, api.token, exported, tmp_path / "home", xet=True)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert words in err.splitlines()[-1]
    not_published(hub)


@pytest.mark.slow
def test_a_server_that_never_answers_on_the_xet_path(hub, api, exported, tmp_path, xet):
    hub.fault("xet-token", hang=True, times=None)
    # hf-xet has time-outs of its own, of minutes.
    brief = {"READ_TIMEOUT": "500ms", "RETRY_MAX_ATTEMPTS": "1", "RETRY_BASE_DELAY": "10ms"}
    more = {f"HF_XET_CLIENT_{name}": value for name, value in brief.items()}
    process = start(hub, api.token, exported, tmp_path / "home", xet=True, **more)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "cannot be reached at the upload" in err.splitlines()[-1]
    not_published(hub)
