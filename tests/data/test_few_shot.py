"""K clips of each class: how they are drawn, saved and hashed."""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidprism_hf.data import ClipSplits, DataError, FileTable
from vidprism_hf.data.few_shot import clip_list_hash, few_shot, save_clip_list
from vidprism_hf.data.lists import scan_lists
from vidprism_hf.data.tables import rows_by_label


def rows(table):
    return [(table.name(index), int(label)) for index, label in enumerate(table.labels)]


def splits_of(clips, labels=("bend", "run")):
    names, indices = [name for name, _ in clips], [label for _, label in clips]
    val = FileTable.from_lists("root", ["v.avi"], [0])
    return ClipSplits(FileTable.from_lists("root", names, indices), val, dict(enumerate(labels)), notes=("before",))


CLIPS = [(f"{label}/{number}.avi", label) for label in (0, 1) for number in range(20)]


class HubRows:
    """A table whose clips are no files: the protocol and nothing else."""

    origin = "org/name:train"

    def __init__(self, names, labels):
        self.names, self.labels = list(names), np.array(labels, dtype=np.int64)

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return self.names[index]

    def video(self, index):
        return b""

    def select(self, indices):
        return HubRows([self.names[index] for index in indices], self.labels[list(indices)])


def test_exactly_k_of_each_class():
    splits = splits_of(CLIPS)
    drawn = few_shot(splits, 4, seed=1)
    assert np.bincount(drawn.train.labels).tolist() == [4, 4]
    assert set(rows(drawn.train)) <= set(CLIPS)
    assert drawn.val is splits.val
    assert drawn.id2label == splits.id2label
    assert drawn.notes[0] == "before"
    assert "8 of 40 training clips are used, 4 a label (seed 1)" in drawn.notes[1]


def test_the_draw_depends_on_the_seed_and_is_the_same_for_ever():
    draws = {tuple(rows(few_shot(splits_of(CLIPS), 3, seed).train)) for seed in range(5)}
    assert len(draws) == 5
    # A published hash must name the same clips in every later version.
    drawn = few_shot(splits_of(CLIPS), 2, seed=0).train
    assert rows(drawn) == [("0/0.avi", 0), ("0/12.avi", 0), ("1/5.avi", 1), ("1/8.avi", 1)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), order=st.randoms(), more=st.integers(1, 5))
def test_order_and_other_classes_have_no_influence(seed, order, more):
    drawn = rows(few_shot(splits_of(CLIPS), 4, seed).train)
    shuffled = list(CLIPS)
    order.shuffle(shuffled)
    assert rows(few_shot(splits_of(shuffled), 4, seed).train) == drawn
    others = splits_of(CLIPS[:20] + [(f"new/{n}.avi", 1) for n in range(3 + more)], ("bend", "new"))
    assert [row for row in rows(few_shot(others, 4, seed).train) if row[1] == 0] == [r for r in drawn if r[1] == 0]
    for fewer in (1, 2, 3):
        assert set(rows(few_shot(splits_of(CLIPS), fewer, seed).train)) <= set(drawn)


def test_too_few_clips():
    with pytest.raises(DataError, match=r"label 'run' has 3 training clips; lower data\.shots=4, or add clips"):
        few_shot(splits_of(CLIPS[:23]), 4, seed=0)
    with pytest.raises(DataError, match=r"label 'jump' has 0 training clips"):
        few_shot(splits_of(CLIPS, ("bend", "run", "jump")), 4, seed=0)
    with pytest.raises(DataError, match=r"data\.shots=0: must be at least 1"):
        few_shot(splits_of(CLIPS), 0, seed=0)


def test_saved_list_is_read_back(tmp_path):
    clips = [("run/a 1 2.avi", 1), ("bend/b, c.mp4", 0), ("#no extension", 1), ("bend/x.avi (2)", 0)]
    table = FileTable.from_lists(tmp_path / "root", [name for name, _ in clips], [label for _, label in clips])
    for name, _ in (*clips, ("v.avi", 0)):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    save_clip_list(table, tmp_path / "lists" / "train.txt")
    assert (tmp_path / "lists" / "train.txt").read_text().startswith("run/a 1 2.avi\t1\nbend/b, c.mp4\t0\n")
    (tmp_path / "val.txt").write_text("v.avi 0")
    (tmp_path / "names.txt").write_text("bend\nrun\n")
    splits = scan_lists(tmp_path / "root", tmp_path / "lists/train.txt", tmp_path / "val.txt", tmp_path / "names.txt")
    assert rows(splits.train) == clips
    assert clip_list_hash(splits.train) == clip_list_hash(table)


# Any name that a file can have on one line, sane or not.
characters = st.characters(codec="utf-8", exclude_characters="/\0\t\r\n\ufeff")
file_names = st.text(characters, min_size=1, max_size=20).filter(lambda name: name not in (".", ".."))


@settings(max_examples=60, deadline=None)
@given(names=st.lists(file_names, min_size=1, max_size=8, unique=True))
def test_any_file_name_survives(names):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "root" / "val").mkdir(parents=True)
        for name in names:
            (folder / "root" / name).touch() if name != "val" else None
        names = [name for name in names if name != "val"] or ["other.avi"]
        (folder / "root" / names[0]).touch()
        (folder / "root" / "val" / "v.avi").touch()
        table = FileTable.from_lists(folder / "root", names, [index % 3 for index in range(len(names))])
        save_clip_list(table, folder / "train.txt")
        (folder / "val.txt").write_text("val/v.avi 0")
        (folder / "names.txt").write_text("a\nb\nc\n")
        splits = scan_lists(folder / "root", folder / "train.txt", folder / "val.txt", folder / "names.txt")
        assert rows(splits.train) == rows(table)


def test_hash_is_that_of_the_sorted_saved_list(tmp_path):
    table = HubRows(["data/1.parquet#b é", "data/1.parquet#a", "z"], [1, 0, 2])
    save_clip_list(table, tmp_path / "list.txt")
    lines = sorted((tmp_path / "list.txt").read_bytes().splitlines(keepends=True))
    digest = clip_list_hash(table)
    assert digest == hashlib.sha256(b"".join(lines)).hexdigest()
    assert clip_list_hash(table.select([2, 0, 1])) == digest
    assert clip_list_hash(table.select([0, 1])) != digest
    assert clip_list_hash(HubRows(table.names, [1, 0, 1])) != digest


def test_names_that_fit_no_line(tmp_path):
    (tmp_path / "list.txt").write_text("old")
    for name in ("a\tb", "a\nb", "a\rb", ""):
        with pytest.raises(DataError, match=r"org/name:train: clip name .* does not fit a line"):
            save_clip_list(HubRows(["ok", name], [0, 0]), tmp_path / "list.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["list.txt"]
    assert (tmp_path / "list.txt").read_text() == "old"


def test_the_labels_are_looked_at_once_however_many_there_are():
    read = []

    class Table(FileTable):
        def __getattribute__(self, name):
            if name == "labels":
                read.append(name)
            return super().__getattribute__(name)

    labels = [number % 50 for number in range(200)]
    table = Table.from_lists("root", [f"{number}.avi" for number in range(200)], labels)
    splits = ClipSplits(table, table, {label: str(label) for label in range(50)})
    read.clear()
    assert len(few_shot(splits, 2, seed=0).train) == 100
    assert len(read) < 10


@given(st.lists(st.integers(0, 5)))
def test_rows_by_label(labels):
    expected = {label: [row for row, each in enumerate(labels) if each == label] for label in sorted(set(labels))}
    assert rows_by_label(np.array(labels, dtype=np.int64)) == expected
