"""Pushing an export: what is sent, what is not, and what a person is told."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from hub_server.client import published
from huggingface_hub import HfApi
from push_helpers import QUICK, as_published, brisk, first_commit, push, pushed_once, repo_of, with_bytes
from small import complaint, files_of, tiny_export

import vidprism_cli
from vidprism_hf.cli.push import main
from vidprism_hf.errors import UserError
from vidprism_hf.hub.errors import PushError
from vidprism_hf.hub.push import push_export

pytest_plugins = ["hub_server.fixtures"]

__all__ = ["brisk"]


@pytest.fixture
def folder(exported, tmp_path):
    """An export of its own, which a test may change."""
    return shutil.copytree(exported, tmp_path / "export")


@pytest.fixture
def command(hub, api, monkeypatch):
    """`vidprism push` in this process, as alice."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", api.token)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    return main


# What is sent


def test_a_first_push_publishes_the_folder_in_one_commit(hub, api, exported, tmp_path):
    result = push(hub, api.token, exported)
    pushed_once(hub, exported)
    assert published(api, "alice/m", tmp_path / "c") == as_published(exported)
    assert result.url == f"{hub.url}/alice/m"
    assert result.commit == repo_of(hub).commit("main").oid
    assert result.uploaded == {name: len(content) for name, content in as_published(exported).items()}
    assert result.unchanged == []


def test_the_published_card_names_the_model_as_the_hub_does(hub, api, exported):
    assert 'model_id = "."' in (exported / "README.md").read_text()
    result = push(hub, api.token, exported)
    card = repo_of(hub).commit("main").files["README.md"].read().decode()
    assert card == result.card
    assert 'model_id = "alice/m"' in card
    assert "vidprism predict alice/m clip.mp4" in card
    assert 'model_id = "."' not in card


def test_what_the_hub_has_is_not_sent_again(hub, api, exported):
    first = push(hub, api.token, exported)
    asked = hub.count()
    again = push(hub, api.token, exported)
    assert again.commit == first.commit
    assert again.uploaded == {}
    assert again.unchanged == sorted(files_of(exported))
    assert hub.count("upload") == asked["upload"]
    assert hub.count("commit") == asked["commit"]


def test_only_what_differs_is_sent(hub, api, folder):
    push(hub, api.token, folder)
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    result = push(hub, api.token, folder)
    assert list(result.uploaded) == ["config.json"]
    assert hub.count("upload") == 1
    assert len(repo_of(hub).commits) == 3
    pushed_once(hub, folder, commits=2)


def test_only_files_of_the_export_are_sent(hub, api, folder):
    (folder / ".env").write_text("secret")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    result = push(hub, api.token, folder)
    assert set(repo_of(hub).commit("main").files) == {*result.uploaded, ".gitattributes"}
    assert not {".env", ".cache/config.json", "notes.txt"} & set(result.uploaded)
    assert any("notes.txt" in note for note in result.notes)


def test_other_files_of_the_repository_stay(hub, api, folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "paper.pdf").write_bytes(b"%PDF")
    hub.add_model("alice/m", tmp_path / "other")
    push(hub, api.token, folder)
    assert repo_of(hub).commit("main").files["paper.pdf"].read() == b"%PDF"


def test_shards_are_published(hub, api, folder, tmp_path):
    from vidprism_hf import VidPrismForVideoClassification

    model = VidPrismForVideoClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="400KB", save_original_format=False)
    assert len(list(folder.glob("*.safetensors"))) > 1
    push(hub, api.token, folder)
    assert published(api, "alice/m", tmp_path / "c") == as_published(folder)


# Where to


def test_a_new_private_repository(hub, api, exported):
    push(hub, api.token, exported, private=True)
    assert repo_of(hub).private


def test_a_public_repository_is_not_taken_for_a_private_one(hub, api, exported, tmp_path):
    hub.add_model("alice/m", with_bytes(tmp_path / "old", {"a.txt": b"a"}))
    with pytest.raises(PushError, match="public"):
        push(hub, api.token, exported, private=True)
    assert len(repo_of(hub).commits) == 1


def test_a_repository_that_comes_up_meanwhile_is_not_taken_for_a_private_one(hub, api, exported, tmp_path):
    hub.add_model("alice/m", with_bytes(tmp_path / "old", {"a.txt": b"a"}))
    hub.fault("info", status=404, code="RepoNotFound")  # the look at it came too early
    with pytest.raises(PushError, match="public"):
        push(hub, api.token, exported, private=True)
    assert hub.count("create") == 1
    assert len(repo_of(hub).commits) == 1


def test_a_private_repository_that_comes_up_meanwhile_is_taken(hub, api, exported, tmp_path):
    hub.add_model("alice/m", with_bytes(tmp_path / "old", {"README.md": b""}), private=True)
    hub.fault("info", status=404, code="RepoNotFound")
    push(hub, api.token, exported, private=True)
    assert hub.count("create") == 1
    assert len(repo_of(hub).commits) == 2


def test_a_branch_is_made(hub, api, exported):
    result = push(hub, api.token, exported, revision="exp/1")
    repo = repo_of(hub)
    assert list(repo.commit("main").files) == [".gitattributes"]
    assert set(repo.commit("exp/1").files) == {*files_of(exported), ".gitattributes"}
    assert result.url == f"{hub.url}/alice/m/tree/exp/1"
    push(hub, api.token, exported, revision="exp/1")
    assert len(repo.commits) == 2


def test_a_tag_and_a_commit_are_no_branches(hub, api, exported):
    commit = push(hub, api.token, exported, tag="v1").commit
    for name in ("v1", commit):
        with pytest.raises(PushError, match="name a branch"):
            push(hub, api.token, exported, revision=name)


def test_a_tag(hub, api, folder):
    result = push(hub, api.token, folder, tag="v1")
    assert repo_of(hub).refs["refs/tags/v1"] == result.commit
    assert push(hub, api.token, folder, tag="v1").commit == result.commit
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    with pytest.raises(PushError, match="v1: already exists at another commit"):
        push(hub, api.token, folder, tag="v1")
    assert len(repo_of(hub).commits) == 2  # refused before anything was sent


def test_a_pull_request(hub, api, exported, tmp_path):
    hub.add_model("org/m", with_bytes(tmp_path / "old", {"a.txt": b"a"}))
    result = push(hub, api.token, exported, repo="org/m", create_pr=True)
    repo = repo_of(hub, "org/m")
    assert list(repo.commit("main").files) == ["a.txt"]
    assert set(repo.commit("refs/pr/1").files) == {"a.txt", *files_of(exported)}
    assert result.url == f"{hub.url}/org/m/discussions/1"
    assert result.commit == repo.commit("refs/pr/1").oid
    again = push(hub, api.token, exported, repo="org/m", create_pr=True)
    assert again.commit == result.commit
    assert list(repo.discussions) == [1]


# What is refused


def refusal(hub, token, folder, **settings) -> str:
    """The error of a push; the folder is whole afterwards."""
    before = files_of(folder)
    with pytest.raises(PushError) as caught:
        push(hub, token, folder, **settings)
    assert isinstance(caught.value, UserError)
    assert len(str(caught.value).splitlines()) == 1
    assert token is None or token not in str(caught.value)
    assert files_of(folder) == before
    return str(caught.value)


def test_no_token(hub, exported, monkeypatch):
    monkeypatch.setattr("vidprism_hf.hub.push.get_token", lambda: None)
    assert "no token" in refusal(hub, None, exported)
    assert hub.count() == {}


def test_a_wrong_token(hub, exported):
    assert "does not know this token" in refusal(hub, "hf_wrong", exported)


def test_a_read_only_token(hub, exported):
    assert "token of bob is read-only" in refusal(hub, hub.user("bob", role="read"), exported, repo="bob/m")


def test_a_namespace_of_others(hub, api, exported):
    assert "may not create it" in refusal(hub, api.token, exported, repo="org/m")


def test_a_repository_of_others(hub, api, exported, tmp_path):
    hub.add_model("org/m", with_bytes(tmp_path / "old", {"a.txt": b"a"}))
    told = refusal(hub, api.token, exported, repo="org/m")
    assert "token of alice may not" in told
    assert "--create-pr" in told


def test_a_name_taken_by_what_cannot_be_seen(hub, api, exported):
    hub.fault("create", status=409, message="You already created this model repo")
    assert "taken" in refusal(hub, api.token, exported)


def test_a_pull_request_to_nothing(hub, api, exported):
    assert "no such repository" in refusal(hub, api.token, exported, create_pr=True)
    assert ("model", "alice/m") not in hub.repositories


def test_a_gated_repository(hub, api, exported, tmp_path):
    hub.add_model("org/m", with_bytes(tmp_path / "old", {"README.md": b"# Other"}), gated=True)
    assert "gated" in refusal(hub, api.token, exported, repo="org/m")


@pytest.mark.parametrize(
    ("status", "message"),
    [(413, "Payload Too Large"), (507, "full"), (403, "Private repository storage limit reached")],
)
@pytest.mark.parametrize("step", ["preupload", "upload", "commit"])
def test_a_quota(hub, api, exported, step, status, message):
    hub.fault(step, status=status, message=message)
    assert "no room" in refusal(hub, api.token, exported)
    push(hub, api.token, exported)
    pushed_once(hub, exported)


def test_offline(hub, api, exported, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(hub, api.token, exported)


def test_nobody_listens(api, exported):
    with pytest.raises(PushError, match="cannot be reached") as caught:
        push_export(exported, "alice/m", token=api.token, endpoint="http://127.0.0.1:9", patience=QUICK)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["m", "a/b/c", "alice/", "alice/m m"])
def test_names_that_are_none(hub, api, exported, name):
    assert "--repo" in refusal(hub, api.token, exported, repo=name)


def test_a_folder_that_is_not_there(hub, api, tmp_path):
    with pytest.raises(PushError, match="dmo/export: no such folder"):
        push(hub, api.token, tmp_path / "dmo" / "export")


def test_the_folder_of_a_run(hub, api, folder):
    told = refusal(hub, api.token, folder.parent)
    assert told.endswith(f"did you mean {folder}?")
    assert hub.count() == {}


@pytest.mark.parametrize("published", [True, False])
def test_a_commit_that_cannot_be_tagged(hub, api, exported, published):
    if not published:
        push(hub, api.token, exported)
    hub.fault("tag", status=403, times=None)
    told = refusal(hub, api.token, exported, tag="v1")
    commit = repo_of(hub).commit("main").oid
    assert f"{'published' if published else 'there already'} as commit {commit}, but not tagged v1" in told


def test_a_card_that_the_hub_refuses(hub, api, folder):
    (folder / "README.md").write_text("---\nlicense: nonsense\n---\n")
    told = refusal(hub, api.token, folder)
    assert "README.md" in told
    assert "license" in told


def test_a_file_that_the_repository_ignores(hub, api, exported, monkeypatch):
    """The client leaves out, and says nothing of, what the repository's .gitignore names."""
    from hub_server import uploads

    def ignoring(call, *names):
        answer = uploads.preupload(call, *names)
        for file in answer.body["files"]:
            file["shouldIgnore"] = file["path"] == "config.json"
        return answer

    routes = hub.servers[0].RequestHandlerClass.routes
    changed = tuple(
        uploads.Route(route.method, route.pattern, route.step, ignoring) if route.step == "preupload" else route
        for route in routes
    )
    monkeypatch.setattr(hub.servers[0].RequestHandlerClass, "routes", changed)
    assert "lacks config.json" in refusal(hub, api.token, exported)


# The command line


def test_the_last_line_is_the_url_and_the_commit(hub, command, exported, capsys):
    assert command([str(exported), "--repo", "alice/m", "--private", "--tag", "v1", "--message", "Mine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    commit = repo_of(hub).commit("main")
    assert lines[-1] == f"{hub.url}/alice/m {commit.oid}"
    assert "Tagged: v1" in lines
    assert commit.title == "Mine"
    assert repo_of(hub).private
    for name, content in as_published(exported).items():
        assert any(line.startswith("new ") and f"{len(content):,}" in line and line.endswith(name) for line in lines)


def test_what_is_not_published_is_told(hub, command, exported, tmp_path, capsys):
    hub.add_model("alice/m", with_bytes(tmp_path / "old", {"README.md": b"# Mine\n"}))
    command([str(exported), "--repo", "alice/m"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("kept ") and line.endswith(" README.md")]
    assert [line for line in lines if line.startswith("note: README.md: ") and "not published" in line]


def test_a_dry_run_lists_and_changes_nothing(hub, api, command, folder, capsys):
    command([str(folder), "--repo", "alice/m", "--dry-run"])
    told = capsys.readouterr().out
    assert "new " in told
    assert as_published(folder)["README.md"].decode() in told
    assert not hub.repositories
    push(hub, api.token, folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    commits, posts = len(repo_of(hub).commits), [entry for entry in hub.requests if entry.method == "POST"]
    command([str(folder), "--repo", "alice/m", "--dry-run"])
    states = {line.split()[-1]: line.split()[0] for line in capsys.readouterr().out.splitlines() if " bytes  " in line}
    assert states["config.json"] == "changed"
    assert states["model.safetensors"] == states["README.md"] == "unchanged"
    assert len(repo_of(hub).commits) == commits
    assert [entry for entry in hub.requests if entry.method == "POST"] == posts


def test_a_dry_run_on_a_new_branch_compares_with_main(hub, api, exported):
    push(hub, api.token, exported)
    result = push(hub, api.token, exported, revision="new", dry_run=True)
    assert result.uploaded == {}
    assert "refs/heads/new" not in repo_of(hub).refs


@pytest.mark.slow
def test_the_module_runs_as_a_program(hub, exported, tmp_path):
    environment = hub.environment(tmp_path / "home", hub.user("alice"))
    command = [sys.executable, "-m", "vidprism_hf", "push", str(exported), "--repo", "alice/m"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.splitlines()[-1] == f"{hub.url}/alice/m {first_commit(hub).oid}"
    finished = subprocess.run([*command[:-1], "org/m"], env=environment, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("vidprism push: org/m: ")
    assert "Traceback" not in finished.stderr


# The client of the process


def test_the_clients_settings_come_back(hub, api, exported):
    from huggingface_hub import get_session

    push(hub, api.token, exported)
    assert get_session().timeout.read is None
    assert not get_session().event_hooks.get("response")
    assert HfApi(endpoint=hub.url).repo_exists("alice/m")


@pytest.mark.parametrize("secret", ["hf_0123456789abcdef", "api_org_secret"])
def test_nothing_says_the_token(hub, api, exported, caplog, capsys, brisk, secret):
    """Neither one of today's form nor of another; the server sends it back."""
    alice = hub.tokens[hub.user("alice")]
    hub.tokens[secret] = replace(alice, secret=secret)
    hub.fault("create", status=500, message=f"you said {secret}", times=None)
    with pytest.raises(PushError) as caught:
        push(hub, secret, exported)
    hub.heal()
    hub.fault("tree", status=500, message=f"you said {secret}", skip=2, times=None)  # the look at what has arrived
    hub.fault("commit", status=503, message=f"you said {secret}")
    result = push(hub, secret, exported)
    said = [str(caught.value), caplog.text, "".join(capsys.readouterr()), str(result.notes)]
    assert ["<token>" in text for text in said] == [True, True, False, True]
    assert secret not in "".join(said)


def test_an_export_of_a_run_is_one(hub, api, tmp_path):
    push(hub, api.token, tiny_export(tmp_path / "e", labels=("a", "b", "c")))
    assert first_commit(hub).title == "Upload a VidPrism model"


def test_a_complaint_is_one_line(command, exported, capsys, monkeypatch):
    monkeypatch.setattr("vidprism_hf.cli.push.main", command)
    assert vidprism_cli.main(["push", str(exported), "--repo", "org/m"]) == 1
    assert "may not create" in complaint(capsys)
