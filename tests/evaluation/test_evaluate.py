"""`vidprism evaluate` on an export: what it writes, prints and puts on the card; bad clips; several processes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small import LABELS, NUM_FRAMES, complaint, files_of, motion_folder, tiny_export

from vidprism_hf import VidPrismForVideoClassification, VidPrismVideoProcessor
from vidprism_hf.cli import main
from vidprism_hf.errors import UserError
from vidprism_hf.evaluation.evaluate import evaluate, refresh_export

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
    found = []
    for how in ("score", "prob"):
        more = ("--data.test_clips=2", "--data.test_crops=3", f"--evaluation.average_clips={how}")
        assert main(["evaluate", *arguments(export, source, *more)]) == 0
        folder = "clips-8x3x2" + "-prob" * (how == "prob")
        found.append(results(tmp_path / "model" / "evaluation" / folder))
    assert found[0]["protocol"]["text"] == "8 frames x 3 crops x 2 clips, logits averaged"
    assert found[1]["protocol"]["text"] == "8 frames x 3 crops x 2 clips, probabilities averaged"
    assert found[0]["calibration"] != found[1]["calibration"]


def test_the_card_is_refreshed_and_a_persons_words_stay(export, source):
    readme = export / "README.md"
    mine = readme.read_bytes().replace(
        b"\n<!-- vidprism:generated begin", b"\nMy words.\n<!-- vidprism:generated begin"
    )
    readme.write_bytes(mine + b"\nMore of mine, \xc3\xa9.\n")
    before = files_of(export)
    found = evaluate(arguments(export, source))
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
    evaluate(arguments(export, source))
    assert files_of(export) == once  # the same again is in the place of the first
    assert [path.name for path in export.parent.iterdir() if path.name.startswith(".")] == []
    # With the Hub's dataset known, its results too; what others have put there stays.
    results = export / ".eval_results" / "org--clips.yaml"
    results.parent.mkdir()
    others = [{"dataset": {"id": "org/clips", "task_id": task}, "value": 0.5} for task in ("theirs", "top1")]
    results.write_text(yaml.safe_dump(others))
    told = refresh_export(dataclasses.replace(found, dataset_id="org/clips"), export)
    assert told == [".eval_results/org--clips.yaml"]
    theirs, ours = yaml.safe_load(results.read_text())
    assert theirs == others[0]
    assert ours["value"] == pytest.approx(found.values["top1"], abs=1e-6)
    assert ours["notes"] == "By vidprism evaluate: 8 frames x 1 crop x 1 clip."
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
    assert "on 5 held-out clips of clips; only 2 were evaluated\n" in capsys.readouterr().out
    assert results(tmp_path / "model" / "evaluation" / "clips-8x1x1")["clips"]["evaluated"] == 2
    assert files_of(export) == before


def test_results_that_cannot_be_written(export, source, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["evaluate", *arguments(export, source, f"--evaluation.output={tmp_path / 'file'}")]) == 1
    assert f"{tmp_path / 'file'}: cannot be written" in complaint(capsys)


def test_help(capsys):
    assert main(["evaluate", "--help"]) == 0
    printed = capsys.readouterr().out
    for words in ("V-JEPA 2", "--data.test_crops", "--evaluation.average_clips score|prob", "--trainer.devices"):
        assert words in printed


@pytest.mark.slow
def test_two_processes_with_uneven_shares_find_the_same(export, source, tmp_path):
    """Five clips, of which the second process has two; a bad one among them."""
    views = ("--data.test_clips=2", "--data.num_workers=1")
    assert main(["evaluate", *arguments(export, source, *views, f"--evaluation.output={tmp_path / 'one'}")]) == 0
    two = arguments(export, source, *views, f"--evaluation.output={tmp_path / 'two'}")
    command = [sys.executable, "-m", "vidprism_hf.cli", "evaluate", *two]
    done = subprocess.run(
        [*command, "--trainer.devices=2", "--trainer.strategy=ddp"],
        cwd=Path(__file__).parents[2],
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
