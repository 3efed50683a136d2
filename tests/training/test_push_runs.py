"""From a training to the Hub and back: the callback of a recipe, `vidprism push`, and a stranger who loads by id."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub
from small import run_arguments

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
STRANGER = """
from transformers import pipeline
classify = pipeline("video-classification", model="alice/moves", trust_remote_code=True)
print(classify({clip!r}, top_k=1)[0]["label"])
"""


def run(words, env):
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_a_run_is_published_as_it_goes_and_at_its_end(motion_clips, tmp_path):
    callback = (
        "--trainer.callbacks+=vidprism_hf.training.push_callback.PushToHub",
        "--trainer.callbacks.repo=alice/moves",
    )
    arguments = run_arguments(motion_clips, tmp_path / "run", *callback)
    with Hub() as hub:
        env = hub.environment(tmp_path / "home", hub.user("alice")) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        run(["-m", "vidprism_hf.cli", *arguments], env)
        repo = hub.repositories["model", "alice/moves"]
        during = {path: content.read() for path, content in repo.commit("main").files.items()}
        assert {"model.safetensors", "config.json", "README.md", "recipe.yaml"} <= during.keys()
        # The final export differs in what it has learned of itself, not in its weights.
        export = tmp_path / "run" / "export"
        said = run(["-m", "vidprism_hf.cli", "push", str(export), "--repo", "alice/moves", "--tag", "v1"], env)
        last = said.splitlines()[-1]
        assert hub.url in last
        assert repo.commit("main").oid in last
        published = {path: content.read() for path, content in repo.commit("main").files.items()}
        ours = {str(path.relative_to(export)): path.read_bytes() for path in export.rglob("*") if path.is_file()}
        assert {name: published.get(name) for name in ours} == ours
        stranger = hub.environment(tmp_path / "elsewhere") | {"OMP_NUM_THREADS": "1"}
        code = STRANGER.format(clip=str(next((motion_clips / "val" / "growing").iterdir())))
        label = run(["-c", code], stranger).strip().splitlines()[-1]
        assert label in os.listdir(motion_clips / "val")
