"""Datasets of a Hub on loopback as sources of clips: every kind of repository, and what may be wrong with one."""

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from clips import greys, render
from hub_server import Hub
from huggingface_hub import HfFileSystem
from small import LABELS
from torch.utils.data import DataLoader

from vidprism_hf.data.hub_source import hub_splits
from vidprism_hf.data.streaming import hub_streams
from vidprism_hf.data.tables import DataError
from vidprism_hf.model import decode_video
from vidprism_hf.workers import CONTEXT

FEATURES = datasets.Features({"video": datasets.Video(decode=False), "label": datasets.ClassLabel(names=list(LABELS))})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process talks to, with caches of its own."""
    with Hub() as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        HfFileSystem.clear_instance_cache()
        yield hub
        HfFileSystem.clear_instance_cache()


@pytest.fixture
def offline(monkeypatch):
    """Forbids to ask the Hub."""

    def forbid():
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    return forbid


def clip(path: Path, number: int = 0) -> Path:
    """A clip of its own length."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return render(path, greys(2 + number), codec="mpeg4")


def frames(video: str | bytes) -> int:
    return len(decode_video(video, lambda total: np.arange(total))[0])


def tree(root: Path, names: list[str]) -> Path:
    """Clips of these names; the one at place n has n + 2 frames."""
    for number, name in enumerate(names):
        clip(root / name, number)
    return root


def parquet_repository(folder: Path, clips: Path, splits=("train", "val"), **columns) -> Path:
    """Parquet files of a folder's clips, in the order of their names."""
    for split in splits:
        files = sorted(path for path in (clips / split).rglob("*.mp4"))
        rows = [{"video": {"bytes": path.read_bytes(), "path": path.name}, "label": path.parent.name} for path in files]
        data = datasets.Dataset.from_list(rows, features=FEATURES)
        for name, value in columns.items():
            data = data.add_column(name, [value(path) for path in files])
        (folder / "data").mkdir(parents=True, exist_ok=True)
        name = "validation" if split == "val" else split
        data.to_parquet(str(folder / "data" / f"{name}-00000-of-00001.parquet"))
    return folder


def card(folder: Path, **front: object) -> None:
    (folder / "README.md").write_text(f"---\n{json.dumps(front)}\n---\n")


def rewrite(folder: Path, change) -> None:
    """Changes each parquet file of a repository."""
    for path in (folder / "data").glob("*.parquet"):
        changed = change(datasets.Dataset.from_parquet(str(path)).cast_column("video", datasets.Video(decode=False)))
        changed.to_parquet(str(path))


# Tables


def test_parquet_with_embedded_videos(hub, tmp_path, motion_clips):
    hub.add_dataset("org/motions", parquet_repository(tmp_path / "repo", motion_clips))
    splits = hub_splits("org/motions", tmp_path / "root")
    assert splits.id2label == dict(enumerate(LABELS))
    assert (len(splits.train), len(splits.val)) == (8, 4)
    assert splits.train.labels.tolist() == [0] * 4 + [1] * 4
    assert splits.train.origin == "org/motions, split train"
    assert splits.train.name(5) == "train[5] 1.mp4"
    assert splits.train.video(5) == (motion_clips / "train" / LABELS[1] / "1.mp4").read_bytes()
    assert any("'validation' is held out" in note for note in splits.notes)
    some = splits.train.select([7, 0])
    assert [some.name(0), some.labels.tolist()] == ["train[7] 3.mp4", [1, 0]]
    assert frames(some.video(1)) == frames(str(motion_clips / "train" / LABELS[0] / "0.mp4"))


def size(table, index):
    return len(table.video(index))


def test_a_table_in_loader_workers(hub, tmp_path, motion_clips):
    hub.add_dataset("org/motions", parquet_repository(tmp_path / "repo", motion_clips))
    table = hub_splits("org/motions", tmp_path / "root").train
    for workers in (0, 2):
        sizes = list(
            DataLoader(
                range(8),
                batch_size=None,
                num_workers=workers,
                collate_fn=partial(size, table),
                multiprocessing_context=CONTEXT if workers else None,
            )
        )
        assert sizes == [len(table.video(index)) for index in range(8)]


def test_offline_after_a_first_use(hub, tmp_path, motion_clips, offline):
    repository = parquet_repository(tmp_path / "repo", motion_clips)
    old = hub.add_dataset("org/motions", repository).commit("main").oid
    first = hub_splits("org/motions", tmp_path / "root")
    hub.add_dataset("org/motions", parquet_repository(tmp_path / "next", motion_clips, splits=("train", "val")))
    offline()
    asked = hub.count().total()
    again = hub_splits("org/motions", tmp_path / "root")
    assert [again.train.video(index) for index in range(8)] == [first.train.video(index) for index in range(8)]
    assert again.id2label == first.id2label
    assert hub_splits("org/motions", tmp_path / "root", revision=old).id2label == first.id2label
    with pytest.raises(DataError, match="org/other: is not in the cache"):
        hub_splits("org/other", tmp_path / "root")
    assert hub.count().total() == asked


def test_texts_as_labels_and_a_held_out_share(hub, tmp_path, motion_clips):
    repository = parquet_repository(
        tmp_path / "repo", motion_clips, splits=("train",), action=lambda path: path.parent.name
    )
    rewrite(repository, lambda data: data.remove_columns("label"))
    hub.add_dataset("org/motions", repository)
    with pytest.raises(DataError, match=r"no held-out split but train; .* data\.val_fraction"):
        hub_splits("org/motions", tmp_path / "root")
    splits = hub_splits("org/motions", tmp_path / "root", val_fraction=0.25, seed=3)
    assert splits.id2label == dict(enumerate(sorted(LABELS)))
    assert sorted(splits.val.labels) == [0, 1]
    names = [table.name(index) for table in (splits.train, splits.val) for index in range(len(table))]
    assert len(set(names)) == 8
    same = hub_splits("org/motions", tmp_path / "root", val_fraction=0.25, seed=3)
    assert same.val.rows.tolist() == splits.val.rows.tolist()


def test_numbers_get_their_names_from_another_column_or_a_file(hub, tmp_path, motion_clips):
    def number(data):
        return data.cast_column("label", datasets.Value("int64"))

    hub.add_dataset("org/bare", parquet_repository(tmp_path / "bare", motion_clips))
    rewrite(tmp_path / "bare", number)
    hub.add_dataset("org/bare", tmp_path / "bare")
    with pytest.raises(DataError, match=r"numbers without names; give their names as data\.label_names"):
        hub_splits("org/bare", tmp_path / "root")
    (tmp_path / "names.txt").write_text("up\ndown\n")
    named = hub_splits("org/bare", tmp_path / "root", label_names=str(tmp_path / "names.txt"))
    assert named.id2label == {0: "up", 1: "down"}
    columns = {"class_name": lambda path: f"it is {path.parent.name}"}
    rewrite(parquet_repository(tmp_path / "named", motion_clips, **columns), number)
    hub.add_dataset("org/named", tmp_path / "named")
    assert hub_splits("org/named", tmp_path / "root").id2label == {0: f"it is {LABELS[0]}", 1: f"it is {LABELS[1]}"}


def test_configurations_revisions_splits_and_columns(hub, tmp_path, motion_clips):
    repository = parquet_repository(tmp_path / "repo", motion_clips)
    files = {split: f"data/{split}-*" for split in ("train", "validation")}
    configs = [
        {"config_name": "full", "data_files": [{"split": name, "path": path} for name, path in files.items()]},
        {"config_name": "swapped", "data_files": [{"split": "train", "path": files["validation"]}]},
    ]
    card(repository, configs=configs)
    hub.add_dataset("org/motions", repository)
    ask = {"source": "org/motions", "root": tmp_path / "root"}
    assert len(hub_splits(**ask, config="full").train) == 8
    assert len(hub_splits(**ask, config="swapped", val_fraction=0.5).train) == 2
    for settings, message in (
        ({}, "Config name is missing"),
        ({"config": "none"}, "'none' not found"),
        ({"config": "full", "revision": "v9"}, "no revision 'v9'"),
        (
            {"config": "full", "train_split": "all"},
            r"no split 'all' but train, validation; name one as data\.train_split",
        ),
        ({"config": "full", "val_split": "test"}, r"no split 'test' but .* data\.val_split"),
        ({"config": "full", "val_split": "train"}, "is the training split"),
        ({"config": "full", "video_column": "label"}, "'label' holds no videos; its columns are video, label"),
        ({"config": "full", "label_column": "action"}, "no column 'action'"),
        ({"config": "full", "val_pattern": "x"}, r"data\.val_pattern: .* has rows"),
        ({"config": "full", "val_fraction": 2.0}, "between 0 and 1"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            hub_splits(**ask, **settings)
        assert "\n" not in str(caught.value)


def test_splits_must_have_the_same_labels(hub, tmp_path):
    repository = tree(tmp_path / "repo", ["v/a.mp4", "v/b.mp4"])
    for split, label in (("train", "run"), ("test", "walk")):
        row = {"file_name": f"v/{'a' if split == 'train' else 'b'}.mp4", "label": label}
        datasets.Dataset.from_list([row]).to_parquet(str(repository / f"{split}.parquet"))
    hub.add_dataset("org/labels", repository)
    with pytest.raises(DataError, match="split test: row 0 has label 'walk', which no training clip has"):
        hub_splits("org/labels", tmp_path / "root")


def test_damaged_parquet(hub, tmp_path, motion_clips):
    repository = parquet_repository(tmp_path / "repo", motion_clips)
    path = repository / "data" / "validation-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    hub.add_dataset("org/motions", repository)
    with pytest.raises(DataError, match=r"org/motions: cannot be loaded \(.*[Pp]arquet") as caught:
        hub_splits("org/motions", tmp_path / "root")
    assert "\n" not in str(caught.value)


def test_hidden_labels(hub, tmp_path, motion_clips):
    repository = parquet_repository(tmp_path / "repo", motion_clips)
    path = repository / "data" / "validation-00000-of-00001.parquet"
    data = datasets.Dataset.from_parquet(str(path)).cast_column("video", datasets.Video(decode=False))
    data.map(lambda row: {"label": -1}, features=data.features).to_parquet(str(path))
    hub.add_dataset("org/motions", repository)
    with pytest.raises(DataError, match="split validation: row 0 has no label"):
        hub_splits("org/motions", tmp_path / "root")


def test_tables_without_videos_or_labels(hub, tmp_path):
    for name, row, message in (
        ("no-video", {"text": 1, "label": "a"}, "no column of videos"),
        ("no-label", {"video": "a.mp4", "text": "a"}, "no column of labels"),
        ("no-clip", {"video": "a.mp4", "label": "a"}, "1 clips are not in the repository, like a.mp4"),
    ):
        (tmp_path / name).mkdir()
        datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / name / "train.parquet"))
        datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / name / "test.parquet"))
        hub.add_dataset(f"org/{name}", tmp_path / name)
        with pytest.raises(DataError, match=message):
            hub_splits(f"org/{name}", tmp_path / "root")


def test_listed_clips_may_be_missing_if_that_is_allowed(hub, tmp_path):
    repository = tree(tmp_path / "repo", ["v/a.mp4", "v/b.mp4"])
    for split in ("train", "test"):
        rows = [{"file_name": name, "label": "x"} for name in ("a.mp4", "b.mp4", "gone.mp4")]
        datasets.Dataset.from_list(rows).to_parquet(str(repository / f"{split}.parquet"))
    hub.add_dataset("org/some", repository)
    with pytest.raises(DataError, match=r"1 clips are not in the repository, like v/gone\.mp4; .*data\.allow_missing"):
        hub_splits("org/some", tmp_path / "root")
    splits = hub_splits("org/some", tmp_path / "root", allow_missing=True)
    assert [splits.train.name(index) for index in range(len(splits.train))] == ["v/a.mp4", "v/b.mp4"]
    assert splits.missing == {"train": ("v/gone.mp4",), "val": ("v/gone.mp4",)}
    assert sum("1 of 3 clips are not in the repository" in note for note in splits.notes) == 2


# The form of CVML-TueAI/HMDB51: splits named split1..3, rows with the path of a file and a subset number


def hmdb_repository(folder: Path) -> Path:
    names = [f"Videos/{label}/{number}.avi" for label in ("brush_hair", "wave") for number in range(4)]
    tree(folder, names)
    (folder / "data").mkdir()
    for split in (1, 2, 3):
        rows = [
            {"video_path": name, "label": name.split("/")[1], "subset": (number + split) % 4 % 3}
            for number, name in enumerate(names)
        ]
        datasets.Dataset.from_list(rows).to_parquet(str(folder / "data" / f"split{split}-00000-of-00001.parquet"))
    files = [{"split": f"split{number}", "path": f"data/split{number}-*"} for number in (1, 2, 3)]
    card(folder, configs=[{"config_name": "default", "data_files": files}])
    return folder


def test_rows_that_name_files_and_their_subset(hub, tmp_path, offline):
    hub.add_dataset("org/hmdb51", hmdb_repository(tmp_path / "repo"))
    with pytest.raises(DataError, match="no split 'train' but split1, split2, split3"):
        hub_splits("org/hmdb51", tmp_path / "root")
    splits = hub_splits("org/hmdb51", tmp_path / "root", train_split="split1")
    assert splits.id2label == {0: "brush_hair", 1: "wave"}
    named = {split: [table.name(index) for index in range(len(table))] for split, table in
             (("train", splits.train), ("val", splits.val))}  # fmt: skip
    assert named["train"] == [f"Videos/{label}/{number}.avi" for label in ("brush_hair", "wave") for number in (0,)]
    assert named["val"] == [f"Videos/{label}/1.avi" for label in ("brush_hair", "wave")]
    assert [frames(splits.val.video(index)) for index in (0, 1)] == [3, 7]
    assert any("subset 1 are for training, with 2 held out; 4 others are not used" in note for note in splits.notes)
    streams = hub_streams("org/hmdb51", train_split="split1")
    assert [(row.name, frames(row.video), row.label) for row in streams.val] == [
        ("Videos/brush_hair/1.avi", 3, 0),
        ("Videos/wave/1.avi", 7, 1),
    ]
    assert (streams.num_train, streams.num_val) == (2, 2)
    offline()
    again = hub_splits("org/hmdb51", tmp_path / "root", train_split="split1")
    assert again.train.video(0) == splits.train.video(0)


# Videos in folders


def test_class_folders(hub, tmp_path, motion_clips, offline):
    shutil.copytree(motion_clips, tmp_path / "repo" / "clips")
    shutil.copytree(motion_clips / "train" / LABELS[0], tmp_path / "repo" / "clips" / "train" / "same again")
    shutil.copytree(motion_clips / "val" / LABELS[0], tmp_path / "repo" / "clips" / "val" / "same again")
    card(tmp_path / "repo", license="mit")
    hub.add_dataset("org/folders", tmp_path / "repo")
    splits = hub_splits("org/folders", tmp_path / "root")
    assert list(splits.id2label.values()) == sorted([*LABELS, "same again"])
    assert (len(splits.train), len(splits.val)) == (12, 6)
    assert Path(splits.train.video(0)).is_relative_to(tmp_path / "root")
    asked = hub.count("content")
    offline()
    assert len(hub_splits("org/folders", tmp_path / "root").train) == 12
    assert hub.count("content") == asked
    next((tmp_path / "root").rglob("*.mp4")).unlink()
    with pytest.raises(DataError, match=r"1 of 18 files are not in .* \(HF_HUB_OFFLINE\)"):
        hub_splits("org/folders", tmp_path / "root")


def test_one_level_of_class_folders_in_a_form_datasets_does_not_know(hub, tmp_path):
    for label in ("a", "b"):
        for number in range(3):
            path = tmp_path / "repo" / label / f"{number}.webm"
            path.parent.mkdir(parents=True, exist_ok=True)
            render(path, greys(2 + number), codec="libvpx")
    hub.add_dataset("org/webm", tmp_path / "repo")
    with pytest.raises(DataError, match=r"give exactly one of data\.val_fraction"):
        hub_splits("org/webm", tmp_path / "root")
    splits = hub_splits("org/webm", tmp_path / "root", val_pattern="^2")
    assert [frames(splits.val.video(index)) for index in (0, 1)] == [4, 4]


def test_videos_with_metadata(hub, tmp_path):
    for split in ("train", "test"):
        tree(tmp_path / "repo" / split, ["x.mp4", "deep/y.mp4"])
        (tmp_path / "repo" / split / "metadata.csv").write_text("file_name,label\nx.mp4,jump\ndeep/y.mp4,crawl\n")
    hub.add_dataset("org/metadata", tmp_path / "repo")
    splits = hub_splits("org/metadata", tmp_path / "root")
    assert splits.id2label == {0: "crawl", 1: "jump"}
    assert [splits.train.name(0), splits.val.name(1)] == ["train/x.mp4", "test/deep/y.mp4"]
    assert splits.train.labels.tolist() == [1, 0]
    assert [frames(splits.train.video(index)) for index in (0, 1)] == [2, 3]
    rows = sorted(hub_streams("org/metadata").train)
    assert [(row.name, row.label, frames(row.video)) for row in rows] == [
        ("train/deep/y.mp4", 0, 3),
        ("train/x.mp4", 1, 2),
    ]


# Archives


def ucf_repository(folder: Path) -> Path:
    """Videos in one zip, the official lists in another."""
    names = [f"UCF-101/{label}/v_{label}_g{number}.avi" for label in ("Archery", "YoYo") for number in range(3)]
    clips = tree(folder.with_name("clips"), names)
    folder.mkdir()
    with zipfile.ZipFile(folder / "UCF101.zip", "w") as archive:
        for name in names:
            archive.write(clips / name, name)
    short = [name.removeprefix("UCF-101/") for name in names]
    with zipfile.ZipFile(folder / "Splits.zip", "w") as archive:
        archive.writestr("lists/classInd.txt", "1 Archery\n2 YoYo\n")
        archive.writestr(
            "lists/train.txt", "".join(f"{name} {1 + ('YoYo' in name)}\n" for name in short if "g0" not in name)
        )
        archive.writestr("lists/test.txt", "".join(f"{name}\n" for name in short if "g0" in name))
    return folder


def test_archives_with_lists(hub, tmp_path, offline):
    hub.add_dataset("org/ucf", ucf_repository(tmp_path / "repo"))
    lists = {
        "train_list": "Splits/lists/train.txt",
        "val_list": "Splits/lists/test.txt",
        "label_names": "Splits/lists/classInd.txt",
    }
    splits = hub_splits("org/ucf", tmp_path / "root", **lists)
    assert splits.id2label == {0: "Archery", 1: "YoYo"}
    assert splits.train.labels.tolist() == [0, 0, 1, 1]
    assert [splits.val.name(index) for index in (0, 1)] == ["Archery/v_Archery_g0.avi", "YoYo/v_YoYo_g0.avi"]
    assert frames(splits.val.video(1)) == 5
    with pytest.raises(DataError, match=r"data\.train_list=none\.txt: no such file .*Splits/lists/test\.txt"):
        hub_splits("org/ucf", tmp_path / "root", train_list="none.txt", val_list="none.txt")
    with pytest.raises(DataError, match=r"data\.val_split: org/ucf is read as files"):
        hub_splits("org/ucf", tmp_path / "root", val_split="test")
    with pytest.raises(DataError, match="archives, which cannot be streamed"):
        hub_streams("org/ucf")
    offline()
    assert len(hub_splits("org/ucf", tmp_path / "root", val_pattern="g0").val) == 2


def test_a_tar_in_parts_and_an_archive_for_each_split(hub, tmp_path, motion_clips):
    (tmp_path / "parts").mkdir()
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as archive:
        archive.add(motion_clips, "motions")
    data = (tmp_path / "all.tar.gz").read_bytes()
    for name, part in (("aa", data[:5000]), ("ab", data[5000:])):
        (tmp_path / "parts" / f"motions.tar.gz.part-{name}").write_bytes(part)
    (tmp_path / "splits").mkdir()
    for split, prefix in (("train", "train/"), ("val", "")):
        with zipfile.ZipFile(tmp_path / "splits" / f"{split}.zip", "w") as archive:
            for path in (motion_clips / split).rglob("*.mp4"):
                archive.write(path, f"{prefix}{path.relative_to(motion_clips / split)}")
    for name in ("parts", "splits"):
        hub.add_dataset(f"org/{name}", tmp_path / name)
        splits = hub_splits(f"org/{name}", tmp_path / "root")
        assert (len(splits.train), len(splits.val), splits.id2label) == (8, 4, dict(enumerate(LABELS)))


# Streaming


def test_streamed_parquet(hub, tmp_path, motion_clips):
    hub.add_dataset("org/motions", parquet_repository(tmp_path / "repo", motion_clips))
    streams = hub_streams("org/motions", batch_size=4)
    assert (streams.num_train, streams.num_val, streams.id2label) == (8, 4, dict(enumerate(LABELS)))
    expected = {path.read_bytes(): LABELS.index(path.parent.name) for path in (motion_clips / "val").rglob("*.mp4")}
    assert {row.video: row.label for row in streams.val} == expected
    rows = list(streams.train)
    assert len({row.name for row in rows}) == len(rows) == len(streams.train) == 8
    assert all(row.name.startswith("train ") for row in rows)


def test_streamed_parquet_in_workers(hub, tmp_path, motion_clips):
    repository = parquet_repository(tmp_path / "repo", motion_clips)
    first = repository / "data" / "train-00000-of-00001.parquet"
    data = datasets.Dataset.from_parquet(str(first)).cast_column("video", datasets.Video(decode=False))
    for number in range(4):
        rows = data.select(range(2 * number, 2 * number + 2))
        rows.to_parquet(str(first.with_name(f"train-{number:05}-of-00004.parquet")))
    first.unlink()
    hub.add_dataset("org/motions", repository)
    streams = hub_streams("org/motions", batch_size=2)
    loader = DataLoader(streams.train, batch_size=2, num_workers=2, collate_fn=list, multiprocessing_context=CONTEXT)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [2] * len(loader) == [2] * 4
    assert sorted(row.video for batch in batches for row in batch) == sorted(row["video"]["bytes"] for row in data)


def test_streamed_texts_are_known_beforehand(hub, tmp_path, motion_clips):
    repository = parquet_repository(tmp_path / "repo", motion_clips, action=lambda path: path.parent.name)
    rewrite(repository, lambda data: data.remove_columns("label"))
    hub.add_dataset("org/motions", repository)
    streams = hub_streams("org/motions")
    assert streams.id2label == dict(enumerate(sorted(LABELS)))
    assert sorted(row.label for row in streams.train) == [0] * 4 + [1] * 4


def test_streamed_class_folders(hub, tmp_path):
    names = [f"{split}/{label}/{number}.mp4" for split in ("train", "test") for label in "ab" for number in (0, 1)]
    hub.add_dataset("org/folders", tree(tmp_path / "repo", names))
    streams = hub_streams("org/folders")
    assert (streams.num_train, streams.num_val, streams.id2label) == (4, 4, {0: "a", 1: "b"})
    assert sorted((row.name, row.label, frames(row.video)) for row in streams.val) == [
        (name, "ab".index(name.split("/")[1]), 2 + number) for number, name in enumerate(names) if "test" in name
    ]
    loader = DataLoader(streams.val, batch_size=None, num_workers=2, collate_fn=tuple, multiprocessing_context=CONTEXT)
    assert sorted(row[0] for row in loader) == [name for name in sorted(names) if "test" in name]
    with pytest.raises(DataError, match="it has test, train"):
        hub_streams("org/folders", train_split="all")


# What the Hub answers


def test_private_gated_missing_and_ill_named(hub, tmp_path, motion_clips, monkeypatch):
    repository = parquet_repository(tmp_path / "repo", motion_clips)
    hub.add_dataset("org/private", repository, private=True)
    hub.add_dataset("org/gated", repository, gated=True)
    for source in ("org/private", "org/none"):
        with pytest.raises(DataError, match=f"{source}: no such dataset on the Hub, or a private one"):
            hub_splits(source, tmp_path / "root")
    with pytest.raises(DataError, match="org/gated: is gated"):
        hub_splits("org/gated", tmp_path / "root")
    with pytest.raises(DataError, match="is no dataset id"):
        hub_splits("a/b/c", tmp_path / "root")
    token = hub.user("alice", orgs={"org": "read"})
    monkeypatch.setenv("HF_TOKEN", token)
    assert len(hub_splits("org/private", tmp_path / "root").train) == 8
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    with pytest.raises(DataError) as caught:
        hub_splits("org/none", tmp_path / "root")
    assert "hf_" not in str(caught.value)


def test_a_hub_that_cannot_be_reached(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    for use in (lambda: hub_splits("org/motions", tmp_path / "root"), lambda: hub_streams("org/motions")):
        with pytest.raises(DataError, match="is not in the cache, and the Hub cannot be reached"):
            use()


def test_a_repository_without_clips(hub, tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "notes.txt").write_text("no clips here")
    hub.add_dataset("org/notes", tmp_path / "repo")
    with pytest.raises(DataError, match="org/notes: "):
        hub_splits("org/notes", tmp_path / "root")


CODE = """
import sys
from vidprism_hf.data.hub_source import hub_splits
splits = hub_splits("org/motions", sys.argv[1])
print(len(splits.train), len(splits.val), splits.train.name(0), len(splits.train.video(0)))
"""


@pytest.mark.slow
def test_in_a_clean_process_and_then_offline(tmp_path, motion_clips):
    with Hub() as hub:
        hub.add_dataset("org/motions", parquet_repository(tmp_path / "repo", motion_clips))
        environment = hub.environment(tmp_path / "home")
        said = []
        for more in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}):
            command = [sys.executable, "-c", CODE, str(tmp_path / "root")]
            run = subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=200)
            assert run.returncode == 0, run.stderr[-3000:]
            said.append(run.stdout)
    size = (motion_clips / "train" / LABELS[0] / "0.mp4").stat().st_size
    assert said == [f"8 4 train[0] 0.mp4 {size}\n"] * 2
