"""Frame features of a frozen tower (`data.feature_cache`): computed once for each clip and view, kept, and read back.

A row is kept under a hash of all that it follows from: the clip's content; the tower's weights, settings and
precision; the processor; frames and stride; in training the augmentation and, since they decide what is drawn, the
seed, the view's number and the clip's name; in evaluation clips and crops; and `FORMAT`. What changes is computed
anew, and the old rows stay for whoever still has use for them:

    <folder>/contents.json               hashes of files, remembered (clip_contents.py)
    <folder>/train-<hash>/about.json     what its rows have in common, to be read by people
    <folder>/train-<hash>/*.safetensors  rows (feature_shards.py)
    <folder>/test-<hash>/...

Runs may use one folder at the same time: one fills it while others wait. The processes of a run fill it together.
Clips that cannot be decoded are not kept: each run tries them once more. A clip of which one view cannot be decoded
counts as bad in all.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from .bad_clips import Note
from .clip_contents import ContentHashes, Signature, signature, write_whole
from .dataset import ClipDataset, collate, example
from .feature_shards import SUFFIX, ShardFolder
from .frame_encoder import FrameEncoder
from .ranks import Ranks
from .tables import DataError

# To be raised by whoever changes what the tower sees of a clip: decoding, sampling of frames, transforms.
FORMAT = 1
# A shard is written when it has come to this size or age.
SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 60.0
# The key of a clip of zeros, whose features stand for those of a clip that cannot be decoded.
BLANK = "blank"
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str | int) -> int:
    """Bytes of a size such as `50GB`; units are powers of 1000.

    Raises:
        DataError: If it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", str(text).strip(), re.IGNORECASE)
    if match is None:
        raise DataError(f"data.feature_cache_limit={text}: is no size; write one like 50GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def size_text(size: int) -> str:
    """A number of bytes, in the unit that suits it."""
    unit = next(unit for unit in ("TB", "GB", "MB", "KB", "B") if size >= UNITS[unit] or unit == "B")
    return f"{size / UNITS[unit]:.4g} {unit}"


class CachedClips(ClipDataset):
    """The examples of a `ClipDataset`, with `frame_features` in the place of pixels: (T', D), or (views, T', D).

    Args:
        clips: The examples with pixels.
        shards: Where the features are.
        places: Shard and row for each view and clip, (views, N, 2).
        blank: Features of a clip of zeros.
        causes: Why clips are bad, by index; they have no places.
    """

    def __init__(
        self, clips: ClipDataset, shards: ShardFolder, places: np.ndarray, blank: torch.Tensor, causes: dict[int, str]
    ):
        super().__init__(clips.table, clips.reader, clips.train_views)
        self._shards, self._places, self._blank, self._causes = shards, places, blank, causes

    def __getitem__(self, key: int | tuple) -> dict[str, Any]:
        item = super().__getitem__(key)
        features = item.pop("pixel_values_videos")
        return item | {"frame_features": features if item["readable"] else self._blank}

    def _load(self, index: int, view: int) -> torch.Tensor:
        return self._shards.row(*self._places[view, index].tolist())


@dataclass
class Part:
    """Clips of a run, in the views that it takes of them.

    Attributes:
        clips: The clips.
        about: What all rows have in common.
        shards: Where the rows are.
        contents: Hash and signature of each clip.
        keys: Key of each clip's rows, one for each training view; the views of an evaluation are in one row. None
            where the clip cannot be read.
        places: Shard and row of each key that is there.
        whole: Shards that have been checked.
        causes: Why clips are bad, by index.
    """

    clips: ClipDataset
    about: dict[str, Any]
    shards: ShardFolder
    contents: list[tuple[str | None, Signature | None]]
    keys: list[list[str | None]] = field(init=False)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    causes: dict[int, str] = field(default_factory=dict)

    def __post_init__(self):
        self.keys = [
            [content and _hash(content, *drawn) for drawn in self._draws(index)]
            for index, (content, _) in enumerate(self.contents)
        ]

    def _draws(self, index: int) -> list[tuple]:
        """What tells the rows of a clip from each other."""
        reader = self.clips.reader
        if reader.augmentation is None:
            return [()]
        return [(reader.seed, view, self.clips.table.name(index)) for view in range(self.clips.train_views)]

    def missing(self) -> list[tuple[int, int]]:
        """Clips and views to compute, the views of a clip one after the other."""
        return [
            (index, view)
            for index, keys in enumerate(self.keys)
            for view, key in enumerate(keys)
            if key not in self.places
        ]

    def cached(self) -> CachedClips:
        """The clips with features, which must be there."""
        places = np.full((len(self.keys[0]), len(self.keys), 2), -1, dtype=np.int32)
        for index, keys in enumerate(self.keys):
            if index not in self.causes:
                places[:, index] = [self.places[key] for key in keys]
        return CachedClips(self.clips, self.shards, places, self.shards.row(*self.places[BLANK]), self.causes)


def _hash(*parts: object) -> str:
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


class _Pixels(Dataset):
    """Pixels of the clips and views whose features are to be computed."""

    def __init__(self, part: Part, rows: Sequence[tuple[int, int]]):
        self.clips = part.clips
        self.rows = [(*row, *part.contents[row[0]]) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        index, view, content, found = self.rows[number]
        table, bad = self.clips.table, list[Note]()
        pixels, label = self.clips.read(index, view, bad), int(table.labels[index])
        # What was hashed must be what was decoded.
        if pixels is not None and (content is None or (found and signature(table.video(index)) != found)):
            pixels, bad = None, [(table.name(index), label, "changes while it is read")]
        return example(self.clips.reader, pixels, label, index, bad)


class FeatureCache:
    """A folder of frame features.

    Args:
        folder: The folder, which runs may share.
        limit: Bytes that it may come to hold, such as `50GB`.
        encoder: The tower.
        batch_size: Videos of one view that go through the tower together.
        num_workers: Processes that decode.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        limit: str | int,
        encoder: FrameEncoder,
        batch_size: int,
        num_workers: int = 0,
    ):
        self.folder, self.limit, self.encoder = Path(folder), limit, encoder
        self.batch_size, self.num_workers = batch_size, num_workers

    def cached(self, wanted: dict[str, ClipDataset]) -> dict[str, CachedClips]:
        """The examples of some parts of a run with features; those that are not there are computed.

        All processes of a run have to call it.

        Args:
            wanted: The clips of each part, by its name.

        Raises:
            DataError: If the folder cannot be used, or would outgrow its limit.
        """
        try:
            with Ranks.running() as ranks:
                ranks.first(lambda: self.folder.mkdir(parents=True, exist_ok=True))
                parts = {name: self._part(clips, ranks) for name, clips in wanted.items()}
                if self._complete(parts, ranks):
                    rank_zero_info(f"Feature cache {self.folder}: all is there")
                else:
                    self._fill(parts, ranks)
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"data.feature_cache {self.folder}: cannot be used ({reason}); choose another") from error
        return {name: part.cached() for name, part in parts.items()}

    def _part(self, clips: ClipDataset, ranks: Ranks) -> Part:
        about = self._about(clips)
        kind = "train" if clips.reader.augmentation else "test"
        folder = self.folder / f"{kind}-{_hash(json.dumps(about, sort_keys=True))}"
        hashes = ContentHashes(self.folder / "contents.json", clips.reader.time_limit)
        share = ranks.share(range(len(clips)))
        contents: list[Any] = [None] * len(clips)
        for rank, found in enumerate(ranks.gather(lambda: [hashes(clips.table.video(index)) for index in share])):
            contents[rank :: ranks.world] = found
        hashes.save()
        return Part(clips, about, ShardFolder(folder), contents)

    def _about(self, clips: ClipDataset) -> dict[str, Any]:
        """All that decides about features but the clips and what is drawn for each."""
        reader, every = clips.reader, clips.reader.processor.to_dict()
        names = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
        switches = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
        tested = {"clips": reader.num_clips, "crops": reader.num_crops}
        return {
            "format": FORMAT,
            "tower": self.encoder.digest,
            "precision": self.encoder.precision,
            "processor": {name: every[name] for name in (*names, *switches)},
            "frames": reader.processor.num_frames,
            "frame_stride": reader.frame_stride,
            "view": reader.augmentation.settings if reader.augmentation else tested,
        }

    def _complete(self, parts: dict[str, Part], ranks: Ranks) -> bool:
        """Opens what is there and whole, and tells whether nothing is missing."""
        for part in parts.values():
            self._open(part, ranks)
        return all(BLANK in part.places and not part.missing() for part in parts.values())

    def _open(self, part: Part, ranks: Ranks) -> None:
        """Checks the shards that are new, opens the whole ones and removes the others."""
        names = [name for name in ranks.first(part.shards.names) if name not in part.whole]
        share = ranks.share(names)
        whole = set().union(*ranks.gather(lambda: {name for name in share if part.shards.is_whole(name)}))
        damaged = sorted(set(names) - whole)
        for name in damaged:
            rank_zero_warn(f"Feature cache: {part.shards.folder / name} is damaged; what it held is computed anew")
        ranks.first(lambda: part.shards.remove(damaged))
        part.places |= part.shards.open(sorted(whole))
        part.whole |= whole

    def _fill(self, parts: dict[str, Part], ranks: Ranks) -> None:
        """Computes what is missing, while no other run does."""
        lock = FileLock(self.folder / ".lock")
        try:
            ranks.first(lambda: self._acquire(lock))
            if self._complete(parts, ranks):  # the run that had the lock computed the same
                return
            blanks = ranks.first(lambda: {name: self._blank(part) for name, part in parts.items()})
            ranks.first(lambda: self._check_room(parts, blanks))
            for name, part in parts.items():
                self._fill_part(name, part, blanks[name], ranks)
        finally:
            lock.release()

    def _acquire(self, lock: FileLock) -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            rank_zero_info(f"Feature cache {self.folder}: another run fills it; waiting")
            lock.acquire()

    def _blank(self, part: Part) -> torch.Tensor:
        if BLANK in part.places:
            return part.shards.row(*part.places[BLANK])
        return self._features(torch.zeros((1, *part.clips.reader.shape), dtype=torch.uint8))[0]

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (B, T', D) of pixels (B, T, 3, H, W), both on the CPU, or the same with views, (B, views, ...)."""
        return self.encoder.encode(pixels.flatten(0, -5)).cpu().unflatten(0, pixels.shape[:-4])

    def _check_room(self, parts: dict[str, Part], blanks: dict[str, torch.Tensor]) -> None:
        """Reports what the features come to, before they are computed.

        Raises:
            DataError: If that is too much for the limit or the disk.
        """
        there = sum(path.stat().st_size for path in self.folder.rglob(f"*{SUFFIX}"))
        new, lines = 0, []
        for name, part in parts.items():
            rows, missing, blank = sum(map(len, part.keys)), len(part.missing()), blanks[name]
            new += missing * blank.nbytes
            views, (frames, width) = rows // len(part.clips) * blank.shape[:-2].numel(), blank.shape[-2:]
            lines.append(
                f"{name} {len(part.clips)} clips x {views} view{'s' * (views > 1)} x {frames} frames x {width} x "
                f"{blank.itemsize} bytes = {size_text(rows * blank.nbytes)}, {missing} of {rows} rows to compute"
            )
        text = f"{'; '.join(lines)}: {size_text(new)} to be added to {size_text(there)}"
        rank_zero_info(f"Feature cache {self.folder}: {text}")
        if there + new > parse_size(self.limit):
            raise DataError(
                f"data.feature_cache_limit={self.limit}: too little for {text}; raise it, lower data.train_views or "
                f"remove what is no longer needed in {self.folder}"
            )
        free = shutil.disk_usage(self.folder).free
        if new > free:
            raise DataError(f"data.feature_cache {self.folder}: {text}, and {size_text(free)} of disk; make room")

    def _fill_part(self, name: str, part: Part, blank: torch.Tensor, ranks: Ranks) -> None:
        """Computes the rows that a part lacks, each process its share."""
        ranks.first(lambda: self._prepare(part))
        new = {BLANK: blank} if ranks.rank == 0 and BLANK not in part.places else {}
        share = ranks.share(part.missing())
        for names, causes in ranks.gather(lambda: self._compute(name, part, share, new)):
            part.places |= part.shards.open(names)
            part.causes |= causes

    def _prepare(self, part: Part) -> None:
        folder = part.shards.folder
        folder.mkdir(exist_ok=True)
        part.shards.sweep()
        write_whole(folder / "about.json", (json.dumps(part.about, indent=2) + "\n").encode())

    def _compute(
        self, name: str, part: Part, rows: list[tuple[int, int]], new: dict[str, torch.Tensor]
    ) -> tuple[list[str], dict[int, str]]:
        """Computes rows and writes them; returns the shards, and why clips are bad."""
        names, causes, done, since = [], {}, 0, time.monotonic()
        views = part.clips.reader.num_clips * part.clips.reader.num_crops
        loader = DataLoader(
            _Pixels(part, rows),
            batch_size=max(1, self.batch_size // views),
            num_workers=self.num_workers,
            collate_fn=collate,
            generator=torch.Generator(),  # what the head draws later must not depend on how much is computed here
        )
        order = iter(rows)
        for batch in loader:
            features, readable = self._features(batch["pixel_values_videos"]), batch["readable"].tolist()
            reasons = iter(batch["bad_clips"])
            for row, good, (index, view) in zip(features, readable, order, strict=False):
                if good:
                    new[part.keys[index][view]] = row
                else:
                    causes[index] = next(reasons)[2]
            done += len(features)
            held = sum(row.nbytes for row in new.values())
            if new and (held >= SHARD_BYTES or time.monotonic() - since >= SHARD_SECONDS):
                names.append(part.shards.write(new))
                new, since = {}, time.monotonic()
                rank_zero_info(f"Feature cache: {name} {done} of {len(rows)}")
        if new:
            names.append(part.shards.write(new))
        return names, causes
