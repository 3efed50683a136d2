"""`vidprism predict` on many files: their order, batches, decoding processes, and what cannot be decoded."""

import io
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from small import LABELS, complaint, tiny_export

from vidprism_cli import main
from vidprism_hf.evaluation.predict import default_workers, list_files, load, predict

pytest_plugins = ["hub_server.fixtures"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def files(motion_clips, tmp_path) -> list[str]:
    """Seven clips, the second, fifth and sixth of which cannot be decoded."""
    clips = sorted(str(path) for path in motion_clips.rglob("*.mp4"))[:4]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"this is not a video" * 100)
    missing = str(tmp_path / "missing.mp4")
    return [clips[0], str(broken), clips[1], clips[2], missing, str(broken), clips[3]]


BAD = (1, 4, 5)


@pytest.fixture(scope="module")
def model_and_processor(exported):
    return load(str(exported))


def test_scores_are_the_models_own_whatever_the_batch_size(model_and_processor, files):
    model, processor = model_and_processor
    expected = {}
    for file in (file for index, file in enumerate(files) if index not in BAD):
        pixels = processor(file, num_frames=model.config.num_frames, return_tensors="pt")["pixel_values_videos"]
        with torch.no_grad():
            expected[file] = model(pixels).logits[0].softmax(-1)
    for batch_size, workers in ((1, 0), (2, 0), (2, 2), (3, 1), (8, 0)):
        found = list(predict(model, processor, files, batch_size=batch_size, workers=workers))
        assert [prediction.file for prediction in found] == files
        assert [index for index, prediction in enumerate(found) if prediction.error] == list(BAD)
        for prediction in found:
            if prediction.error:
                assert prediction.error.startswith(f"{prediction.file}: ")
                assert prediction.labels == prediction.scores == []
                continue
            by_label = [expected[prediction.file][model.config.label2id[label]] for label in prediction.labels]
            assert prediction.scores == pytest.approx([float(score) for score in by_label], abs=1e-5)
            assert prediction.scores == sorted(prediction.scores, reverse=True)


def test_no_file_can_be_decoded(model_and_processor, files):
    bad = [files[index] for index in BAD]
    assert all(prediction.error for prediction in predict(*model_and_processor, bad, batch_size=2))


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_bad_files_are_named_and_counted(capsys, exported, files, options):
    arguments = ["predict", str(exported), *files, "--batch-size", "2", "--workers", "0", *options]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "3 of 7 files could not be decoded"
    if options:
        assert [json.loads(line)["file"] for line in captured.out.splitlines()] == files
    else:
        assert captured.err.count("vidprism predict: ") == len(BAD)
        assert captured.out.count("growing") == captured.out.count("shrinking") >= len(files) - len(BAD)


def test_folders_and_standard_input(monkeypatch, capsys, exported, motion_clips, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(motion_clips / "val", folder)
    (folder / "notes.txt").write_text("no video")
    shutil.copytree(folder / "growing", folder / ".hidden")
    below = [str(folder / label / f"{number}.mp4") for label in ("growing", "shrinking") for number in (0, 1)]
    assert list_files([str(folder)]) == below
    other = str(motion_clips / "train" / "growing" / "0.mp4")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*below[:2], "", below[3]]) + "\n"))
    assert main(["predict", str(exported), other, "-", str(folder), "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["file"] for each in printed] == [other, *below[:2], below[3], *below]
    assert printed[1] | {"scores": None} == printed[4] | {"scores": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--workers", "-1"], "--workers -1: must be at least 0"),
        (["--top-k", "0"], "--top-k 0: must be at least 1"),
        (["--device", "abacus"], "--device abacus: "),
        (["-"], "-: holds no videos"),
        (["empty"], "empty: holds no videos"),
    ],
)
def test_bad_arguments(monkeypatch, tmp_path, capsys, exported, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["predict", str(exported), "clip.mp4", *arguments]) == 1
    assert message in complaint(capsys)


def test_a_revision(monkeypatch, tmp_path, capsys, hub, exported, motion_clips):
    """Model and processor come from the branch or commit that is named."""
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    names = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "cache")}
    for name, value in (names | {"HF_HUB_OFFLINE": False}).items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    other = tiny_export(tmp_path / "other", labels=("up", "down", "left"))
    repository = hub.add_model("org/model", exported)
    hub.add_model("org/model", other, revision="other")
    first = repository.commit("main").oid
    hub.add_model("org/model", other)
    clip = str(motion_clips / "val" / "growing" / "0.mp4")

    def labels(*options):
        assert main(["predict", "org/model", clip, "--json", *options]) == 0
        return set(json.loads(capsys.readouterr().out)["labels"])

    assert labels() == labels("--revision", "other") == {"up", "down", "left"}
    assert labels("--revision", first) == set(LABELS)
    assert main(["predict", "org/model", clip, "--revision", "none"]) == 1
    assert complaint(capsys).startswith("vidprism predict: org/model at none: cannot be loaded (")
    assert main(["predict", str(exported), clip, "--revision", "main"]) == 1
    assert f"--revision main: {exported} is a folder" in complaint(capsys)


def test_workers_without_being_asked():
    assert default_workers(8, 8) == 0
    assert default_workers(9, 8) in (1, 2)
    assert 1 <= default_workers(1000, 8) <= 8
