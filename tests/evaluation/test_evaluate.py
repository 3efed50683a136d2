"""`vidprism evaluate` on an export: what it writes, prints and puts on the card; bad clips; several processes."""

import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small import LABELS, NUM_FRAMES, complaint, files_of, motion_folder, tiny_export
from stalled_files import stalled, wait_for_reader
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEVideoProcessor

from vidprism_cli import main
from vidprism_hf import VideoDataModule, VidPrismForVideoClassification, VidPrismVideoProcessor
from vidprism_hf.data import normalize_clips
from vidprism_hf.data.reading.transforms import test_views as crops_of
from vidprism_hf.errors import UserError
from vidprism_hf.evaluation.evaluate import evaluate, refresh_export
from vidprism_hf.model import decode_video, segment_centers

pytest_plugins = ["hub_server.fixtures"]

ROOT = Path(__file__).parents[2]
BROKEN = "val/shrinking/1.mp4"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Five held-out clips, of which one is no video."""
    root = motion_folder(tmp_path_factory.mktemp("evaluated") / "clips", train=1)
    shutil.copy(root / "train" / "growing" / "0.mp4", root / "val" / "growing" / "2.mp4")
    (root / BROKEN).write_bytes(b"no video")
    return root


@pytest.fixture
def export(tmp_path):
    return tiny_export(tmp_path / "model" / "export")


def arguments(export: Path, source: Path, *more: str) -> list[str]:
    settings = {
        "data.source": source,
        "data.num_workers": 0,
        "data.batch_size": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    }
    return [str(export), *(f"--{name}={value}" for name, value in settings.items()), *more]


def results(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def test_results(export, source, tmp_path, capsys):
    assert main(["evaluate", *arguments(export, source)]) == 0
    folder = tmp_path / "model" / "evaluation" / "clips-8x1x1"
    assert (folder / "confusion.png").read_bytes().startswith(b"\x89PNG")
    found = results(folder)
    assert found["clips"]["expected"] == found["clips"]["evaluated"] == 5
    assert found["clips"]["used"] == 4
    (bad,) = found["clips"]["unreadable"]
    assert (bad["name"], bad["label"]) == (BROKEN, "shrinking")
    # Against the model itself, one clip at a time.
    model = VidPrismForVideoClassification.from_pretrained(export)
    processor, counts = VidPrismVideoProcessor.from_pretrained(export), [[0, 0], [0, 0]]
    for path in sorted((source / "val").rglob("*.mp4")):
        if str(path.relative_to(source)) != BROKEN:
            with torch.no_grad():
                best = model(**processor(str(path), return_tensors="pt")).logits.argmax().item()
            counts[LABELS.index(path.parent.name)][best] += 1
    assert found["confusion"] == {"labels": list(LABELS), "counts": counts}
    shares = [counts[0][0] / 3, counts[1][1] / 2]
    assert found["metrics"]["top1"]["value"] == pytest.approx((counts[0][0] + counts[1][1]) / 5)
    assert found["metrics"]["mean_class"]["value"] == pytest.approx(sum(shares) / 2, abs=1e-6)
    assert [row["top1"] for row in found["per_class"]] == pytest.approx(shares, abs=1e-6)
    assert [row["unreadable"] for row in found["per_class"]] == [0, 1]
    printed = capsys.readouterr().out
    assert f"{export} on 4 of 5 held-out clips (1 undecodable) of clips" in printed
    for words in (BROKEN, "8 frames x 1 crop x 1 clip", "mean_class", "95 % interval", "GMACs a view", str(folder)):
        assert words in printed


def test_views_and_their_average(export, source, tmp_path):
    model, processor = (
        auto.from_pretrained(export) for auto in (VidPrismForVideoClassification, VidPrismVideoProcessor)
    )
    logits = []  # of the six views of each readable clip
    for path in sorted((source / "val").rglob("*.mp4")):
        if str(path.relative_to(source)) != BROKEN:
            video, _ = decode_video(str(path), lambda total: segment_centers(total, 2 * NUM_FRAMES))
            views = torch.cat([crops_of(video[start::2], processor, 3) for start in (0, 1)])
            with torch.no_grad():
                logits.append(model(normalize_clips(views, processor)).logits)
    logits = torch.stack(logits)
    sure = {"score": logits.mean(1).softmax(-1), "prob": logits.softmax(-1).mean(1)}
    found = []
    for how in ("score", "prob"):
        more = ("--data.test_clips=2", "--data.test_crops=3", f"--evaluation.average_clips={how}")
        assert main(["evaluate", *arguments(export, source, *more)]) == 0
        folder = "clips-8x3x2" + "-prob" * (how == "prob")
        found.append(results(tmp_path / "model" / "evaluation" / folder))
    assert found[0]["protocol"]["text"] == "8 frames x 3 crops x 2 clips, logits averaged"
    assert found[1]["protocol"]["text"] == "8 frames x 3 crops x 2 clips, probabilities averaged"
    for one, shares in zip(found, sure.values(), strict=True):
        assert one["calibration"]["mean_confidence"] == pytest.approx(shares.amax(-1).mean().item(), abs=2e-6)
    assert found[0]["calibration"] != found[1]["calibration"]


def test_number_of_frames(export, source, tmp_path, capsys):
    """One that is typed is meant; the recipe's is the training's."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {num_frames: 6}\n")
    for typed, frames in (((), NUM_FRAMES), (("--model.num_frames", "4"), 4)):
        here = f"--evaluation.output={tmp_path / str(frames)}"
        assert main(["evaluate", *arguments(export, source, f"--config={recipe}", here, *typed)]) == 0
        assert results(tmp_path / str(frames))["protocol"]["frames"] == frames
    learned = tiny_export(tmp_path / "learned", time_position="learned")
    assert main(["evaluate", *arguments(learned, source, "--model.num_frames=4")]) == 1
    assert "has learned positions for 8 frames; set model.num_frames to that, not 4" in complaint(capsys)
    assert not (tmp_path / "evaluation").exists()


def test_classes_in_another_order(source, tmp_path):
    """And in another spelling, as other models' may be."""
    rows = []
    for name, labels in (("same", LABELS), ("other", ("Shrinking", "GROWING"))):
        folder, here = tiny_export(tmp_path / name, labels=labels), tmp_path / f"{name}-found"
        assert main(["evaluate", *arguments(folder, source, f"--evaluation.output={here}")]) == 0
        rows.append(results(here)["confusion"])
    assert [found["labels"] for found in rows] == [list(LABELS)] * 2
    assert rows[0]["counts"] == [row[::-1] for row in rows[1]["counts"]]  # the same weights under exchanged names
    assert rows[0]["counts"] != rows[1]["counts"]


def test_clips_that_a_list_names_and_the_disk_lacks(export, source, tmp_path):
    (tmp_path / "train.txt").write_text("train/growing/0.mp4 growing\ntrain/shrinking/0.mp4 shrinking\n")
    (tmp_path / "val.txt").write_text("val/growing/0.mp4 growing\nval/growing/gone.mp4 growing\n")
    lists = (f"--data.train_list={tmp_path / 'train.txt'}", f"--data.val_list={tmp_path / 'val.txt'}")
    more = (*lists, "--data.allow_missing=true", f"--evaluation.output={tmp_path}")
    assert main(["evaluate", *arguments(export, source, *more)]) == 0
    clips = results(tmp_path)["clips"]
    assert clips["missing"] == ["val/growing/gone.mp4"]
    assert (clips["expected"], clips["used"]) == (2, 1)


def test_the_card_is_refreshed_and_a_persons_words_stay(export, source):
    readme = export / "README.md"
    mine = readme.read_bytes().replace(
        b"\n<!-- vidprism:generated begin", b"\nMy words.\n<!-- vidprism:generated begin"
    )
    readme.write_bytes(mine + b"\nMore of mine, \xc3\xa9.\n")
    before = files_of(export)
    data = VideoDataModule(str(source), batch_size=2, num_workers=0)
    found = evaluate(str(export), data, trainer={"accelerator": "cpu"})
    once = files_of(export)
    assert {name for name in once if once[name] != before.get(name)} == {"README.md"}
    text = once["README.md"].decode()
    assert "\nMy words.\n<!--" in text
    assert text.endswith("\nMore of mine, é.\n")
    assert "### On clips (the source's own split), 8 frames x 1 crop x 1 clip\n" in text
    assert "on 4 of 5 held-out clips (1 undecodable)" in text
    low, high = found.intervals["mean_class"]
    assert f"| mean_class | {found.values['mean_class']:.4f} | {low:.4f} to {high:.4f} | 0.5000 |" in text
    assert "<summary>By class</summary>" in text
    evaluate(str(export), data, trainer={"accelerator": "cpu"})
    assert files_of(export) == once  # the same again is in the place of the first
    assert [path.name for path in export.parent.iterdir() if path.name.startswith(".")] == []
    # With the Hub's dataset known, its results too; what others have put there stays.
    results = export / ".eval_results" / "org--clips.yaml"
    results.parent.mkdir()
    others = [{"dataset": {"id": "org/clips", "task_id": "theirs"}, "value": 0.5}]
    results.write_text(yaml.safe_dump(others))
    told = refresh_export(dataclasses.replace(found, dataset_id="org/clips"), export)
    assert told == [".eval_results/org--clips.yaml"]
    theirs, ours = yaml.safe_load(results.read_text())
    assert theirs == others[0]
    assert ours["value"] == pytest.approx(found.values["top1"], abs=1e-6)
    assert ours["notes"] == (
        "8 frames x 1 crop x 1 clip; the source's own split. By vidprism evaluate, on 4 of 5 held-out clips "
        "(1 undecodable). A clip that cannot be decoded counts as wrong. "
        "ece and the confusion matrix are of the readable clips."
    )
    for broken in ("a: 1", "- 1", "[", "\xff"):
        results.write_bytes(broken.encode("latin-1"))
        with pytest.raises(UserError, match="its card cannot be refreshed"):
            refresh_export(dataclasses.replace(found, dataset_id="org/clips"), export)
        assert results.read_bytes() == broken.encode("latin-1")


def test_what_is_a_persons_alone_stays(export, source, capsys):
    (export / "README.md").write_text("# Mine\n")
    assert main(["evaluate", *arguments(export, source)]) == 0
    assert (export / "README.md").read_text() == "# Mine\n"
    assert "README.md: left as it is" in capsys.readouterr().out
    (export / "README.md").unlink()
    before = files_of(export)
    assert main(["evaluate", *arguments(export, source)]) == 0
    assert files_of(export) == before


def test_a_part_of_the_clips_is_not_for_the_card(export, source, tmp_path, capsys):
    before = files_of(export)
    assert main(["evaluate", *arguments(export, source, "--trainer.limit_test_batches=1")]) == 0
    assert "\nOnly 2 of the 5 held-out clips were evaluated.\n" in capsys.readouterr().out
    assert results(tmp_path / "model" / "evaluation" / "clips-8x1x1-partial")["clips"]["evaluated"] == 2
    assert files_of(export) == before


@pytest.fixture
def our_hub(hub, tmp_path, monkeypatch):
    """The one that models are loaded from."""
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    names = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "cache")}
    for name, value in (names | {"HF_HUB_OFFLINE": False}).items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    return hub


def small_videomae(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = VideoMAEConfig(
        image_size=16,
        patch_size=8,
        num_frames=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        id2label=dict(enumerate(LABELS)),
    )
    VideoMAEForVideoClassification(config).save_pretrained(folder)
    processor = VideoMAEVideoProcessor(size={"shortest_edge": 24}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [lambda folder, seed: tiny_export(folder, seed=seed), small_videomae])
def test_a_revision_of_a_model_on_the_hub(make, source, our_hub, tmp_path, monkeypatch, capsys):
    """Each commit has records of its own, which are those of the same model in a folder."""
    monkeypatch.chdir(tmp_path)
    folders = [make(tmp_path / name, seed) for seed, name in enumerate(("first", "second"))]
    found = []
    for folder in folders:
        repository = our_hub.add_model("org/model", folder)
        assert main(["evaluate", *arguments(folder, source, f"--evaluation.output={folder.name}-found")]) == 0
        found.append(results(tmp_path / f"{folder.name}-found"))
        assert (found[-1].pop("model"), found[-1].pop("commit")) == (str(folder), None)
    assert found[0]["calibration"] != found[1]["calibration"]
    newest = repository.commit("main")
    first, second = newest.parent, newest.oid
    capsys.readouterr()
    for options, commit, expected, offline in (
        (["--revision", first], first, found[0], False),
        (["--revision=main"], second, found[1], False),
        ([], second, found[1], False),
        (["--revision", first], first, found[0], True),  # from the cache, as on a node without a network
        ([], second, found[1], True),
    ):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        assert main(["evaluate", *arguments("org/model", source, *options)]) == 0
        assert f"org/model at {commit[:12]} on 4 of 5 held-out clips" in capsys.readouterr().out
        (kept,) = Path("runs", f"org--model-{commit[:12]}", "evaluation").iterdir()
        record = results(kept)
        assert (record.pop("model"), record.pop("commit")) == ("org/model", commit)
        assert record == expected
    assert len(list(Path("runs").iterdir())) == 2  # the same commit in the same place
    output = f"--evaluation.output={kept}"
    assert main(["evaluate", *arguments("org/model", source, output, "--revision", first)]) == 1
    assert "evaluation.json: is that of another commit" in complaint(capsys)


def test_a_revision_that_is_not_there(export, source, our_hub, capsys):
    our_hub.add_model("org/model", export)
    for name, options, said in (
        ("org/model", ["--revision", "none"], "org/model at none: cannot be loaded ("),
        ("org/model", ["--revision"], "--revision: is empty"),
        (export, ["--revision", "main"], f"--revision main: {export} is a folder"),
    ):
        assert main(["evaluate", *arguments(name, source, *options)]) == 1
        assert complaint(capsys).startswith(f"vidprism evaluate: {said}")


@pytest.mark.parametrize(("value", "said"), [(math.nan, "holds values that are not finite"), (3e38, "the scores of ")])
def test_scores_that_are_no_numbers_are_no_result(export, source, capsys, value, said):
    state = load_file(export / "model.safetensors")
    for name in ("classifier.weight", "vidprism.temporal_model.readout.norm.weight"):
        state[name].fill_(value)
    save_file(state, export / "model.safetensors", metadata={"format": "pt"})
    before = (export / "README.md").read_bytes()
    assert main(["evaluate", *arguments(export, source)]) == 1
    message = complaint(capsys)
    assert said in message
    assert str(export) in message
    assert (export / "README.md").read_bytes() == before


def test_the_makefiles_folder_of_results(export, source, tmp_path, monkeypatch):
    """OUT is the run's folder elsewhere; an evaluation makes no run."""
    name, *settings = arguments(export, source)
    monkeypatch.chdir(ROOT)
    given = [f"MODEL={name}", f"OUT={tmp_path / 'the results'}", f"ARGS={shlex.join(settings)}"]
    printed = subprocess.run(["make", "-n", "evaluate", *given], capture_output=True, text=True, check=True).stdout
    command = shlex.split(printed.splitlines()[-1])
    assert main(command[command.index("evaluate") :]) == 0
    assert {path.name for path in (tmp_path / "the results").iterdir()} == {"evaluation.json", "confusion.png"}
    assert results(tmp_path / "the results")["model"] == name


def test_results_that_cannot_be_written(export, source, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["evaluate", *arguments(export, source, f"--evaluation.output={tmp_path / 'file'}")]) == 1
    assert f"{tmp_path / 'file'}: cannot be written" in complaint(capsys)


def test_help(capsys):
    assert main(["evaluate", "--help"]) == 0
    printed = capsys.readouterr().out
    options = "--revision", "--data.test_crops", "--evaluation.average_clips score|prob", "--trainer.devices"
    for words in ("V-JEPA 2", *options):
        assert words in printed


@pytest.mark.slow
def test_two_processes_with_uneven_shares_find_the_same(export, source, tmp_path):
    """Five clips, of which the second process has two; a bad one among them."""
    views = ("--data.test_clips=2", "--data.num_workers=1")
    assert main(["evaluate", *arguments(export, source, *views, f"--evaluation.output={tmp_path / 'one'}")]) == 0
    two = arguments(export, source, *views, f"--evaluation.output={tmp_path / 'two'}")
    command = [sys.executable, "-m", "vidprism_hf", "evaluate", *two]
    done = subprocess.run(
        [*command, "--trainer.devices=2", "--trainer.strategy=ddp"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DISTRIBUTED" in done.stderr.upper()
    assert done.stdout.count("on 4 of 5 held-out clips") == 1  # the first process alone prints
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert results(tmp_path / "two")["protocol"]["frames"] == NUM_FRAMES


@pytest.mark.slow
def test_a_signal_ends_processes_that_wait_for_each_other(export, source, tmp_path):
    """The first has come to the end of its share, the second to a clip that nobody goes on sending."""
    root = shutil.copytree(source, tmp_path / "clips")
    slow = root / "val" / "growing" / "1.mp4"
    more = ("--data.num_workers=1", "--data.clip_time_limit=null", "--trainer.enable_progress_bar=true")
    settings = arguments(export, root, *more)
    command = [sys.executable, "-m", "vidprism_hf", "evaluate", *settings]
    clip = slow.read_bytes()
    with (
        stalled(slow, clip) as lease,
        subprocess.Popen(
            [*command, "--trainer.devices=2", "--trainer.strategy=ddp"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as first,
    ):
        try:
            said = b""
            while b"100%" not in said.rpartition(b"Testing")[2]:
                said += (more := os.read(first.stdout.fileno(), 1 << 16))
                assert more, said.decode()
            wait_for_reader(lease)
            time.sleep(1)  # until the first one waits
            os.killpg(first.pid, signal.SIGTERM)
            first.communicate(timeout=30)  # until nobody can write to it: all processes have ended, loaders too
        finally:
            with suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)
    # By the signal, or by the loss of a loader or a rank that the signal has ended already.
    assert first.returncode in (-signal.SIGTERM, 1)
    assert not list((tmp_path / "model").rglob("evaluation.json"))
