"""From a training to the Hub and back: the callback of a recipe, and a stranger who loads by id; a Hub that is down."""

import json
import os
import re
import subprocess
import sys

import pytest
from hub_server import Hub
from push_helpers import as_published
from safetensors.torch import load
from small import run_arguments

from vidprism_cli import main
from vidprism_hf import VidPrismForVideoClassification

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STRANGER = """
from transformers import pipeline
classify = pipeline("video-classification", model="alice/moves", trust_remote_code=True)
print(classify({clip!r}, top_k=1)[0]["label"])
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that the processes which this one starts talk to, as alice."""
    with Hub() as hub:
        for name, value in hub.environment(tmp_path / "home", hub.user("alice")).items():
            monkeypatch.setenv(name, value)
        yield hub


def pushing(source, output, repo, *more):
    """A run that pushes to a repository."""
    callback = "--trainer.callbacks+=vidprism_hf.training.callbacks.push.PushToHub"
    return run_arguments(source, output, callback, f"--trainer.callbacks.repo={repo}", *more)


def read(commit):
    return {path: content.read() for path, content in commit.files.items()}


def test_a_run_is_published_as_it_goes_and_at_its_end(hub, motion_clips, tmp_path, capsys):
    hub.fault("commit", status=500)
    assert main(pushing(motion_clips, tmp_path / "run", "alice/moves", "--trainer.callbacks.private=true")) == 0
    repo = hub.repositories["model", "alice/moves"]
    assert repo.private
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"Pushed: {hub.url}/alice/moves {repo.commit('main').oid}"
    # What is on the Hub in the end is the run's export, with the card of the whole run.
    export = as_published(tmp_path / "run" / "export", "alice/moves")
    published = read(repo.commit("main"))
    assert {name: published.get(name) for name in export} == export
    assert b"## Experts" in export["README.md"]
    # What was there before knew what its own epoch had given.
    *_, first, _ = repo.history(repo.commit("main"))
    during = read(first)
    assert b"Kept as the best so far" in during["README.md"]
    assert "figures/curves.png" in during
    top1 = json.loads((tmp_path / "run" / "metrics.json").read_text())["top1"]
    assert repo.commit("main").title == f"Final export: held-out top-1 {top1:.4f}"
    assert re.fullmatch(r"Epoch [12], step [24]: val/top1 \d\.\d{4}", first.title)
    assert load(during["model.safetensors"]).keys() == load(export["model.safetensors"]).keys()
    assert not (tmp_path / "run" / "push").exists()
    repo.private = False
    clip = str(next((motion_clips / "val" / "growing").iterdir()))
    stranger = hub.environment(tmp_path / "elsewhere") | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STRANGER.format(clip=clip)]
    said = subprocess.run(command, env=stranger, capture_output=True, text=True, timeout=300, check=True).stdout
    assert said.strip().splitlines()[-1] in os.listdir(motion_clips / "val")


def test_a_hub_that_is_down_for_good(hub, motion_clips, tmp_path, capsys):
    hub.fault("any", status=503, retry_after=3600, times=None)
    # One callback may stand without a list.
    callback = {"class_path": "vidprism_hf.training.callbacks.push.PushToHub", "init_args": {"repo": "alice/moves"}}
    assert main(run_arguments(motion_clips, tmp_path / "run", f"--trainer.callbacks={json.dumps(callback)}")) == 0
    export = tmp_path / "run" / "export"
    assert "alice/moves" not in (export / "recipe.yaml").read_text()
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "ushed" in line] == said[-1:]
    assert said[-1].startswith("Not pushed: alice/moves: the Hub asks for a pause of 3600 s")
    assert said[-1].endswith(f"; push it by hand: vidprism push {export} --repo alice/moves")
    VidPrismForVideoClassification.from_pretrained(export)
