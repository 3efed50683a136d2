"""What tests of pushes share: short patience, a push to the test Hub, and that it was published once and whole."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from small import files_of, tiny_model

from vidprism_hf.hub.card import addressed
from vidprism_hf.hub.errors import PushError
from vidprism_hf.hub.push import push_export
from vidprism_hf.hub.retries import Patience

QUICK = Patience(tries=3, first_pause=0.001, longest_pause=0.004, longest_wait=3, connect_timeout=5, timeout=10)


@pytest.fixture
def brisk(monkeypatch) -> list[float]:
    """The client's own pauses, which cannot be set, pass at once; gives their lengths."""
    slept = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=slept.append, time=time.time))
    return slept


@pytest.fixture
def pauses(brisk, monkeypatch) -> list[float]:
    """All pauses, ours and the client's, pass at once; gives their lengths."""
    own = SimpleNamespace(sleep=brisk.append, monotonic=time.monotonic)
    monkeypatch.setattr("vidprism_hf.hub.retries.time", own)
    return brisk


def push(hub, token, folder, repo="alice/m", patience=QUICK, **settings):
    return push_export(folder, repo, token=token, endpoint=hub.url, patience=patience, **settings)


def repo_of(hub, name="alice/m"):
    return hub.repositories["model", name]


def first_commit(hub, name="alice/m"):
    return repo_of(hub, name).commit("main")


def as_published(folder, name="alice/m") -> dict[str, bytes]:
    """The files of an export, with a card that names the model as the Hub does."""
    files = files_of(folder)
    return files | {"README.md": addressed(files["README.md"].decode(), name).encode()}


def pushed_once(hub, folder, name="alice/m", commits=1):
    """The branch holds the folder's files, and there are so many commits on top of the first."""
    repo = repo_of(hub, name)
    files = {path: content.read() for path, content in repo.commit("main").files.items()}
    files.pop(".gitattributes")
    assert files == as_published(folder, name)
    assert len(repo.commits) == commits + 1
    assert len(repo.history(repo.commit("main"))) == commits + 1


def with_bytes(folder: Path, files: dict[str, bytes]) -> Path:
    """A folder with these files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def grown(folder: Path) -> None:
    """Makes an export's weights those of another model."""
    tiny_model(labels=("a", "b", "c")).save_pretrained(folder / "other", save_original_format=False)
    (folder / "other" / "model.safetensors").replace(folder / "model.safetensors")


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
