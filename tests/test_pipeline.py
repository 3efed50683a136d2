"""An exported folder in clean processes: with the package imported, and where it cannot be imported."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small import tiny_model, tiny_processor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForVideoClassification,
    Trainer,
    TrainingArguments,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    pipeline,
)

from vidprism_hf import VidPrismForVideoClassification, VidPrismModel
from vidprism_hf.cli import main

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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each way to save a model from Python, with its processor; it has the labels of the demo."""
    root = tmp_path_factory.mktemp("saved")
    model, processor = tiny_model(), tiny_processor()
    model.save_pretrained(root / "save_pretrained")
    processor.save_pretrained(root / "save_pretrained")
    Trainer(model, TrainingArguments(root / "runs", report_to=[], use_cpu=True), processing_class=processor).save_model(
        root / "trainer"
    )
    pipeline("video-classification", model=str(root / "trainer")).save_pretrained(root / "pipeline")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("way", ["save_pretrained", "trainer", "pipeline"])
def test_models_saved_from_python_need_no_package(tmp_path, saved, clip, way):
    names = {path.name for path in (saved / way).iterdir()}
    assert {path.name for path in (ROOT / "vidprism_hf" / "model").glob("*_vidprism.py")} <= names
    result, _ = run(tmp_path, BLOCKED, saved / way, clip)
    assert result["classes"][1:3] == ["VidPrismModel", "VidPrismForVideoClassification"]
    found = pipeline("video-classification", model=str(saved / "save_pretrained"))(str(clip))
    assert [each["label"] for each in result["found"]] == [each["label"] for each in found]
    assert [each["score"] for each in result["found"]] == pytest.approx([each["score"] for each in found], abs=1e-5)


@pytest.mark.slow
def test_code_that_came_with_a_model_is_saved_with_it(tmp_path, exported, clip):
    """By a reader without the package, who changes a model and hands it on."""
    script = """
import json, sys
from transformers import AutoModelForVideoClassification, pipeline

folder, again, clip = sys.argv[1:]
pipeline("video-classification", model=folder, **options).save_pretrained(again)
"""
    script += "found = pipeline('video-classification', model=again, **options)(clip)\nprint(json.dumps(found))"
    found, _ = execute(tmp_path, BLOCKED, script, tmp_path, str(exported), str(tmp_path / "again"), str(clip))
    assert {each["label"] for each in found} == {"growing", "shrinking"}


def test_batches_of_a_pipeline(exported, motion_clips):
    clips = sorted(str(path) for path in (motion_clips / "val").rglob("*.mp4"))[:3]
    classify = pipeline("video-classification", model=str(exported))
    expected = [classify(clip) for clip in clips]
    classify.feature_extractor = classify.video_processor  # the line of the model's docstring
    for one, alone in zip(classify(clips, batch_size=2), expected, strict=True):
        assert [each["label"] for each in one] == [each["label"] for each in alone]
        assert [each["score"] for each in one] == pytest.approx([each["score"] for each in alone], abs=1e-5)


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
