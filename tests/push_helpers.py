"""What tests of pushes share: short patience, a push to the test Hub, and that it was published once and whole."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from small import files_of, tiny_model

from vidprism_hf.hub.push import push_export
from vidprism_hf.hub.retries import Patience

QUICK = Patience(tries=3, first_pause=0.001, longest_pause=0.004, longest_wait=3, connect_timeout=5, timeout=10)


@pytest.fixture
def brisk(monkeypatch) -> list[float]:
    """The client's own pauses, which cannot be set, pass at once; gives their lengths."""
    slept = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=slept.append, time=time.time))
    return slept


def push(hub, token, folder, repo="alice/m", patience=QUICK, **settings):
    return push_export(folder, repo, token=token, endpoint=hub.url, patience=patience, **settings)


def repo_of(hub, name="alice/m"):
    return hub.repositories["model", name]


def first_commit(hub, name="alice/m"):
    return repo_of(hub, name).commit("main")


def pushed_once(hub, folder, name="alice/m", commits=1):
    """The branch holds the folder's files, and there are so many commits on top of the first."""
    repo = repo_of(hub, name)
    files = {path: content.read() for path, content in repo.commit("main").files.items()}
    files.pop(".gitattributes")
    assert files == files_of(folder)
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
