"""Folders of class folders: layouts, split rules and clear errors."""

import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidprism_hf.data import DataError, scan_folder


def make(root, *names):
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def names(table):
    return [os.path.relpath(table.video(index), table.origin) for index in range(len(table))]


SUBJECTS = ("ann", "ben", "cem")


@pytest.fixture
def flat(tmp_path):
    return make(tmp_path / "flat", *(f"{act}/{who}_{act}.avi" for act in ("run", "bend") for who in SUBJECTS))


def test_split_folders(tmp_path):
    make(tmp_path, "train/run/b.mp4", "train/run/a.AVI", "train/bend/x.webm", "val/run/a.mp4", "val/bend/y.mkv")
    splits = scan_folder(tmp_path)
    assert splits.id2label == {0: "bend", 1: "run"}
    assert names(splits.train) == ["train/bend/x.webm", "train/run/a.AVI", "train/run/b.mp4"]
    assert splits.train.labels.tolist() == [0, 1, 1]
    assert names(splits.val) == ["val/bend/y.mkv", "val/run/a.mp4"]
    assert splits.val.labels.tolist() == [0, 1]
    assert splits.ignored == splits.notes == ()


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_other_names_of_the_held_out_folder(tmp_path, held_out):
    make(tmp_path, "train/run/a.mp4", f"{held_out}/run/b.mp4")
    assert names(scan_folder(tmp_path).val) == [f"{held_out}/run/b.mp4"]


def test_val_goes_before_test_and_the_rest_is_noted(tmp_path):
    make(tmp_path, "train/run/a.mp4", "val/run/b.mp4", "test/run/c.mp4", "notes.txt")
    splits = scan_folder(tmp_path)
    assert names(splits.val) == ["val/run/b.mp4"]
    assert any("test: not read" in note for note in splits.notes)
    assert splits.ignored == ("notes.txt",)


def test_one_level_with_a_class_called_train(tmp_path):
    make(tmp_path, "train/a.mp4", "train/b.mp4", "car/a.mp4", "car/b.mp4")
    splits = scan_folder(tmp_path, val_pattern="^b")
    assert splits.id2label == {0: "car", 1: "train"}
    assert names(splits.val) == ["car/b.mp4", "train/b.mp4"]


def test_by_pattern_on_the_name_below_the_class_folder(flat):
    make(flat, "run/day1/ben_2.avi")
    splits = scan_folder(flat, val_pattern="^(ben|cem)_")
    assert names(splits.val) == [
        "bend/ben_bend.avi",
        "bend/cem_bend.avi",
        "run/ben_run.avi",
        "run/cem_run.avi",
    ]
    assert names(scan_folder(flat, val_pattern="^day1/").val) == ["run/day1/ben_2.avi"]


def test_by_list(flat, tmp_path):
    (tmp_path / "val.txt").write_text("# held out\n\nrun/ann_run.avi\n./bend/cem_bend.avi\n")
    splits = scan_folder(flat, val_list=tmp_path / "val.txt")
    assert names(splits.val) == ["bend/cem_bend.avi", "run/ann_run.avi"]
    assert len(splits.train) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run/nobody.avi", r"val\.txt, line 1: no clip 'run/nobody\.avi'"),
        ("run/ann_run.avi\nrun/ann_run.avi", r"val\.txt, line 2: 'run/ann_run\.avi' is listed twice"),
        ("# nothing", "holds out none of 6 clips"),
        (None, r"val\.txt: cannot be read"),
    ],
)
def test_bad_lists(flat, tmp_path, text, message):
    if text is not None:
        (tmp_path / "val.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        scan_folder(flat, val_list=tmp_path / "val.txt")


counts = st.lists(st.integers(1, 12), min_size=1, max_size=4).filter(lambda sizes: max(sizes) > 1)


@settings(max_examples=25, deadline=None)
@given(sizes=counts, fraction=st.floats(0.05, 0.95), seed=st.integers(0, 99), order=st.randoms())
def test_fraction_is_stratified_and_stable(sizes, fraction, seed, order):
    files = [f"class{index}/{clip}.mp4" for index, size in enumerate(sizes) for clip in range(size)]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        splits = scan_folder(make(one, *files), val_fraction=fraction, seed=seed)
        assert sorted(names(splits.train) + names(splits.val)) == sorted(files)
        for index, size in enumerate(sizes):
            held_out = int((splits.val.labels == index).sum())
            assert abs(held_out - size * fraction) <= 1
            assert held_out < size
            assert held_out >= 1 or size == 1
        order.shuffle(files)
        make(two, *files, *(f"another/{clip}.mp4" for clip in range(5)))
        again = scan_folder(two, val_fraction=fraction, seed=seed)
        assert [name for name in names(again.val) if not name.startswith("another")] == names(splits.val)


def test_fraction_depends_on_the_seed(tmp_path):
    make(tmp_path, *(f"run/{clip}.mp4" for clip in range(40)))
    drawn = {tuple(names(scan_folder(tmp_path, val_fraction=0.5, seed=seed).val)) for seed in range(3)}
    assert len(drawn) == 3


class Entries:
    """A list in the guise of what os.scandir returns."""

    def __init__(self, entries):
        self.entries = iter(entries)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.entries)


def test_listing_order_of_the_file_system_does_not_matter(flat, monkeypatch):
    expected = scan_folder(flat, val_fraction=0.4)
    scandir = os.scandir

    def shuffled(path):
        with scandir(path) as entries:
            entries = list(entries)
        random.Random(3).shuffle(entries)
        return Entries(entries)

    monkeypatch.setattr(os, "scandir", shuffled)
    found = scan_folder(flat, val_fraction=0.4)
    assert (names(found.train), names(found.val)) == (names(expected.train), names(expected.val))


def test_other_files_are_listed_and_hidden_ones_skipped(flat):
    make(flat, "run/readme.txt", "labels.csv", "run/.ann.avi.swp", ".cache/x.mp4", "bend/.hidden/x.mp4")
    splits = scan_folder(flat, val_pattern="ann")
    assert splits.ignored == ("labels.csv", "run/readme.txt")
    assert splits.notes == (f"{flat}: 2 files are not clips and are ignored: labels.csv, run/readme.txt",)
    assert len(splits.train) + len(splits.val) == 6


def test_class_missing_from_the_held_out_clips_is_noted(tmp_path):
    make(tmp_path, "train/run/a.mp4", "train/bend/a.mp4", "val/run/b.mp4")
    assert scan_folder(tmp_path).notes == (f"{tmp_path}: 1 of 2 labels have no held-out clip: bend",)


def test_names_that_are_not_unicode(tmp_path):
    raw = os.fsencode(tmp_path) + b"/run/caf\xe9.mp4"
    make(tmp_path, "run/été.mp4", os.fsdecode(raw))
    splits = scan_folder(tmp_path, val_pattern="caf")
    assert os.path.samefile(splits.val.video(0), os.fsdecode(raw))
    assert names(splits.train) == ["run/été.mp4"]


def test_tables_are_flat_arrays(flat):
    table = scan_folder(flat, val_pattern="ann").train
    assert pa.types.is_large_binary(table.names.type)
    assert table.labels.dtype == np.int64
    assert len(table) == 4


RULES = {"val_fraction": 0.5, "val_pattern": "ann"}


@pytest.mark.parametrize(
    ("files", "rules", "message"),
    [
        ((), {}, "no class folders"),
        (("run/a.mp4",), {}, r"give exactly one of data\.val_fraction"),
        (("run/a.mp4",), RULES, r"data\.val_fraction and data\.val_pattern are given"),
        (("train/run/a.mp4", "val/run/b.mp4"), {"val_fraction": 0.5}, r"remove data\.val_fraction"),
        (("train/run/a.mp4",), {}, "has train/ but none of val, validation, test"),
        (("val/run/a.mp4",), {}, "has val/ but no train/"),
        (("train/run/a.mp4", "val/run/b.mp4", "val/jump/b.mp4"), {}, "val/jump: train/ has no label 'jump'"),
        (
            ("train/run/a.mp4", "train/jump/a.txt", "val/run/b.mp4"),
            {},
            "train/jump: class folder without clips",
        ),
        (("run/a.mp4", "jump/.keep"), {"val_fraction": 0.5}, "jump: class folder without clips"),
        (("run/a.mp4",), {"val_pattern": "z"}, "data.val_pattern=z holds out none of 1 clips"),
        (("run/a.mp4", "bend/a.mp4"), {"val_pattern": "a"}, "holds out every clip and leaves none"),
        (("run/a.mp4", "bend/b.mp4"), {"val_pattern": "a"}, "run: .* holds out every clip of this label"),
        (("run/a.mp4",), {"val_pattern": "("}, "not a regular expression"),
        (("run/a.mp4", "run/b.mp4"), {"val_fraction": 1.0}, "must lie between 0 and 1"),
        (("run/a.mp4",), {"val_fraction": 0.5}, "holds out none of 1 clips"),
    ],
)
def test_bad_sources(tmp_path, files, rules, message):
    make(tmp_path, *files)
    with pytest.raises(DataError, match=message) as caught:
        scan_folder(tmp_path, **rules)
    assert "\n" not in str(caught.value)


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder; give .* as data\.source"):
        scan_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is not a folder"):
        scan_folder(make(tmp_path, "file.mp4") / "file.mp4")


def test_the_same_file_in_two_places(tmp_path):
    make(tmp_path, "train/run/a.mp4", "val/run/b.mp4")
    (tmp_path / "val/run/c.mp4").symlink_to(tmp_path / "train/run/a.mp4")
    with pytest.raises(DataError, match=r"val/run/c\.mp4 and train/run/a\.mp4 are the same file"):
        scan_folder(tmp_path)


def test_linked_class_folders_are_followed(tmp_path, flat):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/run").symlink_to(flat / "run")
    assert len(scan_folder(tmp_path / "source", val_pattern="ann").train) == 2


def test_real_folder_with_held_out_subjects(shared):
    splits = scan_folder(shared / "data/weizmann", val_pattern="^(daria|denis|eli)_")
    assert (len(splits.train), len(splits.val), len(splits.id2label)) == (60, 30, 10)


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_among_the_clips_is_named_and_not_opened(flat, tmp_path, linked):
    pipe = flat / "run" / "day 1" / "hangs.mp4"
    pipe.parent.mkdir()
    os.mkfifo(tmp_path / "pipe" if linked else pipe)
    if linked:
        pipe.symlink_to(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"run/day 1/hangs\.mp4: is a FIFO, not a regular file; remove it"):
        scan_folder(flat, val_fraction=0.3)


def test_pipes_beside_the_clips_are_ignored_and_not_opened(flat):
    os.mkfifo(flat / "run" / "notes")
    os.mkfifo(flat / "notes.mp4")
    assert scan_folder(flat, val_fraction=0.3).ignored == ("notes.mp4", "run/notes")


def test_a_pipe_as_list_is_not_opened(flat, tmp_path):
    os.mkfifo(tmp_path / "val.txt")
    with pytest.raises(DataError, match=r"cannot be read as a text file .*a FIFO, not a regular file"):
        scan_folder(flat, val_list=tmp_path / "val.txt")


def test_a_link_that_leads_nowhere_is_a_clip(flat):
    (flat / "run" / "gone.avi").symlink_to(flat / "nowhere.avi")
    splits = scan_folder(flat, val_pattern="ann")
    assert "run/gone.avi" in names(splits.train)
