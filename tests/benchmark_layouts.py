"""Toy benchmarks in exactly the layouts of the true ones, made from clips that are rendered in code.

`local_copy` makes what people have on their disks, `published` what lies on the Hub or the web server. Both have two
classes, a few clips each, and the true names of files, folders, columns and keys.
"""

import dataclasses
import gzip
import io
import json
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from clips import render

from vidprism_hf.data.fetch.benchmark_parts import WebArchives, WebFiles
from vidprism_hf.data.sources.benchmarks import BENCHMARKS, Benchmark

CLASSES = {
    "ucf101": ("ApplyEyeMakeup", "Archery"),
    "hmdb51": ("climb", "climb_stairs"),
    "k400": ("abseiling", "arm wrestling"),
    "ssv2": ("Holding [something]", "Moving [something] up"),
}
SUFFIXES = {"ucf101": ".avi", "hmdb51": ".avi", "k400": ".mp4", "ssv2": ".webm"}
REPOSITORIES = {
    "ucf101": "quchenyuan/UCF101-ZIP",
    "hmdb51": "CVML-TueAI/HMDB51",
    "ssv2": "morpheushoc/something-something-v2",
}


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip of a toy benchmark: class index, split, and number within both."""

    label: int
    split: str
    number: int


def clips_of(train: int, val: int) -> list[Clip]:
    """So many training and held-out clips of both classes."""
    counts = {"train": train, "val": val}
    return [Clip(label, split, n) for label in (0, 1) for split, count in counts.items() for n in range(count)]


def clip_name(name: str, clip: Clip) -> str:
    """What a clip's file is called, without folder and suffix."""
    order = clip.number + (50 if clip.split == "val" else 0)
    label = CLASSES[name][clip.label]
    return {
        "ucf101": f"v_{label}_g{order + 1:02d}_c01",
        "hmdb51": f"#{order}_Reise_&_Ziel,_Teil_{label}_u_nm_np1_ba_goo_0",
        "k400": f"{clip.label}_-{order:03d}abcDEF"[:11] + "_000004_000014",
        "ssv2": str(1000 * (clip.label + 1) + order),
    }[name]


@cache
def clip_bytes(suffix: str, label: int) -> bytes:
    """A clip of 12 frames that grow brighter or darker; as a file of this kind."""
    codec = {".avi": "mpeg4", ".mp4": "libx264", ".webm": "libvpx"}[suffix]
    frames = [np.full((48, 64, 3), 40 + 12 * step, np.uint8) for step in range(12)][:: -1 if label else 1]
    with TemporaryDirectory() as folder:
        return render(Path(folder) / f"clip{suffix}", frames, codec=codec).read_bytes()


def toy(name: str, train: int = 2, val: int = 1, address: str | None = None) -> Benchmark:
    """The description of a toy benchmark, which expects so many clips of each class.

    Args:
        name: ucf101, hmdb51, k400 or ssv2.
        train: Training clips of each class.
        val: Held-out clips of each class.
        address: Where it is served: the endpoint of a Hub, or of a web server for k400.
    """
    benchmark = BENCHMARKS[name]
    parts = benchmark.parts
    if address and name == "k400":
        base = f"{address}/kinetics/400/"
        parts = {
            "lists": WebFiles(f"{base}annotations/", ("train.csv", "val.csv"), "annotations"),
            "val": WebArchives(f"{base}val/", "k400_val_path.txt", "val"),
            "train": WebArchives(
                f"{base}train/", "k400_train_path.txt", "train", f"{base}replacement_for_corrupted_k400.tgz"
            ),
        }
    elif address:
        parts = {key: dataclasses.replace(part, endpoint=address, revision="main") for key, part in parts.items()}
    counts = tuple(None if count is None else (2 * train, 2 * val) for count in benchmark.counts)
    return dataclasses.replace(benchmark, num_classes=2, counts=counts, parts=parts)


def local_copy(name: str, root: Path, train: int = 2, val: int = 1) -> Path:
    """A toy benchmark as people have it on their disks, in `root/<name>`."""
    folder = Path(root) / name
    for path, content in (_lists(name, train, val) | _videos(name, train, val)).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def _videos(name: str, train: int, val: int) -> dict[str, bytes]:
    """Paths below the benchmark's folder to contents."""
    suffix = SUFFIXES[name]
    videos = {}
    for clip in clips_of(train, val):
        label, stem = CLASSES[name][clip.label], clip_name(name, clip)
        path = {
            "ucf101": f"UCF-101/{label}/{stem}{suffix}",
            "hmdb51": f"hmdb51_org/{label}/{stem}{suffix}",
            "k400": f"{clip.split}/{label}/{stem}{suffix}",
            "ssv2": f"20bn-something-something-v2/{stem}{suffix}",
        }[name]
        videos[path] = clip_bytes(suffix, clip.label)
    return videos


def _lists(name: str, train: int, val: int) -> dict[str, bytes]:
    """Paths of the official lists below the benchmark's folder to contents."""
    clips = clips_of(train, val)
    lists: dict[str, str] = {}
    if name == "ucf101":
        lists["ucfTrainTestlist/classInd.txt"] = "".join(f"{n} {c}\r\n" for n, c in enumerate(CLASSES[name], 1))
        for split in (1, 2, 3):
            for key, file in (("train", "trainlist"), ("val", "testlist")):
                chosen = [c for c in clips if c.split == key]
                rows = [
                    f"{CLASSES[name][c.label]}/{clip_name(name, c)}.avi" + (f" {c.label + 1}" if key == "train" else "")
                    for c in chosen
                ]
                lists[f"ucfTrainTestlist/{file}{split:02d}.txt"] = "\r\n".join(rows) + "\r\n"
    elif name == "hmdb51":
        for split in (1, 2, 3):
            for index, label in enumerate(CLASSES[name]):
                rows = [
                    f"{clip_name(name, c)}.avi {1 if c.split == 'train' else 2} \n" for c in clips if c.label == index
                ]
                unused = f"unused_{label}_0.avi 0 \n"
                lists[f"testTrainMulti_7030_splits/{label}_test_split{split}.txt"] = "".join([*rows, unused])
    elif name == "k400":
        for key in ("train", "val"):
            rows = ["label,youtube_id,time_start,time_end,split"]
            for c in clips:
                if c.split == key:
                    rows.append(f"{CLASSES[name][c.label]},{clip_name(name, c)[:11]},4,14,{key}")
            lists[f"annotations/{key}.csv"] = "\n".join(rows) + "\n"
    else:
        # The numbers are strings, and not in the order of the names in the file.
        names = [label.replace("[", "").replace("]", "") for label in CLASSES[name]]
        lists["labels/labels.json"] = json.dumps({label: str(n) for n, label in reversed(list(enumerate(names)))})
        for key, file in (("train", "train"), ("val", "validation")):
            entries = [
                {
                    "id": clip_name(name, c),
                    "label": CLASSES[name][c.label].replace("[something]", "a cup").lower(),
                    "template": CLASSES[name][c.label],
                    "placeholders": ["a cup"],
                }
                for c in clips
                if c.split == key
            ]
            lists[f"labels/{file}.json"] = json.dumps(entries)
    return {path: text.encode() for path, text in lists.items()}


def published(name: str, folder: Path, train: int = 2, val: int = 1) -> Path:
    """A toy benchmark as it is published: the files of its Hub dataset, or of the web server (k400)."""
    videos, lists = _videos(name, train, val), _lists(name, train, val)
    files = {
        "ucf101": _ucf101_files,
        "hmdb51": _hmdb51_files,
        "k400": _k400_files,
        "ssv2": _ssv2_files,
    }[name](videos, lists, clips_of(train, val))
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def _ucf101_files(videos: dict[str, bytes], lists: dict[str, bytes], _) -> dict[str, bytes]:
    detection = {"ucfTrainTestlist/trainlist01.txt": b"Archery/v_Archery_g01_c01\n"}  # other lists of the same names
    return {
        "README.md": b"# UCF101-ZIP\n",
        "UCF-101.zip": _zip(videos),
        "UCF101TrainTestSplits-RecognitionTask.zip": _zip(lists),
        "UCF101TrainTestSplits-DetectionTask.zip": _zip(detection),
    }


def _hmdb51_files(videos: dict[str, bytes], lists: dict[str, bytes], clips: list[Clip]) -> dict[str, bytes]:
    files = {"README.md": b"# HMDB51\n", "webdataset/000000.tar": b"not to be fetched"} | videos
    rows = [
        {
            "video_path": f"Videos/{CLASSES['hmdb51'][clip.label]}/{clip_name('hmdb51', clip)}.avi",
            "label": CLASSES["hmdb51"][clip.label],
            "subset": 1 if clip.split == "train" else 2,
        }
        for clip in clips
    ]
    rows.append({"video_path": "Videos/climb/unused_climb_0.avi", "label": "climb", "subset": 0})
    for split in (1, 2, 3):
        table = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), table)
        files[f"data/split{split}-00000-of-00001.parquet"] = table.getvalue()
    return files


def _ssv2_files(videos: dict[str, bytes], lists: dict[str, bytes], _) -> dict[str, bytes]:
    archive = _tar_gz(videos)
    size = -(-len(archive) // 3)
    pieces = {f"videos/20bn-something-something-v2-{n:02d}": archive[n * size : (n + 1) * size] for n in range(3)}
    return {"README.md": b"# SSv2\n"} | {Path(path).name: text for path, text in lists.items()} | pieces


def _k400_files(videos: dict[str, bytes], lists: dict[str, bytes], _) -> dict[str, bytes]:
    base = "kinetics/400/"
    files = {base + path: text for path, text in lists.items()}
    for split in ("train", "val"):
        own = {Path(path).name: video for path, video in videos.items() if path.startswith(split)}
        parts = [dict(list(own.items())[start::2]) for start in (0, 1)]
        for number, part in enumerate(parts):
            files[f"{base}{split}/part_{number}.tar.gz"] = _tar_gz({f"./{name}": video for name, video in part.items()})
        addresses = [f"https://s3.amazonaws.com/kinetics/400/{split}/part_{n}.tar.gz\n" for n in range(len(parts))]
        files[f"{base}{split}/k400_{split}_path.txt"] = "".join(addresses).encode()
    # One training clip is corrupt in its part, and mended in the archive of replacements.
    broken = next(path for path in videos if path.startswith("train"))
    name = Path(broken).name
    files[f"{base}train/part_0.tar.gz"] = _tar_gz(
        {
            f"./{Path(path).name}": b"corrupt" if path == broken else video
            for path, video in [(p, v) for p, v in videos.items() if p.startswith("train")][::2]
        }
    )
    files[f"{base}replacement_for_corrupted_k400.tgz"] = _tar_gz(
        {f"replacement_for_corrupted_k400/{name}": videos[broken], "replacement_for_corrupted_k400/test.mp4": b"-"}
    )
    return files


def _zip(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _tar_gz(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()
