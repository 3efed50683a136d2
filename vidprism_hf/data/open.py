"""Opens whatever `data.source` names.

| `data.source`                  | what it is                                                            |
| ------------------------------ | --------------------------------------------------------------------- |
| `demo`                         | rendered videos (demo.py)                                             |
| `ucf101 hmdb51 k400 ssv2`      | a benchmark below `data.root`, downloaded if missing                  |
| a folder                       | class folders (folder.py), or annotations with `data.train_list`      |
| `org/name`                     | a Hub dataset, unless there is a folder of that name                  |
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from .fetch.repository import stated_license
from .sources.annotations import scan_lists
from .sources.benchmarks import BENCHMARKS, benchmark_splits
from .sources.demo import demo_folder
from .sources.folder import scan_folder
from .sources.splits import DEFAULT_FRACTION, describe_fraction, few_shot
from .tables import ClipSplits, DataError

if TYPE_CHECKING:
    from .streaming.open import ClipStreams

DEMO = "demo"
RULES = ("val_fraction", "val_list", "val_pattern")
KINDS = {"benchmark": "a benchmark", "folder": "class folders", "lists": "list files", "hub": "a dataset of the Hub"}
# Settings that only some kinds of source use.
SETTINGS = {
    "demo": (),
    "benchmark": ("split", "verify_counts"),
    "folder": RULES,
    "lists": ("train_list", "val_list", "label_names", "allow_missing", "val_fraction"),
    "hub": (
        *("hub_config", "hub_revision", "train_split", "val_split", "video_column", "label_column", "streaming"),
        *(*RULES, "train_list", "label_names", "allow_missing"),
    ),
}


def source_kind(source: str, train_list: str | None = None) -> str:
    """Returns the kind of a source: `demo`, `benchmark`, `folder`, `lists` or `hub`."""
    if source == DEMO:
        return "demo"
    if source in BENCHMARKS:
        return "benchmark"
    if not Path(source).exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        return "hub"
    return "lists" if train_list is not None else "folder"


def open_source(settings: dict[str, Any]) -> "ClipSplits | ClipStreams":
    """Lists the videos of a source, downloading it first if necessary and not streamed.

    Args:
        settings: The arguments of `VideoDataModule`.

    Raises:
        DataError: If the source cannot be used.
    """
    source, root, seed = settings["source"], Path(settings["root"]), settings["seed"]
    kind = source_kind(source, settings["train_list"])
    if kind == "demo":
        splits = scan_folder(demo_folder(root, seed))
    elif kind in ("folder", "lists") and not Path(source).exists():
        raise DataError(
            f"{source}: no such folder; give a folder, a dataset of the Hub (org/name), demo, or one of "
            f"{', '.join(BENCHMARKS)} as data.source"
        )
    elif kind == "folder":
        splits = scan_folder(source, seed=seed, **{name: settings[name] for name in RULES})
    elif kind == "lists":
        splits = scan_lists(source, seed=seed, **{name: settings[name] for name in SETTINGS["lists"]})
    elif settings["streaming"]:
        from .streaming.open import hub_streams  # the datasets library takes a second to import

        names = ("train_split", "val_split", "video_column", "label_column", "label_names", "batch_size", "seed")
        given = {name: settings[name] for name in names}
        return hub_streams(source, settings["hub_config"], settings["hub_revision"], **given)
    elif kind == "benchmark":
        splits = benchmark_splits(source, root, split=settings["split"], verify=settings["verify_counts"])
    else:
        splits = _hub_splits(settings)
    return few_shot(splits, settings["shots"], seed) if settings["shots"] else splits


def _hub_splits(settings: dict[str, Any]) -> ClipSplits:
    from .sources.hub import hub_splits

    source, root = settings["source"], Path(settings["root"])
    names = {name: name.removeprefix("hub_") for name in SETTINGS["hub"] if name != "streaming"}
    given = {argument: settings[name] for name, argument in names.items()}
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.root {root}: cannot be written ({error.strerror}); choose another folder") from error
    # Ranks that start together would otherwise download and unpack the same files at the same time.
    with FileLock(root / f".{source.replace('/', '--')}.lock"):
        return hub_splits(source, root=root, seed=settings["seed"], **given)


def check_source(settings: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Checks for settings that this kind of source would ignore.

    Args:
        settings: The arguments of `VideoDataModule`.
        defaults: Their defaults.

    Raises:
        DataError: If there are any.
    """
    kind = source_kind(settings["source"], settings["train_list"])
    for name in sorted({name for names in SETTINGS.values() for name in names} - set(SETTINGS[kind])):
        if settings[name] != defaults[name]:
            why = (
                "the demo is already split"
                if kind == "demo"
                else f"data.source {settings['source']} is read as {KINDS[kind]}"
            )
            raise DataError(f"data.{name}: {why} and does not use it; remove it")


def source_name(source: str) -> str:
    """Returns the short name of a source; for a folder, its own name."""
    return source if source_kind(source) in ("demo", "benchmark", "hub") else Path(source).resolve().name


def describe_split(settings: dict[str, Any], read: str = "") -> str:
    """Returns one phrase on how the training and validation splits were made.

    Args:
        settings: The arguments of `VideoDataModule`.
        read: The source's own description (`ClipSplits.description`).
    """
    seed, kind = settings["seed"], source_kind(settings["source"], settings["train_list"])
    if kind == "demo":
        text = f"rendered clips, train and held-out drawn apart (seed {seed})"
    elif kind == "benchmark":
        text = (
            f"official split {settings['split']}" if BENCHMARKS[settings["source"]].num_splits > 1 else "official split"
        )
    elif settings["train_list"] is not None:
        text = f"training clips listed in {Path(settings['train_list']).name}"
        text += f", held-out clips in {Path(settings['val_list']).name}" if settings["val_list"] else ""
        if settings["val_fraction"] is not None:
            text = f"clips listed in {Path(settings['train_list']).name}, "
            text += describe_fraction(settings["val_fraction"], seed)
    elif settings["val_fraction"] is not None:
        text = describe_fraction(settings["val_fraction"], seed)
    elif settings["val_list"] is not None:
        text = f"held-out clips listed in {Path(settings['val_list']).name}"
    elif settings["val_pattern"] is not None:
        text = f"held out: file names in which `{settings['val_pattern']}` is found"
    else:
        by_default = describe_fraction(DEFAULT_FRACTION, seed) in read  # class folders without a rule
        text = "" if by_default else "the source's own split"
    text = "; ".join(filter(None, [read, text]))
    return text + (f"; {settings['shots']} training clips a class, drawn by seed {seed}" if settings["shots"] else "")


def dataset_facts(settings: dict[str, Any]) -> dict[str, str]:
    """Returns the name, Hub id and license of a source, as far as they are known.

    Args:
        settings: The arguments of `VideoDataModule`.
    """
    source = settings["source"]
    if source in BENCHMARKS:
        benchmark = BENCHMARKS[source]
        repo = getattr(benchmark.parts.get("clips"), "repo", None)
        return {"dataset": benchmark.title, "dataset_id": repo, "data_license": f"{benchmark.terms} {benchmark.home}"}
    if source == DEMO:
        return {"dataset": DEMO, "data_license": "rendered by vidprism_hf (Apache-2.0)"}
    if source_kind(source, settings["train_list"]) != "hub":
        return {"dataset": source_name(source)}
    stated = stated_license(source, settings["hub_revision"])
    terms = {"data_license": f"{stated}, as its card says"} if stated else {}
    where = {"split": settings["val_split"], "config": settings["hub_config"], "revision": settings["hub_revision"]}
    named = {f"dataset_{part}": name for part, name in where.items() if name}
    return {"dataset": source_name(source), "dataset_id": source} | named | terms
