"""The test Hub itself: that it serves and refuses as the real Hub is known to."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import pyarrow
import pyarrow.parquet
import pytest
from clips import greys, render
from hub_server import serve
from hub_server.client import add, ask, contents, published, push, refused
from huggingface_hub import CommitOperationDelete, HfApi, HfFileSystem
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

pytest_plugins = ["hub_server.fixtures"]
LFS_TYPE = {"Content-Type": "application/vnd.git-lfs+json"}


# Reading


LOAD = """
import sys
from datasets import Video, load_dataset
for name, revision in (("org/parquet", "v1"), ("org/folders", sys.argv[1])):
    for streaming in (False, True):
        loaded = load_dataset(name, revision=revision, streaming=streaming)
        for split, rows in loaded.items():
            rows = rows.decode(False) if streaming else rows.cast_column("video", Video(decode=False))
            names = rows.features["label"].names
            print(name, split, *sorted(names[row["label"]] for row in rows))
"""


@pytest.mark.slow
def test_datasets_of_clips_load_and_stream(hub, tmp_path):
    folders = tmp_path / "folders"
    for name in ("train/run/a", "train/jump/b", "test/jump/c", "test/run/d"):
        (folders / name).parent.mkdir(parents=True, exist_ok=True)
        render(folders / f"{name}.mp4", greys(3))
    parquet = tmp_path / "parquet"
    (parquet / "data").mkdir(parents=True)
    names = "      class_label:\n        names:\n          '0': run\n          '1': jump\n"
    features = "dataset_info:\n  features:\n  - name: video\n    dtype: video\n  - name: label\n    dtype:\n"
    (parquet / "README.md").write_text(f"---\n{features}{names}---\n")
    clip = {"bytes": (folders / "train/run/a.mp4").read_bytes(), "path": "a.mp4"}
    for shard, labels in enumerate(([0, 1], [1, 1])):
        rows = pyarrow.table({"video": [clip] * 2, "label": labels})
        pyarrow.parquet.write_table(rows, parquet / "data" / f"train-0000{shard}-of-00002.parquet")
    hub.page_size = 3
    commit = hub.add_dataset("org/folders", folders).commit("main")
    repo = hub.add_dataset("org/parquet", parquet)
    repo.refs["refs/tags/v1"] = repo.commit("main").oid
    command = [sys.executable, "-c", LOAD, commit.oid]
    environment = hub.environment(tmp_path / "home")
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr[-3000:]
    once = ["org/parquet train jump jump jump run"], ["org/folders train jump run", "org/folders test jump run"]
    assert finished.stdout.splitlines() == once[0] * 2 + once[1] * 2


def test_information_listings_and_paths(hub, api, export):
    hub.page_size = 2
    commit = hub.add_dataset("org/clips", export).commit("main")
    dataset = {"repo_type": "dataset"}
    files = ["README.md", "config.json", "empty.txt", "model.safetensors", "sub/figure.png"]
    assert api.list_repo_files("org/clips", **dataset) == files
    assert hub.count("tree") == 3
    assert [entry.path for entry in api.list_repo_tree("org/clips", "sub", **dataset)] == ["sub/figure.png"]
    top = [entry.path for entry in api.list_repo_tree("org/clips", **dataset)]
    assert top == [*files[:4], "sub"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("org/clips", "none", **dataset))
    large, folder = api.get_paths_info("org/clips", ["model.safetensors", "sub", "none"], expand=True, **dataset)
    assert large.lfs.sha256 == sha256((export / "model.safetensors").read_bytes()).hexdigest()
    assert (large.size, large.lfs.size, folder.last_commit.oid) == (250_001, 250_001, commit.oid)
    info = api.dataset_info("org/clips", files_metadata=True)
    assert (info.sha, info.card_data.license, info.tags) == (commit.oid, "apache-2.0", ["vidprism"])
    assert [(file.rfilename, file.lfs is not None) for file in info.siblings][2:4] == [
        ("empty.txt", False),
        ("model.safetensors", True),
    ]
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/clips")


def test_blob_ids_are_those_of_git(hub, api, export):
    hub.add_model("org/m", export)
    (entry,) = api.get_paths_info("org/m", ["config.json"])
    command = ["git", "hash-object", str(export / "config.json")]
    assert entry.blob_id == subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_files_in_ranges(hub, api, export):
    hub.add_model("org/m", export)
    content = (export / "model.safetensors").read_bytes()
    status, headers, _ = ask(f"{hub.url}/org/m/resolve/main/model.safetensors", "HEAD")
    assert (status, headers["X-Linked-Size"]) == (302, "250001")
    assert headers["X-Linked-Etag"] == f'"{sha256(content).hexdigest()}"'
    store = headers["Location"]
    assert ask(store)[2] == content
    assert ask(store, token=hub.user("alice"))[0] == 400  # a token must not reach the store
    for text, expected in (("bytes=0-9", content[:10]), ("bytes=250000-", content[-1:]), ("bytes=-5", content[-5:])):
        status, headers, body = ask(store, Range=text)
        assert (status, body) == (206, expected)
        assert headers["Content-Range"].endswith("/250001")
    assert ask(store, Range="bytes=250001-")[0] == 416
    assert ask(f"{hub.url}/org/m/resolve/main/config.json", Range="bytes=1-3")[2] == b'"a"'
    with HfFileSystem(endpoint=hub.url, skip_instance_cache=True).open("org/m/model.safetensors", "rb") as file:
        file.seek(1000)
        assert file.read(50) == content[1000:1050]


def test_revisions(hub, api, export, tmp_path):
    first = hub.add_model("org/m", export).commit("main")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text("new")
    hub.add_model("org/m", tmp_path / "new")
    assert published(api, "org/m", tmp_path / "c") == {"config.json": b"new"}
    assert published(api, "org/m", tmp_path / "c", first.oid) == contents(export)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/m", revision="v9")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("org/m", "README.md", cache_dir=tmp_path / "c")


def test_some_files_of_a_dataset(hub, api, export, tmp_path):
    hub.add_dataset("org/d", export)
    found = api.snapshot_download("org/d", repo_type="dataset", allow_patterns="sub/*", cache_dir=tmp_path / "c")
    assert list(contents(found)) == ["sub/figure.png"]
    assert hub.count("content") == 1


def test_short_form_serves_both(export, tmp_path):
    with serve({"org/m": export}, datasets={"org/d": export}) as endpoint:
        assert HfApi(endpoint).repo_exists("org/m")
        assert HfApi(endpoint).repo_exists("org/d", repo_type="dataset")


# Round trips


@pytest.mark.parametrize("part_size", [5 << 30, 100_000])
def test_push_and_download_are_the_same(hub, api, export, tmp_path, part_size):
    hub.part_size = part_size
    api.create_repo("alice/m")
    made = api.upload_folder(repo_id="alice/m", folder_path=export)
    assert published(api, "alice/m", tmp_path / "c") == contents(export)
    assert hub.count("upload") == (2 if part_size > 250_001 else 4)
    again = api.upload_folder(repo_id="alice/m", folder_path=export)
    assert (again.oid, hub.count("commit")) == (made.oid, 1)  # nothing changed: nothing sent
    (export / "model.safetensors").write_bytes(b"new")
    (export / "sub" / "figure.png").unlink()
    api.upload_folder(repo_id="alice/m", folder_path=export, delete_patterns="sub/*")
    assert published(api, "alice/m", tmp_path / "c") == contents(export)


def test_push_by_xet(hub, api, export, tmp_path):
    hf_xet = pytest.importorskip("hf_xet")
    session = hf_xet.XetSession()
    try:
        with session.new_upload_commit(f"local://{tmp_path / 'probe'}", "token", int(time.time()) + 3600) as commit:
            commit.start_upload_bytes(b"content", sha256=hf_xet.COMPUTE_SHA256)
    except Exception as error:
        pytest.skip(f"hf-xet no longer writes to a local folder: {error}")
    process = push(hub, hub.user("alice"), export, tmp_path / "home", xet=True)
    oid, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors[-3000:]
    assert hub.count("xet-token") > 0
    assert hub.count("upload") == 0
    assert published(api, "alice/m", tmp_path / "c", oid.strip()) == contents(export)


# What is refused


def batch(hub, name: str, content: bytes, token: str) -> dict:
    """The answer for one large file, asked for raw."""
    item = {"oid": sha256(content).hexdigest(), "size": len(content)}
    body = {"operation": "upload", "transfers": ["basic"], "objects": [item], "hash_algo": "sha256"}
    url = f"{hub.url}/{name}.git/info/lfs/objects/batch"
    return json.loads(ask(url, "POST", body | {"ref": {"name": "main"}}, token, **LFS_TYPE)[2])["objects"][0]


def commit(hub, name: str, operations: list[dict], token: str, **header):
    """A raw commit: status, body."""
    lines = [{"key": "header", "value": {"summary": "raw"} | header}, *operations]
    body = b"\n".join(json.dumps(line).encode() for line in lines)
    url = f"{hub.url}/api/models/{name}/commit/main"
    status, _, body = ask(url, "POST", body, token, **{"Content-Type": "application/x-ndjson"})
    return status, body.decode()


def pointer(content: bytes, **changed) -> dict:
    value = {"path": "w.bin", "algo": "sha256", "oid": sha256(content).hexdigest(), "size": len(content)}
    return {"key": "lfsFile", "value": value | changed}


def test_uploads_are_checked(hub, api):
    token = api.token
    api.create_repo("alice/m")
    content = b"weights" * 100
    actions = batch(hub, "alice/m", content, token)["actions"]
    upload, verify = actions["upload"]["href"], actions["verify"]["href"]
    facts = {"oid": sha256(content).hexdigest(), "size": len(content)}
    for wrong in (content[:-1], content + b"!", content[:-1] + b"!"):
        assert ask(upload, "PUT", wrong)[0] == 400
        assert ask(verify, "POST", facts, token)[0] == 404
    assert ask(upload, "PUT", content, token)[0] == 400  # no token may reach the store
    assert ask(f"{hub.store_url}/upload/guessed", "PUT", content)[0] == 403
    assert ask(upload, "PUT", content)[0] == 200
    status, body = commit(hub, "alice/m", [pointer(content)], token)
    assert status == 400  # not verified yet
    assert "LFS pointer pointed to a file that does not exist" in body
    assert ask(verify, "POST", facts | {"size": 1}, token)[0] == 422
    assert ask(verify, "POST", facts)[0] == 401
    assert ask(verify, "POST", facts, token)[0] == 200
    assert commit(hub, "alice/m", [pointer(content, size=1)], token)[0] == 400
    assert commit(hub, "alice/m", [pointer(content)], token)[0] == 200
    assert "actions" not in batch(hub, "alice/m", content, token)  # nothing to upload any more
    api.create_repo("alice/other")
    assert commit(hub, "alice/other", [pointer(content)], token)[0] == 400  # known elsewhere is not known here


def test_parts_are_checked(hub, api):
    api.create_repo("alice/m")
    hub.part_size = 100
    content = os.urandom(250)
    item = {"oid": sha256(content).hexdigest(), "size": 250}
    body = {"operation": "upload", "transfers": ["multipart"], "objects": [item], "hash_algo": "sha256"}
    answer = ask(f"{hub.url}/alice/m.git/info/lfs/objects/batch", "POST", body, api.token, **LFS_TYPE)[2]
    upload = json.loads(answer)["objects"][0]["actions"]["upload"]
    assert ask(upload["header"]["3"], "PUT", content[:100])[0] == 400  # the last part is shorter
    tags = [
        ask(upload["header"][str(number)], "PUT", content[start : start + 100])[1]["ETag"]
        for number, start in ((1, 0), (2, 100), (3, 200))
    ]
    parts = [{"partNumber": number, "etag": tag} for number, tag in enumerate(tags, start=1)]
    assert ask(upload["href"], "POST", {"oid": item["oid"], "parts": parts[:2]})[0] == 400
    assert ask(upload["href"], "POST", {"oid": item["oid"], "parts": parts})[0] == 200


def test_regular_files_are_checked(hub, api):
    api.create_repo("alice/m")

    def file(path, content="AAAA"):
        return {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}}

    for operation, told in (
        (file("../up.txt", "YQ=="), "Invalid path"),
        (file(".git/config", "YQ=="), "Invalid path"),
        (file("a.txt", "no base64!"), "Invalid base64"),
        (file("a.txt"), "binary files"),
        (file("a.txt", "YQ==" * 4_000_000), "Invalid base64"),
        (file("a.txt", "YWFh" * 4_000_000), "larger than 10 MiB"),
        (file(".gitattributes/a.txt", "YQ=="), "a file and a folder"),
        ({"key": "deletedFile", "value": {"path": "none"}}, "doesn't exist"),
        ({"key": "moved", "value": {"path": "none"}}, "Unknown operation"),
        ({"key": "file", "value": {"path": "a.txt"}}, "Malformed request"),
    ):
        status, body = commit(hub, "alice/m", [operation], api.token)
        assert status in (400, 404), told
        assert told in body
    assert commit(hub, "alice/m", [], api.token, summary="")[0] == 400
    assert api.list_repo_files("alice/m") == [".gitattributes"]
    assert len(api.list_repo_commits("alice/m")) == 1


def test_a_stale_parent_is_refused(hub, api):
    api.create_repo("alice/m")
    first = api.create_commit("alice/m", add("a.txt"), commit_message="a").oid
    api.create_commit("alice/m", add("b.txt"), commit_message="b", parent_commit=first)
    stale = {"commit_message": "c", "parent_commit": first}
    assert refused(lambda: api.create_commit("alice/m", add("c.txt"), **stale)) == (412, None)
    assert [item.title for item in api.list_repo_commits("alice/m")] == ["b", "a", "initial commit"]


def test_of_two_commits_on_one_parent_one_is_stored(hub, api):
    api.create_repo("alice/m")
    parent = api.model_info("alice/m").sha

    def race(name):
        try:
            return api.create_commit("alice/m", add(name), commit_message=name, parent_commit=parent).oid
        except HfHubHTTPError as error:
            return error.response.status_code

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(race, [f"{number}.txt" for number in range(8)]))
    assert results.count(412) == 7
    assert len(api.list_repo_commits("alice/m")) == 2


def test_who_may_do_what(hub, api, export):
    hub.add_model("org/public", export)
    hub.add_model("org/private", export, private=True)
    hub.add_model("org/gated", export, gated=True)
    people = {
        "nobody": False,
        "unknown": "hf_unknown",
        "stranger": hub.user("eve"),
        "reads": hub.user("rita", orgs={"org": "read"}),
        "adds": hub.user("carl", orgs={"org": "contributor"}),
        "writes": hub.user("walt", orgs={"org": "write"}),
        "token reads": hub.user("walt", role="read"),
    }

    def outcome(who, action):
        try:
            action(HfApi(endpoint=hub.url, token=people[who]))
        except HfHubHTTPError as error:
            return error.response.status_code, error.response.headers.get("X-Error-Code")
        return 200, None

    actions = {
        "info": lambda api: api.model_info("org/public"),
        "private": lambda api: api.model_info("org/private"),
        "missing": lambda api: api.model_info("org/missing"),
        "gated": lambda api: api.auth_check("org/gated"),
        "create": lambda api: api.create_repo(f"org/{os.urandom(4).hex()}"),
        "commit": lambda api: api.create_commit("org/public", add("a.txt"), commit_message="a"),
        "pull": lambda api: api.create_commit("org/public", add("a.txt"), commit_message="a", create_pr=True),
        "tag": lambda api: api.create_tag("org/public", tag=os.urandom(4).hex()),
    }
    yes, no_repo, gone, denied, unknown = (
        (200, None),
        (401, "RepoNotFound"),
        (404, "RepoNotFound"),
        (403, None),
        (401, None),
    )
    table = {
        "nobody": [yes, no_repo, no_repo, (401, "GatedRepo"), unknown, unknown, unknown, unknown],
        "unknown": [unknown] * 8,
        "stranger": [yes, gone, gone, (403, "GatedRepo"), denied, denied, yes, denied],
        "reads": [yes, yes, gone, (403, "GatedRepo"), denied, denied, yes, denied],
        "adds": [yes, yes, gone, (403, "GatedRepo"), yes, denied, yes, denied],
        "writes": [yes, yes, gone, yes, yes, yes, yes, yes],
        "token reads": [yes, yes, gone, yes, denied, denied, denied, denied],
    }
    for who, expected in table.items():
        found = {name: outcome(who, action) for name, action in actions.items()}
        assert found == dict(zip(actions, expected, strict=True)), who
    assert [ask(f"{hub.url}/api/whoami-v2", token=people[who] or None)[0] for who in people] == [401, 401] + [200] * 5
    with pytest.raises(GatedRepoError):
        HfApi(endpoint=hub.url, token=people["stranger"]).hf_hub_download("org/gated", "config.json")


def test_names_that_are_taken(hub, api):
    url = api.create_repo("alice/m", private=True)
    assert api.model_info("alice/m").private
    assert refused(lambda: api.create_repo("alice/m"))[0] == 409
    assert api.create_repo("alice/m", exist_ok=True) == url == f"{hub.url}/alice/m"
    assert ask(f"{hub.url}/api/repos/create", "POST", {"name": "a/b"}, api.token)[0] == 400
    api.delete_repo("alice/m")
    assert refused(lambda: api.delete_repo("alice/m")) == (404, "RepoNotFound")


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ("license: apache2", '"license" must be one of'),
        ("license: other", '"license_name" is required'),
        ("datasets:\n- null", '"datasets[0]" must be a string'),
        ("base_model: /home/me/clip", '"base_model" with value "/home/me/clip" is not valid'),
        ("tags: [1]", '"tags[0]" must be a string'),
        ("a: [", "Error parsing YAML"),
        ("just text", "must be a mapping"),
        ("model-index:\n- name: m\n  results:\n  - task: {type: t}\n    metrics: []", "results[0].dataset"),
        ("model-index:\n- name: m\n  results:\n  - {task: {type: t}, dataset: {name: d}, metrics: []}", "dataset.type"),
    ],
)
def test_bad_cards_are_refused(hub, api, card, told):
    text = f"---\n{card}\n---\n# M\n"
    api.create_repo("alice/m")
    with pytest.raises(ValueError, match="Invalid metadata in README") as caught:
        api.create_commit("alice/m", add("README.md", text.encode()), commit_message="card")
    assert told in str(caught.value)
    assert hub.count("preupload") == 0
    content = {"path": "README.md", "content": add("x", text.encode())[0].b64content().decode()}
    status, body = commit(hub, "alice/m", [{"key": "file", "value": content | {"encoding": "base64"}}], api.token)
    assert (status, told in json.loads(body)["error"]) == (400, True)


def test_warnings_and_results_of_cards(hub, api):
    api.create_repo("alice/m")
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api.create_commit("alice/m", add("README.md", b"# No metadata\n"), commit_message="card")
    good = b"- dataset: {id: org/d, task_id: top1}\n  value: 0.5\n"
    files = add(".eval_results/a.yaml", good) + add(".eval_results/b.yaml", b"- dataset: {id: org/d}\n  value: 1\n")
    api.create_commit("alice/m", files, commit_message="results")
    (result,) = api.model_info("alice/m").eval_results
    assert (result.dataset_id, result.task_id, result.value) == ("org/d", "top1", 0.5)


def test_branches_tags_and_deletions(hub, api):
    api.create_repo("alice/m")
    first = api.create_commit("alice/m", add("sub/a.txt"), commit_message="a").oid
    api.create_tag("alice/m", tag="v1")
    api.create_branch("alice/m", branch="next/one", revision="v1")
    api.create_commit(
        "alice/m",
        [CommitOperationDelete("sub/"), *add("b.txt")],
        commit_message="b",
        revision="next/one",
    )
    assert api.list_repo_files("alice/m", revision="next/one") == [".gitattributes", "b.txt"]
    assert api.list_repo_files("alice/m") == [".gitattributes", "sub/a.txt"]
    refs = api.list_repo_refs("alice/m")
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first)]
    assert [branch.name for branch in refs.branches] == ["main", "next/one"]
    assert refused(lambda: api.create_tag("alice/m", tag="v1"))[0] == 409
    api.create_tag("alice/m", tag="v1", exist_ok=True)
    assert refused(lambda: api.create_branch("alice/m", branch="next/one"))[0] == 409
    assert refused(lambda: api.create_branch("alice/m", branch="refs/pr/1"), BadRequestError)[0] == 400
    assert refused(lambda: api.create_tag("alice/m", tag="v2", revision="v9")) == (404, "RevisionNotFound")
    elsewhere = {"commit_message": "c", "revision": "v9"}
    assert refused(lambda: api.create_commit("alice/m", add("c.txt"), **elsewhere)) == (404, "RevisionNotFound")
    assert refused(lambda: api.create_commit("alice/m", add("c.txt"), commit_message="c", revision="v1"))[0] == 400
    api.delete_branch("alice/m", branch="next/one")
    api.delete_tag("alice/m", tag="v1")
    assert refused(lambda: api.delete_tag("alice/m", tag="v1")) == (404, "RevisionNotFound")


def test_pull_requests(hub, api):
    api.create_repo("alice/m")
    head = api.model_info("alice/m").sha
    eve = HfApi(endpoint=hub.url, token=hub.user("eve"))
    large = add("w.bin", os.urandom(100))
    made = eve.create_commit("alice/m", large + add("a.txt"), commit_message="pull", create_pr=True)
    assert (made.pr_num, made.pr_revision, api.model_info("alice/m").sha) == (1, "refs/pr/1", head)
    assert "w.bin" in api.list_repo_files("alice/m", revision="refs/pr/1")
    assert [item.num for item in api.get_repo_discussions("alice/m")] == [1]
    assert refused(lambda: eve.merge_pull_request("alice/m", 1))[0] == 403
    api.merge_pull_request("alice/m", 1)
    assert api.get_discussion_details("alice/m", 1).status == "merged"
    assert "w.bin" in api.list_repo_files("alice/m")
