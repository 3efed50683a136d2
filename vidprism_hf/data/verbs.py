"""`vidprism data`: fetch a benchmark, decode every clip once, look at what a source holds."""

import argparse
import inspect
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from ..errors import UserError, printable
from ..safe_yaml import read_yaml
from .bad_clips import FILE_NAME, BadClip, bad_clip_table, write_bad_clips
from .benchmarks import BENCHMARKS, prepare
from .datamodule import VideoDataModule
from .dataset import ClipReader
from .inspection import (
    SHEET_FRAMES,
    ClipFigures,
    Outcome,
    Parts,
    SheetTiles,
    all_clips,
    clip_figures,
    commonest,
    contact_sheet,
    draw_clips,
    length_rows,
    read_clips,
    save_picture,
    spread_over_classes,
)
from .processor import load_processor
from .sources import RULES, source_kind
from .tables import ClipSplits, DataError

USAGE = """usage: vidprism data VERB ...

  prepare NAME [--root DIR]    fetch, unpack and verify a benchmark
  check SOURCE                 decode every clip once, list the bad ones with causes
  show SOURCE                  classes, counts, lengths, resolutions and a contact sheet

SOURCE and its options are those of a recipe's data part; --config RECIPE reads that part.
`vidprism data VERB --help` tells a verb's options.
"""

# What the data part says of training, and what a look at the clips does without.
OF_TRAINING = {
    *("processor", "num_frames", "batch_size", "num_workers", "train_views", "frame_stride", "test_clips"),
    *(
        "worker_timeout",
        "test_crops",
        "augment",
        "min_crop_scale",
        "horizontal_flip",
        "grayscale",
        "rand_augment",
        "random_erasing",
    ),
    *("mixup_alpha", "cutmix_alpha", "max_bad_fraction", "clip_time_limit"),
    *("feature_cache", "feature_cache_limit"),
}
PARAMETERS = inspect.signature(VideoDataModule).parameters


def main(argv: list[str]) -> int:
    """Runs `vidprism data VERB`.

    Returns:
        The exit status: 0, 1 where clips are bad, 2 for wrong usage, 130 after Ctrl-C.

    Raises:
        UserError: If an option or the source cannot be used.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv[0] not in VERBS:
        print(f"vidprism data: no verb {argv[0]!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        return VERBS[argv[0]](argv[1:])
    except KeyboardInterrupt:
        print("vidprism data: stopped", file=sys.stderr)
        return 130


def prepare_verb(argv: list[str]) -> int:
    """Fetches a benchmark, unpacks it and compares it with its official lists; what is there already is used."""
    parser = _parser("prepare", prepare_verb)
    parser.add_argument("NAME", type=str, help=f"One of {', '.join(BENCHMARKS)}.")
    parser.add_argument("--root", type=str, default=PARAMETERS["root"].default, help="Folder to fetch it into.")
    parser.add_argument("--split", type=PositiveInt, default=1, help="Official split, 1 to 3 (ucf101, hmdb51).")
    options = _parse(parser, argv)
    if options.NAME not in BENCHMARKS:
        raise UserError(f"{options.NAME}: no such benchmark; there are {', '.join(BENCHMARKS)}")
    print(prepare(options.NAME, options.root, split=options.split))
    return 0


def check_verb(argv: list[str]) -> int:
    """Decodes every clip of both splits once, to its end, and lists those that do not decode with their causes."""
    parser = _parser("check", check_verb)
    parser.add_argument("--output", type=str, default=FILE_NAME, help="CSV file of bad clips: split,name,label,cause.")
    options, settings = _parse_source(parser, argv)
    output = _writable(Path(options.output))
    splits, parts = open_parts(settings)
    total = sum(len(table) for _, table in parts)
    outcomes = read_clips(parts, all_clips(parts), clip_figures, options.workers, options.time_limit)
    bad = sorted(_bad_clips(_watched(outcomes, total, "Decoding"), parts, splits))
    write_bad_clips(bad, output)
    num_bad = Counter(clip.split for clip in bad)
    for split, count in _clips_by_split(parts).items():
        missing = len(splits.missing.get(split, ()))
        absent = f"; {missing} listed clip{'s are' if missing > 1 else ' is'} not there" if missing else ""
        print(f"{split}: {count - num_bad[split]} of {count} clips decode{absent}")
    if bad:
        print(bad_clip_table(bad))
    print(f"List of bad clips: {output}")
    return int(bool(bad))


def show_verb(argv: list[str]) -> int:
    """Prints classes and counts, measures a sample of the clips, and saves a contact sheet of some of them."""
    parser = _parser("show", show_verb)
    parser.add_argument("--picture", type=str, default="contact_sheet.png", help="File for the contact sheet.")
    parser.add_argument("--sample", type=PositiveInt, default=500, help="Most clips to decode, drawn by seed.")
    parser.add_argument(
        "--sheet_clips",
        type=NonNegativeInt,
        default=32,
        help="Most clips on the contact sheet, of as many classes as possible; 0 saves none.",
    )
    options, settings = _parse_source(parser, argv, "processor")
    picture = _writable(Path(options.picture))
    if picture.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"{picture}: unknown kind of picture; name a .png or .jpg file")
    processor = load_processor(settings["processor"], SHEET_FRAMES)
    splits, parts = open_parts(settings)
    _print_classes(parts, splits)

    sample = draw_clips(parts, options.sample, settings["seed"])
    reading = {"num_workers": options.workers, "time_limit": options.time_limit}
    outcomes = list(_watched(read_clips(parts, sample, clip_figures, **reading), len(sample), "Decoding"))
    _print_figures([outcome.result for outcome in outcomes if outcome.cause is None], len(sample), parts, settings)
    good = {(outcome.part, outcome.index) for outcome in outcomes if outcome.cause is None}

    shown = spread_over_classes(parts, [clip for clip in sample if clip in good], options.sheet_clips)
    drawn = list(
        _watched(read_clips(parts, shown, SheetTiles(ClipReader(processor)), **reading), len(shown), "Drawing")
    )
    tiles = {(outcome.part, outcome.index): outcome.result for outcome in drawn if outcome.cause is None}
    if bad := sorted(_bad_clips([*outcomes, *drawn], parts, splits)):
        print(bad_clip_table(bad))
    if tiles:
        rows = [(*_label_and_name(clip, parts, splits), tiles[clip]) for clip in shown if clip in tiles]
        rows = [(label, os.path.basename(name), row) for label, name, row in rows]  # the label is in the path too
        save_picture(contact_sheet(rows), picture)
        print(f"Contact sheet: {picture}, {len(rows)} clips with {SHEET_FRAMES} frames of each")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {"prepare": prepare_verb, "check": check_verb, "show": show_verb}


# --- options and source


def _parser(verb: str, function: Callable) -> ArgumentParser:
    return ArgumentParser(
        prog=f"vidprism data {verb}", description=function.__doc__, exit_on_error=False, allow_abbrev=False
    )


def _parse(parser: ArgumentParser, argv: list[str], known: Namespace | None = None) -> Namespace:
    try:
        return parser.parse_args(argv, namespace=known)
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error


def _parse_source(parser: ArgumentParser, argv: list[str], *of_training: str) -> tuple[Namespace, dict[str, Any]]:
    """Adds the options of a source, and parses.

    Args:
        parser: Has the verb's own options.
        argv: The command line. Keys may be written as in a recipe's overrides, `--data.val_fraction`.
        of_training: Keys of the data part that concern training and that this verb uses all the same.

    Returns:
        The options, and the arguments of VideoDataModule.
    """
    skip = OF_TRAINING.difference(of_training)
    default_limit = PARAMETERS["clip_time_limit"].default
    parser.add_argument("SOURCE", nargs="?", type=str, help="As data.source of a recipe.")
    parser.add_argument("--config", type=str | None, help="Recipe whose data part to use; options override it.")
    parser.add_argument("--workers", type=PositiveInt, default=_num_cores(), help="Processes that decode.")
    parser.add_argument(
        "--time_limit",
        type=PositiveFloat | None,
        default=default_limit,
        help="Seconds that one clip may take, null is no limit; a recipe's clip_time_limit sets it too.",
    )
    parser.add_class_arguments(VideoDataModule, skip=skip)
    argv = [re.sub(r"^--data\.", "--", argument) for argument in argv]

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config = first.parse_known_args(argv)[0].config
    recipe = {} if config is None else _data_part(Path(config))
    limit = recipe.get("clip_time_limit", default_limit)
    known = {name: value for name, value in recipe.items() if name not in skip}
    try:
        options = parser.parse_object(known | {"time_limit": limit, "SOURCE": None})
    except ArgumentError as error:
        raise UserError(f"{config}: {' '.join(str(error).split())}") from error
    options = _parse(parser, argv, options)

    settings = {name: options[name] for name in PARAMETERS if name not in skip}
    if options.SOURCE is not None:
        settings["source"] = options.SOURCE
    elif "source" not in recipe and not any(re.match("--source(=|$)", argument) for argument in argv):
        raise UserError("name the source first: a folder, a benchmark, a Hub dataset or demo; or give --config RECIPE")
    return options, settings


def _data_part(recipe: Path) -> dict[str, Any]:
    content = read_yaml(recipe)
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, dict):
        raise UserError(f"{recipe}: has no data part; give a recipe such as recipes/folder.yaml")
    return data


def open_parts(settings: dict[str, Any]) -> tuple[ClipSplits, Parts]:
    """Opens a source, and prints what it has to say on stderr.

    Clips that can be looked at need not be split: where nothing tells which ones are held out, all of them are one
    split, `all`.

    Raises:
        DataError: If the source cannot be used.
    """
    is_folder = source_kind(settings["source"], settings["train_list"]) == "folder"
    divided = not is_folder or any(settings[rule] is not None for rule in RULES)
    names = ("train", "val")
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        try:
            splits = _splits(settings)
        except DataError as error:
            splits, names = None if divided else _undivided(settings), ("all", "all")
            if splits is None:
                raise error
    for note in notes:
        # Which classes an arbitrary half leaves out is no news.
        if names[0] != "all" or "no held-out clip" not in str(note.message):
            print(f"vidprism data: {printable(str(note.message))}", file=sys.stderr)
    return splits, tuple(zip(names, (splits.train, splits.val), strict=True))


def _undivided(settings: dict[str, Any]) -> ClipSplits | None:
    """The clips of a folder with one level of classes, halved somehow; None if that is not what is wrong with it."""
    try:
        return _splits(settings | {"val_fraction": 0.5})
    except DataError:
        return None


def _splits(settings: dict[str, Any]) -> ClipSplits:
    data = VideoDataModule(**settings)
    data.prepare_data()
    return data.splits


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _writable(path: Path) -> Path:
    """The path, if a file can be written there: better to know before an hour of decoding."""
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "is a folder")
        probe = path.with_name(f".{path.name}.tmp")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another file") from error
    return path


# --- what is printed


def _watched(outcomes: Iterator[Outcome], total: int, what: str) -> Iterator[Outcome]:
    """The outcomes, with a progress bar on a terminal; the processes behind them end with the loop."""
    console = Console(stderr=True)
    with closing(outcomes):
        yield from track(outcomes, what, total, console=console, transient=True, disable=not console.is_terminal)


def _bad_clips(outcomes: Iterable[Outcome], parts: Parts, splits: ClipSplits) -> Iterator[BadClip]:
    for outcome in outcomes:
        if outcome.cause is not None:
            label, name = _label_and_name((outcome.part, outcome.index), parts, splits)
            yield BadClip(parts[outcome.part][0], name, label, outcome.cause)


def _label_and_name(clip: tuple[int, int], parts: Parts, splits: ClipSplits) -> tuple[str, str]:
    table = parts[clip[0]][1]
    return splits.id2label[int(table.labels[clip[1]])], table.name(clip[1])


def _clips_by_split(parts: Parts) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for split, table in parts:
        counts[split] += len(table)
    return dict(counts)


def _print_classes(parts: Parts, splits: ClipSplits) -> None:
    counts = {split: np.zeros(len(splits.id2label), np.int64) for split, _ in parts}
    for split, table in parts:
        counts[split] += np.bincount(table.labels, minlength=len(splits.id2label))
    columns = [f"{split} clips" if split == "all" else split for split in counts]
    table = Table("class", *columns, title=f"{len(splits.id2label)} classes", show_footer=True)
    for column, split in zip(table.columns[1:], counts, strict=True):
        column.justify, column.footer = "right", str(counts[split].sum())
    table.columns[0].footer = "all classes"
    for index, label in sorted(splits.id2label.items()):
        table.add_row(Text(printable(label)), *(str(count[index]) for count in counts.values()))
    Console().print(table)


def _print_figures(figures: list[ClipFigures], asked: int, parts: Parts, settings: dict[str, Any]) -> None:
    total = sum(_clips_by_split(parts).values())
    sample = "" if asked == total else f"; they are a sample of {total}, drawn by seed {settings['seed']}"
    print(f"{len(figures)} of {asked} clips decode{sample}")
    if not figures:
        return
    table = Table("", "least", "median", "most")
    for row in length_rows(figures):
        table.add_row(*row)
    Console().print(table)
    rates = (f"{clip.fps:.4g}" if clip.fps else "unknown" for clip in figures)
    print(f"Resolution: {commonest(f'{clip.width}x{clip.height}' for clip in figures)}")
    print(f"Frames a second: {commonest(rates)}")
