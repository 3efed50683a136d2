"""A dataset of the Hub as a source of clips, whatever its repository looks like.

| repository                                      | how it is read                                                     |
| ----------------------------------------------- | ------------------------------------------------------------------ |
| tables: parquet, `metadata.csv`, or a card with | `datasets`, undecoded; a row holds the video's bytes, or its path  |
| `configs`                                       | in the repository, whose files are then fetched                    |
| videos in class folders                         | fetched below `data.root`, then as a folder (folder.py)            |
| archives of clips                               | fetched and unpacked below `data.root`, then as a folder           |
| either of these two, with `data.train_list`     | as list files (lists.py)                                           |

Everything is read at one commit, which is looked up once; without a network that is the commit of the last time.
Private repositories are read with the token that huggingface_hub finds. Code in a repository is never run.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..util import preview
from .archives import unpack
from .folder import VIDEO_EXTENSIONS, scan_folder
from .hub_repository import Repository
from .hub_tables import HubTables, load_splits
from .lists import scan_lists
from .tables import ClipSplits, DataError

LIST_EXTENSIONS = (".txt", ".csv", ".tsv", ".json", ".jsonl")


def hub_splits(
    source: str,
    root: str | os.PathLike = "data",
    config: str | None = None,
    revision: str | None = None,
    train_split: str = "train",
    val_split: str | None = None,
    video_column: str | None = None,
    label_column: str | None = None,
    train_list: str | None = None,
    val_list: str | None = None,
    label_names: str | None = None,
    allow_missing: bool = False,
    val_fraction: float | None = None,
    val_pattern: str | None = None,
    seed: int = 0,
) -> ClipSplits:
    """Fetches a dataset of the Hub, unless it is there, and lists its clips.

    Args:
        source: Its id, org/name.
        root: Folder for fetched videos and unpacked archives; rows of tables stay in the cache of `datasets`.
        config: Its configuration, if it has several.
        revision: Branch, tag or commit.
        train_split: Split of a table to train on.
        val_split: Held-out split of a table. None takes validation, val or test, the first that there is; else
            a column `subset` or `split` that tells training from held-out rows; else `val_fraction` is needed.
        video_column: Column with the video or its path; None takes the one of type Video, or one with a usual name.
        label_column: Column with the label; None takes the one of type ClassLabel, or one with a usual name.
        train_list: List file of the training clips, in the repository or in one of its archives.
        val_list: With `train_list` that of the held-out clips; else a rule of `scan_folder`.
        label_names: File with names for labels that are numbers, in the repository, an archive, or local.
        allow_missing: Whether listed clips may be missing.
        val_fraction: Rule: share of each class to hold out, for tables with one split and for class folders.
        val_pattern: Rule of `scan_folder`, for class folders.
        seed: Seed of `val_fraction`.

    Raises:
        DataError: If the dataset, or what is asked of it, cannot be used.
    """
    repository = Repository.find(source, revision)
    description = f"commit {repository.commit[:12]}" + (f", configuration {config}" if config else "")
    if train_list is None and (config is not None or repository.is_table):
        for name, value in (("val_list", val_list), ("val_pattern", val_pattern)):
            if value is not None:
                raise DataError(f"data.{name}: {source} has rows, no class folders; use data.val_split or val_fraction")
        tables = HubTables(repository, root, load_splits(repository, config), allow_missing)
        splits = tables.splits(train_split, val_split, video_column, label_column, label_names, val_fraction, seed)
        # How the held-out rows were found stands in the notes.
        found = [note.partition(": ")[2].partition(";")[0] for note in splits.notes if "held out" in note]
        return replace(splits, description=", ".join([description, f"split {train_split}", *found]))
    for name, value in (("hub_config", config), ("val_split", val_split), ("video_column", video_column)):
        if value is not None:
            raise DataError(f"data.{name}: {source} is read as files, not as rows; remove it")
    places = _fetch_clips(repository, root)
    clips = _class_root(places[0], source)
    if train_list is not None:
        lists = [_find_file("train_list", train_list, places), _find_file("val_list", val_list, places)]
        splits = scan_lists(clips, *lists, _find_file("label_names", label_names, places), allow_missing)
        return replace(splits, description=description)
    val_list = _find_file("val_list", val_list, places)
    splits = scan_folder(clips, val_fraction=val_fraction, val_list=val_list, val_pattern=val_pattern, seed=seed)
    return replace(splits, description=description)


def _fetch_clips(repository: Repository, root: str | os.PathLike) -> tuple[Path, ...]:
    """Fetches videos or archives; returns the folder of the clips and, if it is another, that of other files."""
    archives = repository.archives
    lists = repository.named(*LIST_EXTENSIONS)
    if len(repository.videos) > len(archives):
        return (repository.fetch([*repository.videos, *lists], root),)
    if not archives:
        raise DataError(f"{repository.source}: holds neither videos nor archives; choose a dataset of clips")
    files = repository.fetch([*(part for parts in archives.values() for part in parts), *lists], root)
    clips = files.with_name(f"{files.name}-unpacked")
    for name, parts in archives.items():
        unpack([files / part for part in parts], clips / name, strip=True)
    return clips, files


def _class_root(folder: Path, source: str) -> Path:
    """The folder of the class folders: the deepest one that all folders with videos have in common."""
    holders = set()
    for directory, children, files in os.walk(folder):
        children[:] = [name for name in children if not name.startswith(".")]
        if any(os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS for name in files):
            holders.add(directory)
    if not holders:
        raise DataError(f"{source}: no videos in {folder}; choose a dataset of clips")
    return Path(os.path.commonpath(holders))


def _find_file(field: str, name: str | None, places: Sequence[Path]) -> Path | None:
    if name is None:
        return None
    path = next((place / name for place in (*places, Path()) if (place / name).is_file()), None)
    if path is None:
        there = [
            file.relative_to(place).as_posix()
            for place in places
            for file in sorted(place.rglob("*"))
            if file.suffix in LIST_EXTENSIONS
            and not any(part.startswith(".") for part in file.relative_to(place).parts)
        ]
        raise DataError(f"data.{field}={name}: no such file in {places[0]}; it has {preview(there, 9) or 'no lists'}")
    return path
