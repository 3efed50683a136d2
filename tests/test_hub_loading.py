"""Loading by Hub id, with the real clients in a clean process, from a Hub on loopback."""

import os
import subprocess
import sys

import pytest
import torch
from hub_server import Hub, serve
from small import tiny_export
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

pytestmark = pytest.mark.slow

TOWER = """
import sys, torch
from vidprism_hf import VidPrismForVideoClassification, VidPrismVideoProcessor
model = VidPrismForVideoClassification.from_vision_pretrained("org/clip", id2label={0: "a", 1: "b"}, num_frames=4)
processor = VidPrismVideoProcessor.from_vision_pretrained("org/clip", num_frames=4)
assert processor.crop_size["height"] == 16, processor.crop_size
torch.save(model.vidprism.vision_tower.state_dict(), sys.argv[1])
"""
MODEL = """
import vidprism_hf
from transformers import AutoModel, AutoModelForVideoClassification, AutoVideoProcessor
for auto in (AutoModel, AutoModelForVideoClassification, AutoVideoProcessor):
    print(type(auto.from_pretrained("org/vidprism")).__name__)
"""

PUSH = """
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
sizes = dict(image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
model = CLIPVisionModelWithProjection._from_config(CLIPVisionConfig(**sizes))
model.push_to_hub("alice/tower", private=True, max_shard_size="10KB", commit_message="pushed")
loaded = CLIPVisionModelWithProjection.from_pretrained("alice/tower").state_dict()
print(all(bool((loaded[name] == value).all()) for name, value in model.state_dict().items()))
"""


def run(code, endpoint, home, *arguments, **variables):
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **variables}
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, "-c", code, *arguments]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout.split()


def test_a_clip_tower_by_its_id(tmp_path):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=16
    )
    tower = CLIPVisionModelWithProjection._from_config(config)
    tower.save_pretrained(tmp_path / "clip")
    with serve({"org/clip": tmp_path / "clip"}) as endpoint:
        run(TOWER, endpoint, tmp_path / "home", str(tmp_path / "loaded.pt"))
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=True)
    expected = tower.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_a_published_model_by_its_id_and_then_offline(tmp_path):
    names = ["VidPrismModel", "VidPrismForVideoClassification", "VidPrismVideoProcessor"]
    with serve({"org/vidprism": tiny_export(tmp_path / "export")}) as endpoint:
        assert run(MODEL, endpoint, tmp_path / "home") == names
    assert run(MODEL, "http://127.0.0.1:9", tmp_path / "home", HF_HUB_OFFLINE="1") == names


@pytest.mark.parametrize("xet", ["0", "1"])
def test_transformers_pushes_and_loads(tmp_path, xet):
    if xet == "1":
        pytest.importorskip("hf_xet")
    with Hub() as hub:
        token = hub.user("alice")
        variables = {"HF_HUB_DISABLE_XET": "1" if xet == "0" else "0"}
        home = tmp_path / "home"
        home.mkdir()
        (home / "token").write_text(token)  # as after a login
        assert run(PUSH, hub.url, home, **variables) == ["True"]
        repo = hub.repositories["model", "alice/tower"]
        assert repo.private
        assert sum(name.endswith(".safetensors") for name in repo.commit("main").files) > 1
        assert (hub.count("xet-token") > 0) == (xet == "1")
