"""An exported folder in clean processes: with the package imported, and where it cannot be imported."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForVideoClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    pipeline,
)

from vidprism_cli import main
from vidprism_hf import VidPrismForVideoClassification, VidPrismModel

ROOT = Path(__file__).resolve().parents[1]

IMPORTED = "import vidprism_hf\noptions = {}\n"
# Nothing named vidprism_hf can be found, installed or not.
BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vidprism_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
options = {"trust_remote_code": True}
"""
SCRIPT = """
import json, sys
from transformers import (
    AutoConfig, AutoModel, AutoModelForVideoClassification, AutoVideoProcessor, pipeline
)

folder, clip = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, **options)
classes = [type(config).__name__]
for auto in (AutoModel, AutoModelForVideoClassification, AutoVideoProcessor):
    classes.append(type(auto.from_pretrained(folder, **options)).__name__)
classify = pipeline("video-classification", model=folder, **options)
found = classify(clip)
print(json.dumps({"classes": classes, "found": found, "imported": "vidprism_hf" in sys.modules}))
"""


def run(tmp_path, preamble: str, folder, clip) -> tuple[dict, str]:
    """What the script found, and its stderr."""
    return execute(tmp_path, preamble, SCRIPT, tmp_path, str(folder), str(clip))


def execute(tmp_path, preamble: str, script: str, cwd, *arguments: str) -> tuple[dict, str]:
    """What a script prints last, in a clean process, and its stderr."""
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),  # a clean cache of dynamic modules too
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT) if preamble is IMPORTED else "",
    }
    env.pop("HF_MODULES_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", preamble + script, *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture
def clip(motion_clips):
    return motion_clips / "val" / "growing" / "0.mp4"


@pytest.mark.slow
@pytest.mark.parametrize("preamble", [IMPORTED, BLOCKED], ids=["imported", "trust_remote_code"])
def test_clean_process(tmp_path, capsys, exported, clip, preamble):
    result, stderr = run(tmp_path, preamble, exported, clip)
    assert result["imported"] is (preamble is IMPORTED)
    assert result["classes"] == [
        "VidPrismConfig",
        "VidPrismModel",
        "VidPrismForVideoClassification",
        "VidPrismVideoProcessor",
    ]
    assert main(["predict", str(exported), str(clip), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert [each["label"] for each in result["found"]] == ours["labels"]
    assert [each["score"] for each in result["found"]] == pytest.approx(ours["scores"], abs=1e-5)
    assert "is not supported for" not in stderr  # what the pipeline logs of a class it does not know


@pytest.mark.slow
@pytest.mark.parametrize("preamble", [IMPORTED, BLOCKED], ids=["imported", "trust_remote_code"])
def test_snippet_of_the_card_runs_in_the_folder(tmp_path, exported, clip, preamble):
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    shutil.copy(clip, folder / "clip.mp4")
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    snippet = f"import json\n{snippet.rstrip()}".replace('print(classify("clip.mp4"))', 'found = classify("clip.mp4")')
    found, _ = execute(tmp_path, preamble, snippet + "\nprint(json.dumps(found))", folder)
    assert {each["label"] for each in found} == {"growing", "shrinking"}


def test_pipeline_in_this_process(exported, clip, capsys):
    found = pipeline("video-classification", model=str(exported))(str(clip))
    assert main(["predict", str(exported), str(clip), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert [(each["label"], each["score"]) for each in found] == [
        (label, pytest.approx(score, abs=1e-5)) for label, score in zip(ours["labels"], ours["scores"], strict=True)
    ]


def test_auto_classes_build_from_a_configuration(exported):
    config = AutoConfig.from_pretrained(exported)
    assert type(AutoModel.from_config(config)) is VidPrismModel
    assert type(AutoModelForVideoClassification.from_config(config)) is VidPrismForVideoClassification


def test_other_models_load_as_before(tmp_path):
    sizes = {"image_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = VideoMAEConfig(**sizes, intermediate_size=16, patch_size=8, num_frames=4)
    VideoMAEForVideoClassification(config).save_pretrained(tmp_path / "other")
    other = AutoModelForVideoClassification.from_pretrained(tmp_path / "other")
    assert type(other) is VideoMAEForVideoClassification
    # The whole table still resolves, ours beside transformers' own.
    classes = dict(AutoModelForVideoClassification._model_mapping.items())
    assert VidPrismForVideoClassification in classes.values()
    assert VideoMAEForVideoClassification in classes.values()
