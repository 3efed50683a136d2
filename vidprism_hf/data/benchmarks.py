"""The four benchmarks: UCF101, HMDB51, Kinetics-400 and Something-Something v2, by their official lists.

A benchmark lies in `root/<name>/`. What is there is used: the clips and the official lists, in the layouts that people
have them in.

| name   | clips                                          | lists                                                    |
| ------ | ---------------------------------------------- | -------------------------------------------------------- |
| ucf101 | `UCF-101/<Class>/*.avi`                        | `ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt` |
| hmdb51 | `hmdb51_org/<class>/*.avi`                     | `testTrainMulti_7030_splits/<class>_test_split1.txt`     |
| k400   | `train/**/<id>_<start>_<end>.mp4`, `val/**`    | `annotations/{train,val}.csv`                            |
| ssv2   | `20bn-something-something-v2/<id>.webm`        | `labels/{labels,train,validation}.json`                  |

Folders may have other names, lie one level deeper or be left out. What is missing, the clips or the lists, is fetched
(benchmark_parts.py tells how). `manifest.json` says where everything came from and how many clips there are;
`missing_<split>.txt` lists the clips that are not there.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..util import atomic_write
from .benchmark_lists import Absent, Lists, find_hmdb51, find_k400, find_ssv2, find_ucf101
from .benchmark_parts import DOWNLOADS, HubPart, Part, WebArchives, WebFiles, fetch_part, hmdb51_lists, unfinished
from .download import say
from .folder import VIDEO_EXTENSIONS
from .lists import scan_lists
from .tables import ClipSplits, DataError

MANIFEST = "manifest.json"
LOCAL = "local copy"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: Its short name.
        title: Its own name.
        num_classes: Official number of classes.
        counts: For each official split the numbers of training and of held-out clips that its lists name; None where
            the lists in use differ.
        complete: Whether all these clips can be had. Of the others some are gone for good.
        parts: What it is fetched in: `lists`, and `clips` or, apart, `train` and `val`.
        find_lists: Finds the lists below a folder for a split; may write some into a scratch folder.
        terms: Licence and terms, in a line.
        home: Where a person finds clips and lists.
    """

    name: str
    title: str
    num_classes: int
    counts: tuple[tuple[int, int] | None, ...]
    complete: bool
    parts: dict[str, Part]
    find_lists: Callable[[Path, int, Path], Lists]
    terms: str
    home: str

    @property
    def num_splits(self) -> int:
        """How many official splits there are."""
        return len(self.counts)


@dataclass
class Manifest:
    """What there is of a benchmark; kept as `manifest.json`.

    Attributes:
        name: The benchmark.
        sources: Part to where it came from: an address with the commit, or `local copy`.
        splits: Number of an official split to `lists` (file to SHA-256), `classes`, and for `train` and `val` the
            numbers of clips `expected` (null: not known), `listed`, `found` and `missing`.
        date: When this was found so.
    """

    name: str
    sources: dict[str, str] = field(default_factory=dict)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    date: str = ""

    def __str__(self) -> str:
        lines = [f"{self.name}: {'; '.join(f'{part} from {origin}' for part, origin in self.sources.items())}"]
        for number, split in self.splits.items():
            counts = ", ".join(f"{split[name]['found']} of {split[name]['listed']} {name} clips" for name in SPLITS)
            lines.append(f"  split {number}: {split['classes']} classes, {counts}")
        return "\n".join(lines)


def prepare(benchmark: str | Benchmark, root: str | os.PathLike, split: int = 1, verify: bool = True) -> Manifest:
    """Makes sure that a benchmark is there: fetches what is missing, verifies the counts, writes the manifest.

    A second call only looks whether all is as it was.

    Args:
        benchmark: Name (ucf101, hmdb51, k400, ssv2) or description.
        root: The folder that holds, or will hold, a folder of the benchmark's name.
        split: Which official split, counted from 1.
        verify: Whether counts that differ from the official ones are an error; if not, they are a note.

    Raises:
        DataError: If something cannot be fetched, read or written, or counts differ.
    """
    return _prepare(benchmark, root, split, verify)[1]


def benchmark_splits(
    benchmark: str | Benchmark, root: str | os.PathLike, split: int = 1, verify: bool = True
) -> ClipSplits:
    """The clips of an official split, fetched first where they are not there: see `prepare` for the arguments.

    `train` is the official training list, `val` the official test list (ucf101, hmdb51) or validation list (k400,
    ssv2). Clips that are not there are in `missing` and in `notes`.
    """
    return _prepare(benchmark, root, split, verify)[0]


def _prepare(
    benchmark: str | Benchmark, root: str | os.PathLike, split: int, verify: bool
) -> tuple[ClipSplits, Manifest]:
    if isinstance(benchmark, str):
        if benchmark not in BENCHMARKS:
            raise DataError(f"{benchmark}: no such benchmark; there are {', '.join(BENCHMARKS)}")
        benchmark = BENCHMARKS[benchmark]
    if not 1 <= split <= benchmark.num_splits:
        raise DataError(f"data.split={split}: {benchmark.name} has the splits 1 to {benchmark.num_splits}")
    folder = Path(root) / benchmark.name
    try:
        if _missing_parts(benchmark, folder, split):
            _fetch(benchmark, folder, split)
        found, digests = _scan(benchmark, folder, split)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read or written ({error.strerror})") from error
    counts = _counts(benchmark, split, found)
    manifest = _read_manifest(folder) or Manifest(benchmark.name)
    manifest.sources = {key: manifest.sources.get(key, LOCAL) for key in benchmark.parts}
    manifest.splits[str(split)] = {"lists": digests, "classes": len(found.id2label), **counts}
    notes = _write_records(benchmark, folder, split, manifest, found)
    problems = _problems(benchmark, counts, found)
    if problems and verify:
        raise DataError(
            f"{folder}: {'; '.join(problems)}; complete the copy ({benchmark.home}), or move it away to have it "
            "fetched, or set data.verify_counts to false"
        )
    if problems:
        notes.append(f"{folder}: is not the whole {benchmark.title}: {'; '.join(problems)}")
    if found.missing and not benchmark.complete:
        there = " and ".join(f"{counts[name]['found']} of {counts[name]['listed']} {name} clips" for name in SPLITS)
        notes.append(f"{folder}: {there} are there; {_missing_file(benchmark, split, '*')} list the others")
    return dataclasses.replace(found, notes=tuple(notes)), manifest


def _missing_parts(benchmark: Benchmark, folder: Path, split: int) -> dict[str, str]:
    """The parts that must be fetched, or whose fetching was begun, and what is missing of each."""
    missing = {key: "clip" if key == "clips" else f"{key} clip" for key in benchmark.parts if key != "lists"}
    missing = {key: what for key, what in missing.items() if not _has_clips(folder, key)}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            benchmark.find_lists(folder, split, Path(scratch))
    except Absent as absent:
        missing["lists"] = str(absent)
    missing |= {key: f"complete {key}" for key in benchmark.parts if unfinished(folder, key)}
    return {key: missing[key] for key in benchmark.parts if key in missing}


def _has_clips(folder: Path, key: str) -> bool:
    """Whether there is any clip of a part: of all, or outside the folders of the other splits."""
    others = {"train": ("val", "test"), "val": ("train", "test")}.get(key, ())
    for directory, children, files in os.walk(folder, followlinks=True):
        if any(os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS for name in files):
            return True
        children[:] = [name for name in children if not name.startswith(".")]
        if Path(directory) == folder:
            children[:] = [name for name in children if not name.startswith((DOWNLOADS, "replacement", *others))]
    return False


def _fetch(benchmark: Benchmark, folder: Path, split: int) -> None:
    """Fetches what is missing; processes that start together wait for the first."""
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        what = " and no ".join(_missing_parts(benchmark, folder, split).values())
        raise DataError(
            f"{folder}: has no {what}, and cannot be written ({error.strerror}); get them from {benchmark.home}"
        ) from error
    origins: dict[str, str] = {}
    try:
        while missing := _missing_parts(benchmark, folder, split):
            key, what = next(iter(missing.items()))
            if key in origins:
                raise DataError(f"{folder}: has no {what}, nor has {origins[key]}; get it from {benchmark.home}")
            say(f"{benchmark.title}: fetching its {key}. {benchmark.terms}")
            try:
                origins[key] = fetch_part(benchmark.parts[key], folder, key)
            except DataError as error:
                raise DataError(f"{folder}: has no {what}: {error}; by hand: {benchmark.home}") from error
            manifest = _read_manifest(folder) or Manifest(benchmark.name)
            manifest.sources[key] = origins[key]
            _write_manifest(folder, manifest)
    finally:
        lock.release()


def _scan(benchmark: Benchmark, folder: Path, split: int) -> tuple[ClipSplits, dict[str, str]]:
    """The clips of a split, and the SHA-256 of each official file that names them."""
    with tempfile.TemporaryDirectory() as scratch:
        lists = benchmark.find_lists(folder, split, Path(scratch))
        try:
            found = scan_lists(lists.source, lists.train, lists.val, lists.label_names, allow_missing=True)
        except DataError as error:
            raise DataError(str(error).replace(f"{scratch}{os.sep}", "")) from error
        digests = {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in lists.official
        }
    return found, digests


def _counts(benchmark: Benchmark, split: int, found: ClipSplits) -> dict[str, dict[str, int | None]]:
    expected = benchmark.counts[split - 1] or (None, None)
    counts = {}
    for name, official in zip(SPLITS, expected, strict=True):
        present, missing = len(getattr(found, name)), len(found.missing.get(name, ()))
        counts[name] = {"expected": official, "listed": present + missing, "found": present, "missing": missing}
    return counts


def _problems(benchmark: Benchmark, counts: dict[str, dict[str, int | None]], found: ClipSplits) -> list[str]:
    """How a copy differs from the official numbers."""
    problems = []
    if benchmark.num_classes is not None and len(found.id2label) != benchmark.num_classes:
        problems.append(f"{len(found.id2label)} classes instead of {benchmark.num_classes}")
    for name, count in counts.items():
        if count["expected"] not in (None, count["listed"]):
            problems.append(f"its {name} list names {count['listed']} clips instead of {count['expected']}")
        if benchmark.complete and count["missing"]:
            problems.append(
                f"{count['missing']} of {count['listed']} {name} clips are missing, the first {found.missing[name][0]}"
            )
    return problems


def _missing_file(benchmark: Benchmark, split: int, name: str) -> str:
    return f"missing_{name}.txt" if benchmark.num_splits == 1 else f"missing_{name}_split{split}.txt"


def _write_records(benchmark: Benchmark, folder: Path, split: int, manifest: Manifest, found: ClipSplits) -> list[str]:
    """Writes the manifest and the lists of missing clips; returns a note if the folder cannot be written."""
    try:
        for name in SPLITS:
            path = folder / _missing_file(benchmark, split, name)
            if missing := found.missing.get(name):
                _write_text(path, "".join(f"{clip}\n" for clip in missing))
            else:
                path.unlink(missing_ok=True)
        _write_manifest(folder, manifest)
    except OSError as error:
        return [f"{folder}: {MANIFEST} was not written ({error.strerror})"]
    return []


def _read_manifest(folder: Path) -> Manifest | None:
    try:
        manifest = Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # it only tells what there is: a new one is as good
    return manifest if isinstance(manifest.sources, dict) and isinstance(manifest.splits, dict) else None


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest with today's date unless it says the same already."""
    if _read_manifest(folder) == manifest:
        return
    manifest.date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    _write_text(folder / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    atomic_write(path, text.encode("utf-8", "surrogateescape"))


_UCF101_HUB = {"repo": "quchenyuan/UCF101-ZIP"}
_HMDB51_HUB = {"repo": "CVML-TueAI/HMDB51"}
_SSV2_HUB = {"repo": "morpheushoc/something-something-v2"}
_K400_WEB = "https://s3.amazonaws.com/kinetics/400/"

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="ucf101",
            title="UCF101",
            num_classes=101,
            counts=((9537, 3783), (9586, 3734), (9624, 3696)),
            complete=True,
            parts={
                "lists": HubPart(
                    patterns=("UCF101TrainTestSplits-RecognitionTask.zip",),
                    target="ucfTrainTestlist",
                    archive=True,
                    **_UCF101_HUB,
                ),
                "clips": HubPart(patterns=("UCF-101.zip",), target="UCF-101", archive=True, **_UCF101_HUB),
            },
            find_lists=find_ucf101,
            terms="For research; the clips are from YouTube and their owners'.",
            home="https://www.crcv.ucf.edu/data/UCF101.php",
        ),
        Benchmark(
            name="hmdb51",
            title="HMDB51",
            num_classes=51,
            counts=((3570, 1530),) * 3,
            complete=True,
            parts={
                "lists": HubPart(
                    patterns=("data/split*.parquet",),
                    target="testTrainMulti_7030_splits",
                    convert=hmdb51_lists,
                    **_HMDB51_HUB,
                ),
                # The dataset's card calls the folder Videos.
                "clips": HubPart(patterns=("hmdb51_org/*", "Videos/*"), target="hmdb51_org", **_HMDB51_HUB),
            },
            find_lists=find_hmdb51,
            terms="CC BY 4.0.",
            home="https://huggingface.co/datasets/CVML-TueAI/HMDB51",
        ),
        Benchmark(
            name="k400",
            title="Kinetics-400",
            num_classes=400,
            counts=(None,),
            complete=False,
            parts={
                "lists": WebFiles(f"{_K400_WEB}annotations/", ("train.csv", "val.csv"), "annotations"),
                "val": WebArchives(f"{_K400_WEB}val/", "k400_val_path.txt", "val"),
                "train": WebArchives(
                    f"{_K400_WEB}train/",
                    "k400_train_path.txt",
                    "train",
                    replacements=f"{_K400_WEB}replacement_for_corrupted_k400.tgz",
                ),
            },
            find_lists=find_k400,
            terms="The lists are CC BY 4.0; the clips are from YouTube and their owners'.",
            home="https://github.com/cvdfoundation/kinetics-dataset",
        ),
        Benchmark(
            name="ssv2",
            title="Something-Something v2",
            num_classes=174,
            counts=((168913, 24777),),
            complete=False,
            parts={
                "lists": HubPart(
                    patterns=("labels.json", "train.json", "validation.json"), target="labels", **_SSV2_HUB
                ),
                "clips": HubPart(
                    patterns=("videos/20bn-something-something-v2-*",),
                    target="20bn-something-something-v2",
                    archive=True,
                    **_SSV2_HUB,
                ),
            },
            find_lists=find_ssv2,
            terms="For research under Qualcomm's licence, which must be accepted on its page first.",
            home="https://www.qualcomm.com/developer/software/something-something-v-2-dataset",
        ),
    )
}
