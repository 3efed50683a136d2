"""The faults of the test Hub: that they strike when and as often as asked, and that its log tells what came."""

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx2
import pytest
from hub_server import Hub
from hub_server.client import add, ask, contents, published, push, refused
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

pytest_plugins = ["hub_server.fixtures"]

STEPS = ["create", "validate", "preupload", "batch", "upload", "verify", "commit"]


def push_here(api, export):
    api.create_repo("alice/m", exist_ok=True)
    return api.upload_folder(repo_id="alice/m", folder_path=export)


def root(error: BaseException) -> BaseException:
    return root(error.__cause__) if isinstance(error, RuntimeError) and error.__cause__ else error


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("status", [401, 403])
def test_a_status_at_each_step(hub, api, export, tmp_path, step, status):
    hub.fault(step, status=status, message="not today", code="GatedRepo")
    with pytest.raises((HfHubHTTPError, RuntimeError)) as caught:
        push_here(api, export)
    error = root(caught.value)
    assert isinstance(error, GatedRepoError)
    assert "not today" in str(error)
    assert hub.count(step) >= 1
    assert hub.count("commit") == (1 if step == "commit" else 0)
    push_here(api, export)  # the fault was for one request
    assert published(api, "alice/m", tmp_path / "c") == contents(export)


def test_the_client_repeats_what_was_too_much(hub, api, export, tmp_path):
    hub.fault("preupload", status=429, retry_after=0)
    hub.fault("verify", status=503, times=1, skip=1)
    push_here(api, export)
    assert (hub.count("preupload"), hub.count("verify")) == (2, 3)
    assert [entry.status for entry in hub.requests if entry.step == "preupload"] == [429, 200]


@pytest.mark.parametrize(("when", "stored"), [("before", False), ("during", False), ("after", True)])
@pytest.mark.parametrize(("what", "timeout"), [("reset", 30), ("cut", 30), ("hang", 0.5)])
def test_a_commit_whose_answer_never_comes(hub, api, when, stored, what, timeout):
    api.create_repo("alice/m")
    hub.fault("commit", when=when, **{what: True})
    header = {"key": "header", "value": {"summary": "a"}}
    line = {"key": "file", "value": {"path": "a.txt", "content": "YQ==", "encoding": "base64"}}
    body = json.dumps(header).encode() + b"\n" + json.dumps(line).encode()
    url, form = f"{hub.url}/api/models/alice/m/commit/main", {"Content-Type": "application/x-ndjson"}
    with pytest.raises(TimeoutError if what == "hang" else ConnectionError):
        ask(url, "POST", body, api.token, timeout, **form)
    hub.wait_for("commit")
    assert ("a.txt" in api.list_repo_files("alice/m")) == stored
    (entry,) = (entry for entry in hub.requests if entry.step == "commit")
    assert entry.status == 0


def test_a_status_after_all_was_stored(hub, api):
    api.create_repo("alice/m")
    hub.fault("commit", status=504, when="after")
    assert refused(lambda: api.create_commit("alice/m", add("a.txt"), commit_message="a"))[0] == 504
    assert "a.txt" in api.list_repo_files("alice/m")


def test_a_reset_in_the_middle_of_an_upload(hub, api, export, tmp_path):
    hub.fault("upload", reset=True, when="during")
    push_here(api, export)
    assert hub.count("upload") == 3
    assert published(api, "alice/m", tmp_path / "c") == contents(export)


def test_a_download_cut_short_is_repeated(hub, api, export, tmp_path):
    hub.add_model("org/m", export)
    hub.fault("content", cut=True, when="during")
    assert published(api, "org/m", tmp_path / "c") == contents(export)
    assert hub.count("content") == 3


def test_a_download_reset_is_not_repeated_by_the_client(hub, api, export, tmp_path):
    hub.add_model("org/m", export)
    hub.fault("content", reset=True, when="during")
    with pytest.raises(httpx2.ReadError):
        api.hf_hub_download("org/m", "model.safetensors", cache_dir=tmp_path / "c")
    assert published(api, "org/m", tmp_path / "c") == contents(export)


def test_faults_skip_repeat_and_queue(hub, api):
    hub.fault("whoami", status=500, skip=1, times=2)
    hub.fault("whoami", status=418)
    asked = [ask(f"{hub.url}/api/whoami-v2", token=api.token)[0] for _ in range(5)]
    assert asked == [200, 500, 500, 418, 200] == [entry.status for entry in hub.requests]


def test_a_slow_answer_comes(hub, api):
    hub.fault("whoami", delay=0.3)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(api.whoami)
        while hub.faults.waiting[0].times:  # until it has struck
            time.sleep(0.001)
        ask(f"{hub.url}/api/models/org/m")
    assert slow.result()["name"] == "alice"
    assert [entry.step for entry in hub.requests] == ["info", "whoami"]  # in the order of the answers


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_what_drips_comes_whole(hub, api, when):
    hub.fault("create", drip=0.001, when=when)
    assert api.create_repo("alice/m").repo_id == "alice/m"
    assert ("model", "alice/m") in hub.repositories
    assert api.whoami()["name"] == "alice"  # on the same connection
    assert [entry.status for entry in hub.requests] == [200, 200]


def test_a_push_that_was_killed_can_be_repeated(hub, api, export, tmp_path):
    hub.fault("upload", hang=True, when="during", times=None)
    process = push(hub, api.token, export, tmp_path / "home")
    hub.wait_for("upload")
    process.kill()
    assert process.wait() == -9
    process.stdout.close()
    process.stderr.close()
    assert hub.count("commit") == 0
    hub.heal()
    push_here(api, export)
    assert published(api, "alice/m", tmp_path / "c") == contents(export)


def test_any_step_may_fail_for_ever(hub, api):
    hub.fault("any", reset=True, times=None)
    for _ in range(2):
        with pytest.raises(OSError):  # noqa: PT011  reset, as on a dead network
            ask(f"{hub.url}/api/whoami-v2")
    hub.heal()
    assert api.whoami()["name"] == "alice"


def test_nothing_answers_after_the_end(export):
    with Hub() as hub:
        hub.add_model("org/m", export)
        connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=5)
        connection.request("GET", "/api/models/org/m")
        assert connection.getresponse().read()
    connection.sock.settimeout(5)
    assert connection.sock.recv(1) == b""  # closed, although it was to be kept alive
    with pytest.raises(OSError, match="refused"):
        ask(f"{hub.url}/api/models/org/m")


def test_faults_that_make_no_sense(hub):
    for wrong in (
        {"step": "comit", "status": 500},
        {"step": "commit"},
        {"step": "commit", "status": 500, "reset": True},
        {"step": "commit", "status": 500, "when": "during"},
        {"step": "commit", "reset": True, "when": "later"},
        {"step": "commit", "reset": True, "drip": 0.1},
    ):
        with pytest.raises(ValueError, match=r"step|fault|when"):
            hub.fault(**wrong)


def test_the_log_holds_no_token(hub, api, export):
    push_here(api, export)
    assert {entry.user for entry in hub.requests} == {"alice", None}  # None: the store, which asks for no token
    assert api.token not in repr(hub.requests)
    assert api.token not in repr(list(hub.tokens.values()))
    assert hub.count()["unknown"] == 0
