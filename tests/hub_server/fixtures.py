"""Fixtures of tests that talk to the test Hub: `pytest_plugins = ["hub_server.fixtures"]` loads them."""

import os
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from . import Hub

CARD = "---\nlicense: apache-2.0\npipeline_tag: video-classification\ntags:\n- vidprism\n---\n# A model\n"


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def api(hub, monkeypatch):
    """A client of alice, who owns her namespace, without Xet."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    disable_progress_bars()
    yield HfApi(endpoint=hub.url, token=hub.user("alice"))
    enable_progress_bars()


@pytest.fixture
def export(tmp_path) -> Path:
    """A folder as it is pushed: small text, large files, one in a folder, one empty."""
    folder = tmp_path / "export"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "empty.txt").touch()
    (folder / "model.safetensors").write_bytes(os.urandom(250_001))
    (folder / "sub" / "figure.png").write_bytes(os.urandom(1000))
    return folder
