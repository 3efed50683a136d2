"""What was pushed loads by its name: with and without this package, from an empty cache and then offline."""

import json
import subprocess
import sys

import pytest
import torch
from push_helpers import push
from safetensors.torch import load_file
from small import LABELS, tiny_export

from vidprism_hf.data.sources.demo import demo_frames, write_clip

pytest_plugins = ["hub_server.fixtures"]
pytestmark = pytest.mark.slow

LOAD = """
import json, sys
own, revision, clip = sys.argv[1] == "own", sys.argv[2], sys.argv[3]
if own:
    import vidprism_hf
    trust = {}
else:
    trust = {"trust_remote_code": True}
from transformers import AutoModel, AutoModelForVideoClassification, AutoVideoProcessor, pipeline
settings = {"revision": revision, **trust}
told = {}
for auto in (AutoModel, AutoModelForVideoClassification, AutoVideoProcessor):
    told[auto.__name__] = type(auto.from_pretrained("org/vidprism-tiny", **settings)).__name__
model = AutoModelForVideoClassification.from_pretrained("org/vidprism-tiny", **settings)
told["sum"] = sum(float(value.double().sum()) for value in model.state_dict().values())
told["code"] = type(model).__module__.split(".")[0]
classify = pipeline("video-classification", model="org/vidprism-tiny", **settings)
told["labels"] = {found["label"]: found["score"] for found in classify(clip)}
assert own or "vidprism_hf" not in sys.modules
print(json.dumps(told))
"""


def load(environment, *arguments) -> dict:
    command = [sys.executable, "-c", LOAD, *map(str, arguments)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture
def clip(tmp_path):
    write_clip(tmp_path / "clip.mp4", demo_frames(LABELS[0], 0, "val", 0), 10)
    return tmp_path / "clip.mp4"


@pytest.mark.parametrize("code", ["own", "remote"])
def test_what_was_pushed_loads_and_then_offline(hub, api, tmp_path, clip, code):
    token = hub.user("alice", orgs={"org": "write"})
    sums = {}
    for seed, tag in enumerate(("v1", "v2")):
        folder = tiny_export(tmp_path / tag, seed=seed)
        push(hub, token, folder, repo="org/vidprism-tiny", tag=tag)
        sums[tag] = sum(float(value.double().sum()) for value in load_file(folder / "model.safetensors").values())
    environment = hub.environment(tmp_path / "home")
    first = load(environment, code, "v1", clip)
    asked = hub.count("content")
    assert asked > 0
    assert first["AutoModel"] == "VidPrismModel"
    assert first["AutoModelForVideoClassification"] == "VidPrismForVideoClassification"
    assert first["AutoVideoProcessor"] == "VidPrismVideoProcessor"
    assert first["sum"] == pytest.approx(sums["v1"])
    assert set(first["labels"]) == set(LABELS)
    assert first["code"] == ("vidprism_hf" if code == "own" else "transformers_modules")
    second = load(environment, code, "main", clip)
    assert second["sum"] == pytest.approx(sums["v2"]) != pytest.approx(sums["v1"])
    offline = environment | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    asked = sum(hub.count().values())
    assert load(offline, code, "v1", clip) == first
    assert load(offline, code, "main", clip) == second
    assert sum(hub.count().values()) == asked


def test_a_private_model_loads_with_a_token_only(hub, api, exported, tmp_path, clip):
    token = hub.user("alice", orgs={"org": "write"})
    push(hub, token, exported, repo="org/vidprism-tiny", private=True, revision="exp")
    loaded = load(hub.environment(tmp_path / "home", token), "own", "exp", clip)
    assert torch.tensor(list(loaded["labels"].values())).sum() == pytest.approx(1, abs=1e-4)
    command = [sys.executable, "-c", LOAD, "own", "exp", str(clip)]
    environment = hub.environment(tmp_path / "other")
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode != 0
    assert token not in finished.stderr
