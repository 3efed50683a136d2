"""Pushes that are killed, that run beside each other or through hf-xet, and exports on a full disk."""

import resource
import time
from contextlib import contextmanager

import pytest
from push_helpers import as_published, first_commit, not_published, push, pushed_once, repo_of
from push_process import PushProcess
from small import files_of, tiny_export

from vidprism_hf.hub.export import ExportError

pytest_plugins = ["hub_server.fixtures"]


@pytest.fixture
def start(hub, api, tmp_path):
    """Starts a push in a process of its own."""

    def start(folder, **settings):
        return PushProcess(hub, api.token, folder, tmp_path / "home", **settings)

    return start


# Kill and go on


@pytest.mark.slow
@pytest.mark.parametrize("step", ["upload", "verify", "commit"])
def test_a_push_that_was_killed_goes_on(hub, exported, start, step):
    hub.fault(step, hang=True, when="during" if step == "upload" else "after")
    before = files_of(exported)
    process = start(exported)
    hub.wait_for(step)
    process.kill()
    assert files_of(exported) == before
    hub.heal()
    uploads = hub.count("upload")
    start(exported).lines()
    pushed_once(hub, exported)
    assert hub.count("upload") - uploads == (1 if step == "upload" else 0)  # what has arrived is not sent again


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False])
def test_two_pushes_at_the_same_time(hub, exported, tmp_path, start, same):
    other = exported if same else tiny_export(tmp_path / "other", seed=1)
    hub.fault("create", delay=1.5)  # long enough for both to have looked
    hub.fault("commit", delay=1.0)
    processes = [start(folder) for folder in (exported, other)]
    commits = [process.lines()[-1].split()[1] for process in processes]
    repo = repo_of(hub)
    assert len(repo.commits) == (2 if same else 3)
    assert len(repo.history(repo.commit("main"))) == len(repo.commits)
    for commit, folder in zip(commits, (exported, other), strict=True):
        files = {path: content.read() for path, content in repo.commit(commit).files.items()}
        assert files.items() >= as_published(folder).items()


# Xet


@pytest.fixture
def xet():
    """hf-xet, which needs a process for each push: it holds the lock of its folder for as long as it lives."""
    pytest.importorskip("hf_xet")


@pytest.mark.slow
def test_the_xet_path(hub, exported, start, xet):
    start(exported, xet=True).lines()
    assert hub.count("xet-token") > 0
    assert hub.count("upload") == 0
    pushed_once(hub, exported)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sign",
    ["xet-*/xet/xorbs", "xet-*/xet/xorbs/xorbs/*", "xet-*/xet/xorbs/shards/*.mdb"],
    ids=["begun", "in the data", "in their list"],
)
def test_a_push_that_was_killed_on_the_xet_path_goes_on(hub, exported, start, xet, sign):
    hub.fault("validate", hang=True, times=None)  # what follows the upload
    before = files_of(exported)
    process = start(exported, xet=True)
    until = time.monotonic() + 60
    while not any(hub.folder.glob(sign)):
        assert time.monotonic() < until, "nothing is uploaded"
        time.sleep(0.0005)
    process.kill()
    assert files_of(exported) == before
    assert hub.count("commit") == 0
    hub.heal()
    start(exported, xet=True).lines()
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
def test_a_fault_on_the_xet_path(hub, exported, start, xet, step, fault):
    hub.fault(step, **fault)
    start(exported, xet=True).lines()
    pushed_once(hub, exported)


@pytest.mark.slow
@pytest.mark.parametrize(("status", "words"), [(401, "does not know this token"), (403, "may not")])
def test_a_refusal_on_the_xet_path(hub, exported, start, xet, status, words):
    hub.fault("xet-token", status=status, times=None)
    assert words in start(exported, xet=True).lines(status=1)[-1]
    not_published(hub)


@pytest.mark.slow
def test_a_server_that_never_answers_on_the_xet_path(hub, exported, start, xet):
    hub.fault("xet-token", hang=True, times=None)
    # hf-xet has time-outs of its own, of minutes.
    brief = {"READ_TIMEOUT": "500ms", "RETRY_MAX_ATTEMPTS": "1", "RETRY_BASE_DELAY": "10ms"}
    more = {f"HF_XET_CLIENT_{name}": value for name, value in brief.items()}
    assert "cannot be reached at the upload" in start(exported, xet=True, **more).lines(status=1)[-1]
    not_published(hub)


# A full disk


@contextmanager
def files_of_at_most(size: int):
    """Writing past this size fails, as on a full disk: with another cause (EFBIG), at the same calls."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 500_000], ids=["nothing fits", "half of the weights fit"])
def test_an_export_to_a_full_disk_leaves_the_earlier_one_whole(hub, api, tmp_path, size):
    folder = tiny_export(tmp_path / "model")
    before = files_of(tmp_path)
    with files_of_at_most(size), pytest.raises(ExportError) as caught:
        tiny_export(folder, labels=("a", "b", "c"))
    assert str(caught.value).startswith(f"{folder}: cannot be written (")
    assert len(str(caught.value).splitlines()) == 1
    assert files_of(tmp_path) == before
    with files_of_at_most(size), pytest.raises(ExportError):
        tiny_export(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    push(hub, api.token, folder)
    pushed_once(hub, folder)
    assert first_commit(hub).files["model.safetensors"].size == (folder / "model.safetensors").stat().st_size
