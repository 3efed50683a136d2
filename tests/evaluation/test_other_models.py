"""Other classifiers of transformers under `vidprism evaluate`: their own processors, frames and labels."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import serve
from small import LABELS, complaint
from transformers import (
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    TimesformerConfig,
    TimesformerVideoProcessor,
    VideoMAEConfig,
    VideoMAEVideoProcessor,
    VivitConfig,
    VivitVideoProcessor,
    VJEPA2Config,
    VJEPA2VideoProcessor,
)
from transformers.image_utils import SizeDict

from vidprism_cli import main
from vidprism_hf.evaluation.labels import matched_labels
from vidprism_hf.evaluation.other_models import OtherProcessor, TestedClassifier
from vidprism_hf.model import decode_video, segment_centers

THEIRS = {0: "Shrinking", 1: "GROWING "}  # in another order and spelling than the data's
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = {"size": {"shortest_edge": 24}, "crop_size": {"height": 16, "width": 16}}
JEPA = {
    "pred_hidden_size": 16,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 1,
    "num_pooler_layers": 1,
    "frames_per_clip": 4,
}
MODELS = {
    "videomae": (
        VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, **SIZES),
        VideoMAEVideoProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.1], **SMALL),
    ),
    "timesformer": (
        TimesformerConfig(image_size=16, patch_size=8, num_frames=3, **SIZES),
        TimesformerVideoProcessor(**SMALL),
    ),
    "vivit": (
        VivitConfig(image_size=16, tubelet_size=[2, 8, 8], num_frames=4, **SIZES),
        VivitVideoProcessor(do_normalize=False, **SMALL),  # maps to -1 and 1 by code of its own
    ),
    "vjepa2": (VJEPA2Config(crop_size=16, patch_size=8, **SIZES, **JEPA), VJEPA2VideoProcessor(crop_size=16)),
}


def saved(kind: str, folder: Path, labels=THEIRS) -> Path:
    config, processor = MODELS[kind]
    torch.manual_seed(0)
    config.id2label = dict(labels)
    config.label2id = {label: index for index, label in labels.items()}
    AutoModelForVideoClassification.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def quiet(source: Path, output: Path) -> list[str]:
    settings = {
        "data.source": source,
        "data.num_workers": 0,
        "data.batch_size": 3,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "evaluation.output": output,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_those_of_its_own_processor(kind, motion_clips, tmp_path, capsys):
    folder = saved(kind, tmp_path / "model")
    assert main(["evaluate", str(folder), *quiet(motion_clips, tmp_path)]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    model, processor = (auto.from_pretrained(folder) for auto in (AutoModelForVideoClassification, AutoVideoProcessor))
    frames = MODELS[kind][0].frames_per_clip if kind == "vjepa2" else MODELS[kind][0].num_frames
    best, right = [], []
    for label in LABELS:
        for path in sorted((motion_clips / "val" / label).iterdir()):
            clip, _ = decode_video(str(path), lambda total: segment_centers(total, frames))
            with torch.no_grad():
                logits = model.eval()(**processor(clip, do_sample_frames=False, return_tensors="pt")).logits
            best.append(logits.softmax(-1).max().item())
            right.append(THEIRS[logits.argmax().item()].strip().lower() == label)
    assert found["calibration"]["mean_confidence"] == pytest.approx(np.mean(best), abs=2e-6)
    assert found["metrics"]["top1"]["value"] == np.mean(right)
    assert found["protocol"]["frames"] == frames
    assert found["confusion"]["labels"] == list(LABELS)
    assert found["compute"]["giga_macs"] > 0
    assert found["compute"]["million_parameters"] == pytest.approx(model.num_parameters() / 1e6, abs=1e-6)
    assert not (folder / "README.md").exists()
    printed = capsys.readouterr().out
    assert "the paper's" not in printed
    assert "frames are from the whole video (data.frame_stride is null)" in printed


def test_several_views(motion_clips, tmp_path, capsys):
    folder = saved("videomae", tmp_path / "model")
    views = ("--data.test_clips=2", "--data.test_crops=3", "--data.frame_stride=3", "--model.num_frames=4")
    assert main(["evaluate", str(folder), *quiet(motion_clips, tmp_path), *views]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    protocol = {"frames": 4, "crops": 3, "clips": 2, "frame_stride": 3, "average_clips": "score"}
    assert found["protocol"].items() >= protocol.items()
    assert found["clips"]["used"] == 4
    assert "the whole video" not in capsys.readouterr().out


def test_each_clip_keeps_its_views_and_each_class_its_score():
    """Three classes in a cycle, whose order and its inverse differ; four views of two clips, all of them others."""
    config = copy.deepcopy(MODELS["videomae"][0])
    config.id2label = {0: "a", 1: "b", 2: "c"}
    torch.manual_seed(1)
    model = AutoModelForVideoClassification.from_config(config).eval()
    order = matched_labels("m", config.id2label, {0: "C", 1: "A", 2: "B"})
    views, module = torch.randn(2, 4, 4, 3, 16, 16), TestedClassifier(model, order)
    with torch.no_grad():
        several = module.test_step({"pixel_values_videos": views}, 0)["logits"]
        single = module.test_step({"pixel_values_videos": views[:, 0]}, 0)["logits"]
        alone = [[model(pixel_values=view[None]).logits[0] for view in clip] for clip in views]
    expected = torch.stack([torch.stack([torch.stack([row[2], row[0], row[1]]) for row in clip]) for clip in alone])
    assert torch.allclose(several, expected, atol=1e-5)
    assert torch.allclose(single, expected[:, :1], atol=1e-5)
    assert expected.flatten().unique().numel() == expected.numel()


def test_crops_reach_both_ends():
    """A picture whose left is black and right is white, 48 x 24 when it is resized."""
    from vidprism_hf.data.reading.transforms import test_views as crops_of

    processor = OtherProcessor(MODELS["videomae"][1], 2)
    frames = np.zeros((2, 24, 48, 3), dtype=np.uint8)
    frames[:, :, 24:] = 255
    left, centre, right = crops_of(frames, processor, 3)
    assert left.shape == (2, 3, 16, 16)
    assert (left.max(), right.min()) == (0, 255)
    assert centre[..., :7].max() == 0
    assert centre[..., 9:].min() == 255
    assert processor.center_crop(left, SizeDict(height=8, width=4)).shape == (2, 3, 8, 4)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (["growing", "shrinking", "x"], "only in the model: x"),
        (["growing", "b", "c", "d", "e"], "only in the model: b, c, d and 1 more; only in the data: shrinking"),
        (["growing", "shrinking", "Grow-ing"], "the same but for case, blanks and signs: growing"),
    ],
)
def test_labels_that_do_not_match(theirs, said):
    with pytest.raises(ValueError, match=f"m: its labels are not the data's .{said}"):
        matched_labels("m", dict(enumerate(theirs)), dict(enumerate(LABELS)))


def test_labels_match_by_letters_and_digits():
    ours = {0: "ApplyEyeMakeup", 1: "wave2", 2: "Straße", 3: "+"}
    assert matched_labels("m", {0: "+", 1: "WAVE 2", 2: "strasse", 3: "apply eye makeup"}, ours) == [3, 1, 2, 0]
    # A cycle, whose inverse is another.
    assert matched_labels("m", {0: "C", 1: "A", 2: "B"}, {0: "a", 1: "b", 2: "c"}) == [1, 2, 0]


def test_labels_that_signs_alone_tell_apart_match_themselves():
    assert matched_labels("m", {0: "run", 1: "Run", 2: "r-un"}, {0: "r-un", 1: "run", 2: "Run"}) == [2, 0, 1]


def test_refusals(motion_clips, tmp_path, capsys):
    folder = saved("videomae", tmp_path / "model", {0: "run", 1: "walk"})
    assert main(["evaluate", str(folder), *quiet(motion_clips, tmp_path)]) == 1
    said = complaint(capsys)
    assert "only in the model: run, walk; only in the data: growing, shrinking" in said
    assert main(["evaluate", str(tmp_path / "nowhere"), *quiet(motion_clips, tmp_path)]) == 1
    assert "nowhere: cannot be loaded" in complaint(capsys)
    assert main(["evaluate", str(folder), *quiet(motion_clips, tmp_path), "--model.num_frames", "8"]) == 1
    assert "model.num_frames=8" in (said := complaint(capsys))
    assert "model takes 4 frames" in said
    content = json.loads((folder / "config.json").read_text())
    for other, said in (
        ({"model_type": "clip"}, "model: cannot be evaluated"),
        ({"hidden_size": "x"}, "Field 'hidden_size' expected int"),
        ({"num_frames": None}, "Field 'num_frames' expected int"),
    ):
        (folder / "config.json").write_text(json.dumps(content | other))
        assert main(["evaluate", str(folder), *quiet(motion_clips, tmp_path)]) == 1
        assert said in complaint(capsys)
    saved("videomae", folder)
    content = json.loads((folder / "video_preprocessor_config.json").read_text())
    content["crop_size"] = {"height": 24, "width": 24}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(content))
    assert main(["evaluate", str(folder), *quiet(motion_clips, tmp_path)]) == 1
    assert "the model cannot take 4 frames of 24 x 24, which its processor makes" in complaint(capsys)
    assert not (tmp_path / "evaluation.json").exists()


@pytest.mark.slow
def test_one_of_the_hub(motion_clips, tmp_path):
    folder = saved("videomae", tmp_path / "model")
    # As older repositories have it: nothing but the image processor's file.
    old = json.loads((folder / "video_preprocessor_config.json").read_text())
    old["feature_extractor_type"] = "VideoMAEFeatureExtractor"
    del old["video_processor_type"]
    (folder / "video_preprocessor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    assert main(["evaluate", str(folder), *quiet(motion_clips, tmp_path / "local")]) == 0
    settings = quiet(motion_clips, tmp_path)[:-1]  # without a place for the results
    command = [sys.executable, "-m", "vidprism_hf", "evaluate", "org/videomae-small", *settings]
    with serve({"org/videomae-small": folder}) as endpoint:
        env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = str(Path(__file__).parents[2])
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "runs").glob("org--videomae-small-*/evaluation/*/evaluation.json")
    one, two = (json.loads(path.read_text()) for path in (tmp_path / "local" / "evaluation.json", found))
    assert two.pop("model") == "org/videomae-small"
    assert one.pop("model") == str(folder)
    assert found.parts[-4] == f"org--videomae-small-{two.pop('commit')[:12]}"
    assert one.pop("commit") is None
    assert one == two
