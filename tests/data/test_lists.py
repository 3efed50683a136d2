"""List files: every form that is read, the names of labels, and clear errors."""

import csv
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidprism_hf import label_names
from vidprism_hf.data import DataError
from vidprism_hf.data.sources.annotations import scan_lists
from vidprism_hf.label_names import read_label_names


def make(root, *names):
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def rows(table):
    return [(table.name(index), int(label)) for index, label in enumerate(table.labels)]


def named(splits):
    """The rows of both splits with label names."""
    return [[(name, splits.id2label[label]) for name, label in rows(table)] for table in (splits.train, splits.val)]


CLIPS = ("bend/ann 1.avi", "run/ann, 2.mp4", "run/ben.avi", "bend/cem.webm")


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / "clips", *CLIPS)


@pytest.fixture
def scan(root, tmp_path):
    """Scans lists given as text: `scan(train, val, names=..., suffix=".txt")`."""

    def scan(train, val, names=None, suffix=".txt", **options):
        for split, text in (("train", train), ("val", val)):
            data = text if isinstance(text, bytes) else text.encode()
            (tmp_path / f"{split}{suffix}").write_bytes(data)
        if names is not None:
            kind, text = names
            (tmp_path / kind).write_text(text)
            options["label_names"] = tmp_path / kind
        return scan_lists(root, tmp_path / f"train{suffix}", tmp_path / f"val{suffix}", **options)

    return scan


EXPECTED = [[("bend/ann 1.avi", "bend"), ("run/ann, 2.mp4", "run")], [("run/ben.avi", "run")]]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("bend/ann 1.avi 0\nrun/ann, 2.mp4 1\n", "run/ben.avi 1"),
        ("bend/ann 1.avi\t0\nrun/ann, 2.mp4\t1\n", "run/ben.avi\t1\n\n"),
        ("bend/ann 1.avi,0\nrun/ann, 2.mp4,1\n", "run/ben.avi, 1"),
        ("bend/ann 1.avi 33 0\r\n\r\nrun/ann, 2.mp4 9 1\r\n", "run/ben.avi 5 1"),
        ("bend/ann 1.avi,33,0\nrun/ann, 2.mp4,9,1\n", "run/ben.avi\t5\t1"),
        ("bend/ann 1.avi bend\nrun/ann, 2.mp4 run\n", "run/ben.avi run"),
        ("bend/ann 1.avi\nrun/ann, 2.mp4\n", "run/ben.avi"),
        ("bend/ann 1\t0\n./run//ann, 2\t1", "run/ben 1"),
        ("ann 1.avi 0\nann, 2.mp4 1\n", "ben.avi 1"),
        ("\ufeffbend/ann 1.avi  1\nrun/ann, 2.mp4  2\n", "run/ben.avi"),
        ('"bend/ann 1.avi",0\n"run/ann, 2.mp4",1\n', "run/ben.avi,1"),
    ],
    ids=["spaces", "tabs", "commas", "frames", "frames2", "names", "paths", "stems", "bare", "one-based", "quotes"],
)
def test_text_forms(scan, train, val):
    splits = scan(train, val)
    assert named(splits) == EXPECTED
    assert splits.id2label == {0: "bend", 1: "run"}
    assert not splits.missing


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ('path,label\nbend/ann 1.avi,bend\n"run/ann, 2.mp4",run', "path,label\nrun/ben.avi,run\n"),
        ('label,Video Path,x\n0,bend/ann 1.avi,\n1,"run/ann, 2.mp4",', "file;id;class\nrun/ben.avi;7;1\n"),
        ("label,video_id,label_name\n5,ann 1,bend\n7,'ann, 2',run".replace("'", '"'), "path,class\nrun/ben.avi,run"),
        ("id\tfile_name\tlabel\n9\tbend/ann 1.avi\t0\n8\trun/ann, 2.mp4\t1", "filename,category\nrun/ben.avi,1"),
    ],
)
def test_tables_with_a_header(scan, train, val):
    assert named(scan(train, val, suffix=".csv")) == EXPECTED
    assert named(scan(train, val, suffix=".txt")) == EXPECTED  # the content tells


ONE = "bend/ann 1.avi 0\nrun/ann, 2.mp4 1\nrun/ben.avi 1\nbend/cem.webm 0\n"


def test_a_single_list_is_split_by_a_fraction(root, tmp_path):
    (tmp_path / "all.txt").write_text(ONE)
    (tmp_path / "all.csv").write_text("path,label\n" + ONE.replace(",", "").replace(" 0", ",0").replace(" 1\n", ",1\n"))
    make(root, "run/ann 2.mp4")
    for name in ("all.txt", "all.csv"):
        splits = scan_lists(root, tmp_path / name, val_fraction=0.5, seed=1)
        assert [sorted(table.labels.tolist()) for table in (splits.train, splits.val)] == [[0, 1], [0, 1]]
        assert splits.id2label == {0: "bend", 1: "run"}
        same, other = (scan_lists(root, tmp_path / name, val_fraction=0.5, seed=seed) for seed in (1, 3))
        assert named(same) == named(splits) != named(other)


def test_a_single_list_with_missing_clips(root, tmp_path):
    (tmp_path / "all.txt").write_text(ONE + "run/gone.avi 1\n")
    with pytest.raises(DataError, match="1 of 5 clips are not below"):
        scan_lists(root, tmp_path / "all.txt", val_fraction=0.5)
    splits = scan_lists(root, tmp_path / "all.txt", val_fraction=0.5, allow_missing=True)
    assert (len(splits.train), len(splits.val), splits.missing) == (2, 2, {"train": ("run/gone.avi",)})


def test_a_single_list_needs_one_rule(root, tmp_path):
    (tmp_path / "all.txt").write_text(ONE)
    with pytest.raises(DataError, match=r"data\.val_list: is not given; .* or data\.val_fraction"):
        scan_lists(root, tmp_path / "all.txt")
    with pytest.raises(DataError, match=r"data\.val_fraction: data\.val_list gives the validation split already"):
        scan_lists(root, tmp_path / "all.txt", tmp_path / "all.txt", val_fraction=0.5)
    with pytest.raises(DataError, match=r"data\.val_fraction=2: must lie between 0 and 1"):
        scan_lists(root, tmp_path / "all.txt", val_fraction=2)


def test_ssv2(tmp_path):
    root = make(tmp_path / "20bn", "3.webm", "11.mp4", "100.webm")
    entries = [
        {"id": "11", "label": "holding cup", "template": "Holding [something]", "placeholders": ["cup"]},
        {"id": "3", "label": "tearing paper, slowly", "template": "Tearing [something], a [bit]", "placeholders": []},
    ]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    (tmp_path / "validation.json").write_text(json.dumps([{"id": "100", "template": "Holding [something]"}]))
    splits = scan_lists(root, tmp_path / "train.json", tmp_path / "validation.json")
    assert rows(splits.train) == [("11.mp4", 0), ("3.webm", 1)]
    assert splits.id2label == {0: "Holding something", 1: "Tearing something, a bit"}
    (tmp_path / "labels.json").write_text('{"Tearing something, a bit": "0", "Holding something": "1", "X": "2"}')
    splits = scan_lists(root, tmp_path / "train.json", tmp_path / "validation.json", tmp_path / "labels.json")
    assert splits.id2label == {0: "Tearing something, a bit", 1: "Holding something", 2: "X"}
    assert rows(splits.val) == [("100.webm", 1)]
    assert any("train.json: 1 of 3 labels have no clip: X" in note for note in splits.notes)
    with pytest.raises(DataError, match=r"train\.json, entry 1: .* may be any of 11\.mp4, 11\.webm; keep one"):
        scan_lists(make(root, "11.webm"), tmp_path / "train.json", tmp_path / "validation.json")


@pytest.mark.parametrize("layout", ["{label}/{name}", "{name}", "train/{name}", "train/{underscored}/{name}"])
def test_kinetics(tmp_path, layout):
    text = "label,youtube_id,time_start,time_end,split\n"
    clips = [("riding a bike", "--a_1", 7, 17), ("abseiling", "b-2", 100, 110), ("abseiling", "c", 0, 10)]
    names = []
    for label, clip, start, end in clips:
        name = f"{clip}_{start:06d}_{end:06d}.mp4"
        names.append(layout.format(label=label, underscored=label.replace(" ", "_"), name=name))
    (tmp_path / "train.csv").write_text(text + "".join(f"{','.join(map(str, clip))},train\n" for clip in clips[:2]))
    (tmp_path / "val.csv").write_text(text + f'"{clips[2][0]}",c,0,10,val\n')
    splits = scan_lists(make(tmp_path / "root", *names), tmp_path / "train.csv", tmp_path / "val.csv")
    assert named(splits) == [[(names[0], "riding a bike"), (names[1], "abseiling")], [(names[2], "abseiling")]]


def test_ucf101(tmp_path):
    clips = ["Archery/v_Archery_g08_c01.avi", "YoYo/v_YoYo_g08_c01.avi", "YoYo/v_YoYo_g01_c01.avi"]
    root = make(tmp_path / "UCF-101", *clips)
    (tmp_path / "trainlist01.txt").write_text(f"{clips[0]} 1\r\n{clips[1]} 2\r\n")
    (tmp_path / "testlist01.txt").write_text(f"{clips[2]}\r\n")
    (tmp_path / "classInd.txt").write_text("1 Archery\r\n2 YoYo\r\n")
    for names in (None, tmp_path / "classInd.txt"):
        splits = scan_lists(root, tmp_path / "trainlist01.txt", tmp_path / "testlist01.txt", names)
        assert rows(splits.train) == [(clips[0], 0), (clips[1], 1)]
        assert rows(splits.val) == [(clips[2], 1)]
        assert splits.id2label == {0: "Archery", 1: "YoYo"}
        assert any("labels 1 to 2 become indices 0 to 1" in note for note in splits.notes)


PUBLISHED = ("#7_Jog_jog_f_cm_np1_ba_goo_0.avi", "A_(b)_'c'!_wave_hand_u_nm_np1_fr_med_2.avi", "x+y_jog_h_np1_3.avi")


@pytest.mark.parametrize("folders", [("", "", ""), ("jog/", "wave_hand/", "jog/")])
@pytest.mark.parametrize("listed", ["", "id,name\n0,jog\n1,wave hand\n"])
def test_published_few_shot_lists(tmp_path, folders, listed):
    """Bare names and labels from 0, as ViFi-CLIP and TC-CLIP publish them, in one folder or in class folders."""
    names = [folder + name for folder, name in zip(folders, PUBLISHED, strict=True)]
    make(tmp_path / "hmdb51", *names)
    (tmp_path / "train1_few_shot_2.txt").write_text(f"{PUBLISHED[0]} 0\n{PUBLISHED[1]} 1\n")
    (tmp_path / "val1.txt").write_text(f"{PUBLISHED[2]} 0\n")
    (tmp_path / "hmdb_51_labels.csv").write_text(listed)
    lists = (tmp_path / "hmdb51", tmp_path / "train1_few_shot_2.txt", tmp_path / "val1.txt")
    if not listed and not folders[0]:
        with pytest.raises(DataError, match=r"line 1: label 0 is a number, .*no class folder; .*data\.label_names"):
            scan_lists(*lists)
        return
    splits = scan_lists(*lists, tmp_path / "hmdb_51_labels.csv" if listed else None)
    assert rows(splits.train) == [(names[0], 0), (names[1], 1)]
    assert rows(splits.val) == [(names[2], 0)]
    assert splits.id2label == {0: "jog", 1: "wave hand" if listed else "wave_hand"}
    assert any("found by their file names in folders" in note for note in splits.notes) == bool(folders[0])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.csv", 'id,name\n0,pour\n1,"put down, then up"\n2,3 steps\n'),
        ("names.csv", "2,3 steps\n0,pour\n1,put down, then up\n"),
        ("names.tsv", "id\tname\n0\tpour\n1\tput down, then up\n2\t3 steps\n"),
        ("names.csv", '\ufeffid,name\r\n1,pour\r\n2,"put down, then up"\r\n3,3 steps\r\n'),
        ("names.txt", "1 pour\n2 put down, then up\n3 3 steps\n"),
        ("names.txt", "id,name\n0,pour\n1,put down, then up\n2,3 steps"),
        ("names.txt", "pour\nput down, then up\n3 steps\n\n"),
        ("names.csv", 'pour\n"put down, then up"\n3 steps\n'),
        ("labels.json", '{"put down, then up": "1", "pour": "0", "3 steps": "2"}'),
        ("labels.json", '{"0": "pour", "2": "3 steps", "1": "put down, then up"}'),
        ("labels.json", '["pour", "put down, then up", "3 steps"]'),
    ],
)
def test_files_of_label_names(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    found = read_label_names(tmp_path / name)
    assert found.names == ["pour", "put down, then up", "3 steps"]
    assert list(found.indices.values()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("names.txt", "", "has no label names"),
        ("names.txt", "2 a\n3 b", "must count from 0 or 1"),
        ("names.txt", "0 a\n2 b", "must count from 0 or 1"),
        ("names.txt", "0 a\n0 b", "must count from 0 or 1"),
        ("names.txt", "run\n\nbend", "label name '' is empty"),
        ("names.csv", "id,name\n0,run\n1,run", "label name 'run' is .* given twice"),
        ("labels.json", '{"run": "x"}', "is not a JSON object of names and numbers"),
        ("labels.json", "{", "is not JSON"),
        ("names.txt", "\0", "is not UTF-8 text"),
    ],
)
def test_bad_files_of_label_names(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_label_names(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


TRAIN = "bend/ann 1.avi 0\nrun/ann, 2.mp4 1\n"
NAMES = ("names.txt", "bend\nrun\n")


@pytest.mark.parametrize(
    ("train", "val", "names", "message"),
    [
        (TRAIN, "run/ben.avi 2", NAMES, r"val\.txt, line 1: label 2 is not in .*names\.txt; it has 0 to 1"),
        (TRAIN, "run/ben.avi -1", NAMES, r"val\.txt, line 1: label -1 is not in"),
        (TRAIN, "run/ben.avi jump", NAMES, r"val\.txt, line 1: label 'jump' is not in .*; it has bend, run"),
        (TRAIN, "run/ben.avi 2", None, r"val\.txt, line 1: label 2 stands for the folder 'run', and so does 1"),
        (
            TRAIN,
            "run/ben.avi 0",
            None,
            r"val\.txt, line 1: label 0 stands for the folders 'bend' and 'run'; .*label_names",
        ),
        (
            "bend/ann 1.avi 0\n",
            "run/ben.avi 1",
            NAMES,
            r"val\.txt, line 1: label 'run' has no clip in .*train\.txt",
        ),
        ("bend/ann 1.avi bend", "run/ben.avi run", None, r"val\.txt, line 1: label 'run' is not in .*train\.txt"),
        # 0-based labels read by 1-based names and the other way round: both are seen.
        (TRAIN, "run/ben.avi 1", ("names.txt", "1 bend\n2 run\n"), r"train\.txt, line 1: label 0 is not in"),
        (
            "bend/ann 1.avi 1",
            "bend/cem.webm 1",
            NAMES,
            r"line 1: label 1 is 'run' in .*, but .* folder 'bend'; let both",
        ),
        (TRAIN + "bend/ann 1.avi 0", "run/ben.avi 1", None, r"train\.txt, line 3: .* listed already in .*line 1"),
        (TRAIN, "run/ben.avi 1\nrun/../bend/ann 1.avi 0", None, r"val\.txt, line 2: .*already in .*train\.txt, line 1"),
        (TRAIN, "../clips/run/ben.avi 1", None, r"val\.txt, line 1: '\.\./clips/run/ben\.avi' is outside"),
        (TRAIN, "/etc/ben.avi 1", None, r"val\.txt, line 1: '/etc/ben\.avi' is outside .*data\.source"),
        (TRAIN, "run/ben.avi 1\nrun/dan.avi 1", None, r"val\.txt: 1 of 2 clips are not below .*: run/dan\.avi; add"),
        (TRAIN, "run/dan.avi 1", None, r"val\.txt: none of its 1 clips is below .*data\.source"),
        (TRAIN, "run 20 1", None, r"val\.txt: 'run' is a folder; list video files"),
        (TRAIN + "run/ben.avi\n", "bend/cem.webm 0", None, r"train\.txt, line 3: 'run/ben\.avi' does not read like"),
        (
            TRAIN + "run/ben.avi x\n",
            "bend/cem.webm 0",
            None,
            r"train\.txt, line 3: label 'x' is of another kind than 0",
        ),
        (TRAIN, "run/ben.avi 1.0", None, r"val\.txt, line 1: label '1\.0' is neither"),
        (TRAIN, "clip,kind\nrun/ben.avi,1", None, r"val\.txt, line 1: .*; found: clip, kind; give one of path,"),
        (TRAIN, "path,label\nrun/ben.avi", None, r"val\.txt, line 2: has 1 columns, the header 2"),
        (TRAIN, "path,label\nrun/ben.avi,", None, r"val\.txt, line 2: label '' is neither"),
        (TRAIN, "path,label\n\nrun/ben.avi,1\n,1", None, r"val\.txt, line 4: '' is not a file name"),
        (TRAIN, "youtube_id,time_start,time_end,label\na,x,1,run", None, r"val\.txt, line 2: time_start and time_end"),
        (TRAIN, "", None, r"val\.txt: lists no clips"),
        (TRAIN, b"\xff\xfer\0u\0n\0", None, r"data\.val_list=.*val\.txt: is not UTF-8 text"),
        (TRAIN, b"run/ben.avi caf\xe9", None, r"val\.txt, line 1: label .* is neither .* UTF-8"),
    ],
)
def test_bad_lists(scan, train, val, names, message):
    with pytest.raises(DataError, match=message) as caught:
        scan(train, val, names)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "is not a list of clips"),
        ([7], "is not a list of clips"),
        ([], "lists no clips"),
        ([{"id": "3"}], "entry 1: label None is neither"),
        ([{"id": "3", "label": True}], "entry 1: label True is neither"),
        ([{"label": "run"}], "entry 1: names no file"),
        ([{"path": ["a"], "label": "run"}], "entry 1: names no file"),
        ([{"path": "a\0b", "label": "run"}], "entry 1: .* is not a file name"),
        ([{"path": "\ud800", "label": "run"}], "entry 1: .* is not a file name"),
    ],
)
def test_bad_json(root, tmp_path, entries, message):
    (tmp_path / "list.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=message) as caught:
        scan_lists(root, tmp_path / "list.json", tmp_path / "list.json")
    assert str(tmp_path / "list.json") in str(caught.value)


def test_files_that_cannot_be_read(root, tmp_path):
    (tmp_path / "list.txt").write_text("run/ben.avi run")
    with pytest.raises(DataError, match=r"data\.train_list=.*no\.txt: cannot be read"):
        scan_lists(root, tmp_path / "no.txt", tmp_path / "list.txt")
    with pytest.raises(DataError, match=r"data\.label_names=.*no\.json: cannot be read"):
        scan_lists(root, tmp_path / "list.txt", tmp_path / "list.txt", tmp_path / "no.json")
    with pytest.raises(DataError, match=r"data\.val_list: is not given"):
        scan_lists(root, tmp_path / "list.txt", None)
    with pytest.raises(DataError, match=r"nowhere: no such folder; give .* data\.source"):
        scan_lists(tmp_path / "nowhere", tmp_path / "list.txt", tmp_path / "list.txt")


def test_missing_clips_may_be_left_out(scan):
    train = TRAIN + "run/dan.avi 1\njump/eve.avi 2\n"
    splits = scan(train, "run/ben.avi 1", allow_missing=True)
    assert named(splits) == EXPECTED
    assert splits.missing == {"train": ("run/dan.avi", "jump/eve.avi")}
    assert any("train.txt: 2 of 4 clips are not below" in note for note in splits.notes)
    # The classes are those of the list, not of what happens to lie on this disk.
    assert splits.id2label == {0: "bend", 1: "run", 2: "jump"}
    with pytest.raises(DataError, match="none of its 1 clips"):
        scan(TRAIN, "run/dan.avi 1", allow_missing=True)


def test_absolute_paths_below_the_root(scan, root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    splits = scan(f"{root}/bend/ann 1.avi 0\n{root}/run/ann, 2.mp4 1", "run/ben.avi 1")
    assert named(splits) == EXPECTED
    splits = scan_lists(tmp_path / "link", tmp_path / "train.txt", tmp_path / "val.txt")
    assert named(splits) == EXPECTED


def test_bare_names_in_two_folders(scan, root):
    make(root, "jump/ben.avi")
    with pytest.raises(DataError, match=r"val\.txt, line 1: 'ben\.avi' may be any of jump/ben\.avi, run/ben\.avi"):
        scan(TRAIN, "ben.avi 1")


def test_links_that_lead_round_in_a_circle(scan, root):
    (root / "run/round").symlink_to(root)
    assert named(scan("ann 1.avi 0\nann, 2.mp4 1\n", "ben.avi 1")) == EXPECTED


def test_links_that_lead_nowhere_are_missing_clips(scan, root):
    (root / "run/dan.avi").symlink_to(root / "nowhere.avi")
    with pytest.raises(DataError, match=r"1 of 2 clips are not below .*: run/dan\.avi"):
        scan(TRAIN, "run/ben.avi 1\nrun/dan.avi 1")


def test_real_clips(shared, tmp_path):
    """The Weizmann clips, listed as UCF101 does: labels from 1 in training, none in the held-out list."""
    root = shared / "data/weizmann"
    clips = sorted(path.relative_to(root).as_posix() for path in root.glob("*/*.avi"))
    classes = sorted({clip.split("/")[0] for clip in clips})
    held_out = [clip for clip in clips if "/daria_" in clip]
    train = [f"{clip} {classes.index(clip.split('/')[0]) + 1}" for clip in clips if clip not in held_out]
    (tmp_path / "train.txt").write_text("\n".join(train))
    (tmp_path / "val.txt").write_text("\n".join(held_out))
    splits = scan_lists(root, tmp_path / "train.txt", tmp_path / "val.txt")
    assert (len(splits.train), len(splits.val)) == (80, 10)
    assert splits.id2label == dict(enumerate(classes))
    assert all(name.startswith(f"{label}/") for split in named(splits) for name, label in split)


def test_names_that_are_not_utf8(scan, root):
    make(root, os.fsdecode(b"run/caf\xe9.avi"))
    splits = scan(TRAIN, b"run/caf\xe9.avi 1")
    assert os.path.isfile(splits.val.video(0))


def test_folders_are_listed_once(scan, monkeypatch):
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(Path(path).name) or scandir(path))
    scan("ann 1.avi 0\nrun/ann, 2.mp4 1\n", "ben.avi 1\nrun/../bend/cem.webm 0")
    assert sorted(listed) == ["bend", "clips", "run"]


# A name: no separator of its form at its ends, and none of the letters that no file name or line can hold.
letters = st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Zl", "Zp", "Zs"), exclude_characters='/"\\')
words = (
    st.text(letters | st.sampled_from(" ,#"), min_size=1, max_size=12)
    .map(str.strip)
    .filter(lambda word: word and set(word) != {"."})
)
endings = st.sampled_from((".avi", ".mp4", ".WEBM"))
clip_names = st.builds(lambda name, ending: name + ending, words, endings)
label_texts = words.filter(lambda label: any(map(str.isalpha, label)) and "." not in label)


@st.composite
def tables(draw):
    labels = draw(st.lists(label_texts, min_size=1, max_size=4, unique=True))
    clips = draw(st.lists(clip_names, min_size=len(labels) + 1, max_size=12, unique=True))
    return labels, [(clip, index % len(labels)) for index, clip in enumerate(clips)]


def write_list(path, form, clips, labels):
    if form in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if form == "csv" else "\t")
            writer.writerows([("path", "label"), *((clip, labels[label]) for clip, label in clips)])
    elif form == "json":
        path.write_text(json.dumps([{"path": clip, "label": labels[label]} for clip, label in clips]), encoding="utf-8")
    else:
        separator = {"tabs": "\t", "commas": ",", "spaces": " "}[form.removesuffix(" frames")]
        frames = f"{separator}25" if form.endswith("frames") else ""
        path.write_bytes("".join(f"{clip}{frames}{separator}{label}\n" for clip, label in clips).encode())


FORMS = ("tabs", "commas", "spaces", "tabs frames", "commas frames", "spaces frames", "csv", "tsv", "json")


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=30, deadline=None)
@given(table=tables())
def test_what_is_written_is_read(form, table):
    labels, clips = table
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make(folder / "clips", *(clip for clip, _ in clips))
        suffix = form if form in ("csv", "tsv", "json") else "txt"
        write_list(folder / f"train.{suffix}", form, clips[:-1], labels)
        write_list(folder / f"val.{suffix}", form, clips[-1:], labels)
        (folder / "labels.json").write_text(json.dumps(labels))
        lists = (folder / "clips", folder / f"train.{suffix}", folder / f"val.{suffix}")
        splits = scan_lists(*lists, folder / "labels.json")
        assert rows(splits.train) + rows(splits.val) == clips
        assert splits.id2label == dict(enumerate(labels))
        if suffix != "txt":
            expected = [(clip, labels[label]) for clip, label in clips]
            splits = scan_lists(*lists)
            train, val = named(splits)
            assert train + val == expected
            assert list(splits.id2label.values()) == sorted(labels)


scraps = st.sampled_from(
    [b"path,label\n", b"run/ben.avi", b"\t", b",", b" ", b"\n", b"1", b'"', b"\xff", b"../", b"[{", b"9" * 5000]
)


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(scraps | st.binary(max_size=3), max_size=12), suffix=st.sampled_from((".txt", ".csv", ".json")))
def test_any_bytes_are_read_or_refused_in_a_line(parts, suffix):
    with tempfile.TemporaryDirectory() as folder:
        folder = make(Path(folder), "run/ben.avi", "run/ann.avi", "val.txt")
        (folder / "val.txt").write_text("run/ann.avi run")
        (folder / f"train{suffix}").write_bytes(b"".join(parts))
        for names in (None, folder / f"train{suffix}"):
            message, read = f"{folder}", ["run/ben.avi"]
            try:
                splits = scan_lists(folder, folder / f"train{suffix}", folder / "val.txt", names, allow_missing=True)
                read = [name for name, _ in rows(splits.train)]
            except DataError as error:
                message = str(error)
            assert str(folder) in message
            assert len(message.splitlines()) == 1
            assert read == ["run/ben.avi"]


@pytest.mark.parametrize("listed", ["bend/hangs.mp4", "bend/hangs", "hangs.mp4"])
def test_a_pipe_that_a_list_names_is_not_opened(scan, root, listed):
    os.mkfifo(root / "bend" / "hangs.mp4")
    with pytest.raises(DataError, match=r"line 2: bend/hangs\.mp4 is a FIFO, not a regular file; remove it"):
        scan(f"run/ben.avi\t1\n{listed}\t0\n", "bend/cem.webm\t0\n")


def test_lists_that_are_pipes_are_not_opened(root, tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    message = r"cannot be read \(a FIFO, not a regular file\)"
    with pytest.raises(DataError, match=f"data.train_list={tmp_path}/list.txt: {message}"):
        scan_lists(root, tmp_path / "list.txt", tmp_path / "list.txt")
    with pytest.raises(DataError, match=message):
        read_label_names(tmp_path / "list.txt")


class Name(str):
    """A name that counts how often it is compared."""

    compared = 0

    def __eq__(self, other):
        Name.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__

    def strip(self):
        return self


def test_each_name_is_compared_with_few_others(tmp_path, monkeypatch):
    (tmp_path / "names.txt").write_text("a\n")
    counts = []
    for number in (500, 5000):
        found = [(index, Name(f"name {index}")) for index in range(number)]
        monkeypatch.setattr(label_names, "_text_names", lambda path, lines, found=found: found)
        Name.compared = 0
        assert len(read_label_names(tmp_path / "names.txt").names) == number
        counts.append(Name.compared)
    assert counts[1] < 20 * max(counts[0], 500)


def test_a_name_of_ten_thousand_letters_is_shortened(tmp_path):
    (tmp_path / "names.txt").write_text(f"0 {'x' * 10_000}\n1 {'x' * 10_000}\n")
    with pytest.raises(DataError, match="given twice; give each class its own") as caught:
        read_label_names(tmp_path / "names.txt")
    assert len(str(caught.value)) < 500
