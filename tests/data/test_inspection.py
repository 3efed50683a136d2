"""`vidprism data check` and `show`: every clip is accounted for, whatever it does to the process that reads it."""

import csv
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from clips import greys, render
from PIL import Image
from small import LABELS, complaint, files_of
from stalled_files import stalled, wait_for_reader

from vidprism_hf.cli import main
from vidprism_hf.data import FileTable
from vidprism_hf.data.inspection import (
    LABEL_WIDTH,
    SHEET_FRAMES,
    TILE_HEIGHT,
    ClipFigures,
    Outcome,
    all_clips,
    clip_figures,
    commonest,
    contact_sheet,
    draw_clips,
    length_rows,
    read_clips,
    spread_over_classes,
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty working folder, where the default outputs go."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def copied(motion_clips, tmp_path) -> Path:
    """Clips that a test may spoil: four training and two held-out clips of two classes."""
    return Path(shutil.copytree(motion_clips, tmp_path / "clips"))


@contextmanager
def spoil(folder: Path) -> Iterator[dict[str, str]]:
    """Adds bad clips of every kind, which stay so for the time of the block; gives the beginning of each one's cause.

    Its keys are (split, label, name).
    """
    label = folder / "train" / LABELS[0]
    good = (label / "0.mp4").read_bytes()
    (label / "cut.mp4").write_bytes(good[: len(good) // 2])
    (label / "empty.mp4").touch()
    (folder / "val" / LABELS[1] / "text.avi").write_text("these are words\n" * 50)
    bad = {
        ("train", LABELS[0], f"train/{LABELS[0]}/cut.mp4"): "is ",
        ("train", LABELS[0], f"train/{LABELS[0]}/empty.mp4"): "is empty",
        ("train", LABELS[0], f"train/{LABELS[0]}/hangs.avi"): "took longer than 1 s",
        ("val", LABELS[1], f"val/{LABELS[1]}/text.avi"): "is ",
    }
    with stalled(label / "hangs.avi", good):
        yield bad


def listed(file: Path) -> dict[tuple[str, str, str], str]:
    """Causes in a list of bad clips by (split, label, name)."""
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as opened:
        rows = list(csv.DictReader(opened))
    assert [(row["split"], row["name"]) for row in rows] == sorted((row["split"], row["name"]) for row in rows)
    return {(row["split"], row["label"], row["name"]): row["cause"] for row in rows}


def refuse(capsys, arguments) -> str:
    """What a verb that cannot do its work says."""
    assert main(arguments) == 1
    return complaint(capsys)


# --- check


def test_check_of_good_clips(work, capsys, motion_clips):
    assert main(["data", "check", str(motion_clips)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["train: 8 of 8 clips decode", "val: 4 of 4 clips decode", "List of bad clips: bad_clips.csv"]
    assert files_of(work) == {"bad_clips.csv": b"split,name,label,cause\r\n"}


@pytest.mark.parametrize("workers", [1, 3])
def test_check_of_bad_clips(work, capsys, copied, workers):
    arguments = ["data", "check", str(copied), "--time_limit=1", f"--workers={workers}", "--output=found.csv"]
    with spoil(copied) as expected:
        assert main(arguments) == 1
    causes = listed(work / "found.csv")
    assert causes.keys() == expected.keys()
    assert all(causes[clip].startswith(beginning) for clip, beginning in expected.items())
    printed = capsys.readouterr().out
    assert "train: 8 of 11 clips decode\nval: 4 of 5 clips decode\n" in printed
    assert all(Path(name).name in printed for _, _, name in expected)
    assert list(files_of(work)) == ["found.csv"]


def test_check_does_not_ask_for_a_split(work, capsys, motion_clips):
    assert main(["data", "check", str(motion_clips / "train")]) == 0
    captured = capsys.readouterr()
    assert "all: 8 of 8 clips decode" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("form", ["--val_fraction=0.25", "--data.val_fraction=0.25", "recipe"])
def test_check_by_the_keys_of_recipes(work, capsys, motion_clips, form):
    if form == "recipe":
        data = {"source": str(motion_clips / "train"), "val_fraction": 0.25, "batch_size": 3, "grayscale": 0.1}
        Path("recipe.yaml").write_text(yaml.safe_dump({"model": {"backbone": "tiny"}, "data": data}))
        arguments = ["--config=recipe.yaml"]
    else:
        arguments = [str(motion_clips / "train"), form]
    assert main(["data", "check", *arguments]) == 0
    assert "train: 6 of 6 clips decode\nval: 2 of 2 clips decode\n" in capsys.readouterr().out


def test_options_override_a_recipe(work, capsys, motion_clips):
    Path("recipe.yaml").write_text(yaml.safe_dump({"data": {"source": "nowhere", "val_fraction": 0.25}}))
    arguments = ["--config=recipe.yaml", "--val_fraction=0.5", str(motion_clips / "train")]
    assert main(["data", "check", *arguments]) == 0
    assert "train: 4 of 4 clips decode\nval: 4 of 4 clips decode\n" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_has_a_data_part_that_is_understood(work, capsys, recipe):
    # The output is looked at once all settings are understood, and before any data.
    said = refuse(capsys, ["data", "check", f"--config={recipe}", "--output=nowhere/bad.csv"])
    assert "nowhere/bad.csv: cannot be written" in said


def test_clips_that_are_listed_and_not_there(work, capsys, motion_clips):
    names = [f"{label}/{number}.mp4 {label}" for label in LABELS for number in range(4)]
    Path("train.txt").write_text("\n".join(["growing/gone.mp4 growing", *names[1:7]]))
    Path("val.txt").write_text("\n".join([names[0], names[7]]))
    lists = ["--train_list=train.txt", "--val_list=val.txt", "--allow_missing=true"]
    assert main(["data", "check", str(motion_clips / "train"), *lists]) == 0
    captured = capsys.readouterr()
    assert "train: 6 of 6 clips decode; 1 listed clip is not there\nval: 2 of 2 clips decode\n" in captured.out
    assert captured.err.startswith("vidprism data: ")


def test_names_that_are_no_text(work, capsys, copied):
    name = os.fsdecode(b"odd [bold]\xff.mp4")
    (copied / "train" / LABELS[0] / name).write_bytes(b"")
    assert main(["data", "check", str(copied)]) == 1
    assert listed(work / "bad_clips.csv") == {("train", LABELS[0], f"train/{LABELS[0]}/{name}"): "is empty"}
    assert "train: 8 of 9 clips decode" in capsys.readouterr().out


# --- processes that read clips


@pytest.fixture
def parts(tmp_path) -> tuple:
    """Two tables of files that each hold the name of what reading them does."""
    names = ["good", "exit", "slow", "segfault", "good", "raise", "good", "good"]
    for number, name in enumerate(names):
        (tmp_path / f"{number}").write_text(name)
    tables = [
        FileTable.from_lists(tmp_path, [str(number) for number in range(8)], range(8)).select(rows)
        for rows in ([0, 1, 2, 3, 4], [5, 6, 7])
    ]
    return tuple(zip(("train", "val"), tables, strict=True))


def act(video: str) -> str:
    """Does what the file says."""
    deed = Path(video).read_text()
    if deed == "exit":
        os._exit(3)
    if deed == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if deed == "slow":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        time.sleep(600)
    if deed == "raise":
        raise MemoryError("no room")
    return deed


@pytest.mark.parametrize("workers", [1, 3])
def test_every_clip_has_one_outcome(parts, workers):
    outcomes = list(read_clips(parts, all_clips(parts), act, workers, time_limit=2))
    assert {(outcome.part, outcome.index): (outcome.result, outcome.cause) for outcome in outcomes} == {
        (0, 0): ("good", None),
        (0, 1): (None, "crashed the decoder (exit status 3)"),
        (0, 2): (None, "took longer than 2 s"),
        (0, 3): (None, "crashed the decoder (Segmentation fault)"),
        (0, 4): ("good", None),
        (1, 0): (None, "MemoryError: no room"),
        (1, 1): ("good", None),
        (1, 2): ("good", None),
    }
    assert len(outcomes) == 8


def test_more_processes_than_clips(parts):
    assert list(read_clips(parts, [(0, 4)], act, 3)) == [Outcome(0, 4, "good")]
    assert list(read_clips(parts, [], act, 2)) == []


def test_an_answer_in_time_counts_however_late_it_is_read(parts):
    outcomes = read_clips(parts, [(0, 0), (0, 4), (1, 1), (1, 2)], act, 2, time_limit=0.2)
    for outcome in outcomes:
        assert outcome.cause is None
        time.sleep(0.4)  # the other process has answered by now


def test_a_loop_that_ends_early_leaves_no_process(parts):
    outcomes = read_clips(parts, [(0, 2), (1, 1)], act, 2)  # no limit: one of them would take ten minutes
    assert next(outcomes) == Outcome(1, 1, "good")
    assert multiprocessing.active_children()
    outcomes.close()
    assert not multiprocessing.active_children()


def test_check_of_a_clip_that_crashes_the_decoder(work, capsys, copied, monkeypatch):
    (copied / "val" / LABELS[0] / "deadly.mp4").write_text("segfault")
    monkeypatch.setattr("vidprism_hf.data.verbs.clip_figures", act_on_deadly)
    assert main(["data", "check", str(copied)]) == 1
    clip = ("val", LABELS[0], f"val/{LABELS[0]}/deadly.mp4")
    assert listed(work / "bad_clips.csv") == {clip: "crashed the decoder (Segmentation fault)"}


def act_on_deadly(video: str) -> ClipFigures:
    return act(video) if video.endswith("deadly.mp4") else clip_figures(video)


@pytest.mark.slow
def test_interrupt(work, copied):
    command = [sys.executable, "-m", "vidprism_hf.cli", "data", "check", str(copied), "--time_limit=500"]
    with stalled(copied / "train" / LABELS[0] / "hangs.avi", b"clip") as clip:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        wait_for_reader(clip)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all processes of the command
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (out, err) == ("", "vidprism data: stopped\n")
    assert files_of(work) == {}
    deadline = time.monotonic() + 10
    while group_exists(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_exists(process.pid)


def group_exists(number: int) -> bool:
    """Whether any process of a group is there."""
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


# --- show


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Path:
    """Clips of known length, size and rate: class `a` with three, `b` with one."""
    folder = tmp_path_factory.mktemp("known")
    for label, name, frames, (height, width), rate in (
        ("a", "0.mp4", 10, (48, 64), 10),
        ("a", "1.mp4", 20, (48, 64), 10),
        ("a", "2.mp4", 30, (64, 48), 25),
        ("b", "0.mp4", 24, (48, 64), 12),
    ):
        (folder / label).mkdir(exist_ok=True)
        render(folder / label / name, greys(frames, height, width), rate=rate)
    return folder


def test_show(work, capsys, known):
    assert main(["data", "show", str(known), "--processor=tiny"]) == 0
    captured = capsys.readouterr()
    rows = [re.findall(r"[^│┃\s][^│┃]*?(?= *[│┃])", line) for line in captured.out.splitlines()]
    for row in (["a", "3"], ["b", "1"], ["all classes", "4"], ["frames", "10", "22", "30"],
                ["seconds", "1.00", "1.60", "2.00"]):  # fmt: skip
        assert row in rows
    assert "4 of 4 clips decode\n" in captured.out
    assert "Resolution: 64x48 (3), 48x64 (1)\n" in captured.out
    assert "Frames a second: 10 (2), 12 (1), 25 (1)\n" in captured.out
    assert captured.err == ""
    with Image.open("contact_sheet.png") as picture:
        assert picture.size == (LABEL_WIDTH + SHEET_FRAMES * (TILE_HEIGHT + 2), 4 * (TILE_HEIGHT + 2))
    assert list(files_of(work)) == ["contact_sheet.png"]


def test_show_of_a_sample(work, capsys, motion_clips):
    arguments = [str(motion_clips), "--sample=5", "--seed=3", "--sheet_clips=2", "--processor=tiny"]
    assert main(["data", "show", *arguments, "--picture=sheet.jpg"]) == 0
    printed = capsys.readouterr().out
    assert "5 of 5 clips decode; they are a sample of 12, drawn by seed 3\n" in printed
    with Image.open("sheet.jpg") as picture:
        assert picture.format == "JPEG"
        assert picture.height == 2 * (TILE_HEIGHT + 2)


def test_show_lists_bad_clips(work, capsys, copied):
    with spoil(copied) as expected:
        assert main(["data", "show", str(copied), "--time_limit=1", "--sheet_clips=0", "--processor=tiny"]) == 0
    printed = capsys.readouterr().out
    assert "12 of 16 clips decode\n" in printed
    assert all(Path(name).name in printed for _, _, name in expected)
    assert files_of(work) == {}


def test_show_of_bad_clips_alone(work, capsys, tmp_path):
    for label in LABELS:
        (tmp_path / "bad" / label).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "bad" / label / f"{number}.mp4").touch()
    assert main(["data", "show", str(tmp_path / "bad"), "--processor=tiny"]) == 0
    assert "0 of 4 clips decode\n" in capsys.readouterr().out
    assert files_of(work) == {}


def test_picture_is_the_evaluation_view_in_order(work, known):
    assert main(["data", "show", str(known), "--processor=tiny", "--sheet_clips=4"]) == 0
    with Image.open("contact_sheet.png") as picture:
        pixels = np.asarray(picture.convert("L")).astype(float)
    left = np.arange(SHEET_FRAMES) * (TILE_HEIGHT + 2) + LABEL_WIDTH + TILE_HEIGHT // 2
    middle = np.arange(4) * (TILE_HEIGHT + 2) + TILE_HEIGHT // 2
    seen = (pixels[np.ix_(middle, left)] - 16) / 6  # frame i of these clips has the grey 16 + 6 i
    # Rows by class; the three of class a in whatever order.
    for row, frames in zip([*sorted(seen[:3], key=lambda row: row[-1]), seen[3]], (10, 20, 30, 24), strict=True):
        centres = (2 * np.arange(SHEET_FRAMES) + 1) * frames // (2 * SHEET_FRAMES)
        np.testing.assert_allclose(row, centres, atol=0.7)


def test_contact_sheet_of_long_labels():
    tiles = np.zeros((3, 10, 20, 3), np.uint8)
    picture = contact_sheet([("a long label " * 20, "name", tiles), ("ü", "\udcff" * 99, tiles)])
    assert picture.size == (LABEL_WIDTH + 3 * 22, 2 * 12)
    assert np.asarray(picture)[:10, LABEL_WIDTH : LABEL_WIDTH + 20].max() == 0


# --- what is drawn and measured


@pytest.fixture
def uneven() -> tuple:
    """Tables of 90 clips of class 0 and 5 of each of the classes 1 to 6."""
    labels = [0] * 90 + [label for label in range(1, 7) for _ in range(5)]
    table = FileTable.from_lists("clips", [str(number) for number in range(len(labels))], labels)
    return ("train", table.select(range(100))), ("val", table.select(range(100, 120)))


def test_draw(uneven):
    drawn = draw_clips(uneven, 50, seed=1)
    assert len(set(drawn)) == 50
    assert set(drawn) < set(all_clips(uneven))
    assert drawn == draw_clips(uneven, 50, seed=1) != draw_clips(uneven, 50, seed=2)
    assert sorted(draw_clips(uneven, 1000, seed=1)) == list(all_clips(uneven))


def test_spread_over_classes(uneven):
    clips = draw_clips(uneven, 120, seed=1)
    labels = [int(uneven[part][1].labels[index]) for part, index in spread_over_classes(uneven, clips, 16)]
    assert sorted(np.bincount(labels).tolist()) == [2, 2, 2, 2, 2, 3, 3]
    assert labels == sorted(labels)
    assert len(spread_over_classes(uneven, clips, 3)) == 3
    assert spread_over_classes(uneven, clips, 0) == []


def test_commonest():
    assert commonest("bbac") == "b (2), a (1), c (1)"
    assert commonest("abcdefg", most=2) == "a (1), b (1) and 5 more"


def test_lengths_without_a_rate():
    rows = length_rows([ClipFigures(12, None, 64, 48, None), ClipFigures(7, None, 64, 48, None)])
    assert rows == [("frames", "7", "9.5", "12")]


# --- bad usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check"], "name the source first"),
        (["check", "nowhere"], "nowhere: no such folder"),
        (["check", "CLIPS", "--val_fracton=0.2"], "unrecognized arguments: --val_fracton=0.2"),
        (["check", "CLIPS", "--val_fraction=some"], '"val_fraction"'),
        (["check", "CLIPS", "--workers=0"], '"workers"'),
        (["check", "CLIPS", "--time_limit=0"], '"time_limit"'),
        (["check", "CLIPS", "--output=nowhere/bad.csv"], "nowhere/bad.csv: cannot be written"),
        (["check", "CLIPS", "--output=."], ".: cannot be written (is a folder)"),
        (["check", "--config=nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["check", "--config=list.yaml"], "list.yaml: has no data part"),
        (["check", "--config=unknown.yaml"], "unknown.yaml: "),
        (["show", "CLIPS", "--picture=sheet.xyz"], "sheet.xyz: unknown kind of picture"),
        (["show", "CLIPS", "--processor=nowhere/at_all"], "nowhere/at_all"),
        (["show", "CLIPS", "--sample=0"], '"sample"'),
        (["prepare", "ucf102"], "ucf102: no such benchmark; there are ucf101, hmdb51, k400, ssv2"),
    ],
)
def test_bad_usage(work, capsys, monkeypatch, motion_clips, arguments, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("list.yaml").write_text("[1, 2]")
    Path("unknown.yaml").write_text("data: {source: demo, val_fracton: 0.2}")
    before = files_of(work)
    arguments = [str(motion_clips) if argument == "CLIPS" else argument for argument in arguments]
    said = refuse(capsys, ["data", *arguments])
    assert said.startswith("vidprism data: ")
    assert message in said
    assert files_of(work) == before


def test_usage(capsys):
    assert main(["data"]) == main(["data", "--help"]) == 0
    assert capsys.readouterr().out.count("usage: vidprism data VERB") == 2
    assert main(["data", "chek"]) == 2
    assert capsys.readouterr().err == "vidprism data: no verb 'chek'; there are prepare, check, show\n"


def test_help_lists_the_keys_of_the_source(capsys):
    with pytest.raises(SystemExit):
        main(["data", "check", "--help"])
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--val_pattern", "--seed", "--workers", "--time_limit", "--output"))
    assert "--batch_size" not in printed
