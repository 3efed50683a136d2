"""What leaves an exported folder is not published: links are refused by name, and what was checked is what is sent."""

import os
import shutil
import socket

import pytest
from push_helpers import QUICK, push, pushed_once, with_bytes
from small import LABELS, card_facts, files_of, tiny_export, tiny_model, tiny_processor

from vidprism_hf.hub import export_model, render_card
from vidprism_hf.hub.export import ExportError
from vidprism_hf.hub.own_files import read_own
from vidprism_hf.hub.push import push_export
from vidprism_hf.hub.refusals import PushError
from vidprism_hf.hub.remote import Remote

pytest_plugins = ["hub_server.fixtures"]

SECRET = b"hf_the_pushers_own_token"


@pytest.fixture
def folder(exported, tmp_path):
    return with_bytes(tmp_path / "model", files_of(exported))


@pytest.fixture
def secret(tmp_path):
    return with_bytes(tmp_path / "home", {"token": SECRET, "figures/x.png": SECRET}) / "token"


def refused(folder) -> str:
    """The line in which a push refuses a folder, before anything is asked of the Hub."""
    with pytest.raises(PushError) as caught:
        push_export(folder, "alice/m", token="hf_none", endpoint="http://localhost:1", patience=QUICK)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def linked(place, target):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(target)


@pytest.mark.parametrize(
    "name", ["figures/x.png", "README.md", "config.json", "model.safetensors", "recipe.yaml", "notes.txt", ".env"]
)
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_that_leaves_the_folder_is_refused_by_name(folder, secret, name, relative):
    place = folder / name
    linked(place, os.path.relpath(secret, place.parent) if relative else secret)
    assert f"{folder / name}: is a link that leaves the folder" in refused(folder)


def test_links_to_links_are_followed_to_their_end(folder, secret):
    linked(folder / "train_clips.txt", "second")
    linked(folder / "second", secret)
    assert "second: is a link that leaves the folder" in refused(folder)
    (folder / "second").unlink()
    linked(secret.parent / "back", folder / "config.json")  # out and in again
    linked(folder / "train_clips.txt", secret.parent / "back")
    read_own(folder, "train_clips.txt")


@pytest.mark.parametrize("name", ["figures", ".eval_results"])
def test_a_linked_folder_is_refused(folder, secret, name):
    shutil.rmtree(folder / name, ignore_errors=True)
    linked(folder / name, secret.parent / "figures")
    assert f"{folder / name}: is a link that leaves the folder" in refused(folder)
    linked(folder / name, "sub")
    (folder / "sub").mkdir()
    assert f"{folder / name}: is a link to a folder" in refused(folder)


@pytest.mark.parametrize("target", ["nowhere", "notes.txt"], ids=["dangling", "loop"])
def test_a_link_that_leads_nowhere_is_refused(folder, target):
    linked(folder / "notes.txt", target)
    assert f"{folder / 'notes.txt'}: cannot be read" in refused(folder)


@pytest.mark.parametrize("name", ["figures/x.png", "config.json", "README.md", "model.safetensors", "pipe"])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_file_is_refused_and_not_waited_for(folder, name, kind, monkeypatch):
    (folder / "figures").mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        monkeypatch.chdir((folder / name).parent)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind((folder / name).name)
    assert f"{folder / name}: is neither a file nor a folder" in refused(folder)


def test_a_device_is_refused(folder):
    linked(folder / "figures" / "x.png", "/dev/zero")
    assert "is a link that leaves the folder" in refused(folder)


def test_other_folders_are_left_out_and_not_looked_into(hub, api, exported, folder, secret):
    with_bytes(folder, {".git/config": SECRET, "figures/sub/x.png": SECRET})
    linked(folder / ".git" / "link", secret)
    result = push(hub, api.token, folder)
    pushed_once(hub, exported)
    assert [note for note in result.notes if ".git" in note] == [".git/: no file of an export; left out"]


def cached(folder, root, repo="models--org--m"):
    """The folder as the Hub's cache keeps it: links into the blobs of its repository."""
    snapshot = root / repo / "snapshots" / ("a" * 40)
    for number, (name, content) in enumerate(sorted(files_of(folder).items())):
        with_bytes(root / repo / "blobs", {f"{number:064x}": content})
        place = snapshot / name
        linked(place, os.path.relpath(root / repo / "blobs" / f"{number:064x}", place.parent))
    return snapshot


def test_links_into_the_blobs_of_a_cache_are_published(hub, api, folder, tmp_path):
    with_bytes(folder, {"figures/curves.png": b"picture"})
    push(hub, api.token, cached(folder, tmp_path / "cache"))
    pushed_once(hub, folder)


def test_other_links_out_of_a_cache_are_refused(folder, secret, tmp_path):
    root = tmp_path / "cache"
    snapshot = cached(folder, root)
    blobs = snapshot.parent.parent / "blobs"
    with_bytes(root / "models--org--private" / "blobs", {"0" * 64: SECRET})
    linked(blobs / ("b" * 64), secret)
    for target in (
        root / "models--org--private" / "blobs" / ("0" * 64),
        blobs / ("b" * 64),
        secret,
        blobs / ".." / ".." / ".." / "home" / "token",
    ):
        linked(snapshot / "train_clips.txt", target)
        assert "train_clips.txt: is a link that leaves the folder" in refused(snapshot)
    os.rename(root / "models--org--m", root / "elsewhere")
    linked(root / "elsewhere" / "snapshots" / ("a" * 40) / "train_clips.txt", "README.md")
    assert "is a link that leaves the folder" in refused(root / "elsewhere" / "snapshots" / ("a" * 40))


def test_a_link_to_the_export_itself_is_followed(hub, api, exported, tmp_path):
    (tmp_path / "latest").symlink_to(exported)
    push(hub, api.token, tmp_path / "latest")
    pushed_once(hub, exported)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="opens by the name again")
@pytest.mark.parametrize("name", ["model.safetensors", "README.md"])
def test_what_was_checked_is_what_is_sent(hub, api, exported, folder, secret, monkeypatch, name):
    def upload(remote, *arguments):
        linked(folder / name, secret)
        return send(remote, *arguments)

    send = Remote.upload
    monkeypatch.setattr(Remote, "upload", upload)
    push(hub, api.token, folder)
    pushed_once(hub, exported)


def test_a_file_that_becomes_a_link_after_the_look_is_not_read(folder, secret, monkeypatch):
    real = os.open

    def swap(path, *arguments, **settings):
        if path == "README.md":
            linked(folder / "README.md", secret)
        return real(path, *arguments, **settings)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(OSError, match=r"README\.md"):
        read_own(folder, "README.md")


def test_export_takes_no_words_from_a_card_elsewhere(folder, secret, tmp_path):
    tiny_export(tmp_path / "other")
    readme = tmp_path / "other" / "README.md"
    readme.write_text(readme.read_text() + "\nSecret.\n")
    linked(folder / "README.md", readme)
    with pytest.raises(ExportError, match=r"README\.md: is a link that leaves the folder"):
        export_model(tiny_model(), tiny_processor(), folder, render_card(card_facts(LABELS)))
    assert "Secret." in readme.read_text()
