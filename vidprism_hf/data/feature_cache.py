"""Frame features of a frozen tower (`data.feature_cache`): computed once for each clip and view, kept, and read back.

A row is kept under a hash of all that it follows from: the clip's content; the tower's weights, settings and
precision; the processor; frames and stride; in training the augmentation and, since they decide what is drawn, the
seed, the view's number and the clip's name; in evaluation clips and crops; and `FORMAT`. What changes is computed
anew, and the old rows stay for whoever still has use for them:

    <folder>/contents.json               hashes of files, remembered (clip_contents.py)
    <folder>/train-<hash>/about.json     what its rows have in common, to be read by people
    <folder>/train-<hash>/*.safetensors  rows (feature_shards.py)
    <folder>/train-<hash>/bad.json       clips that cannot be decoded (feature_part.py)
    <folder>/test-<hash>/...

Runs may use one folder at the same time: one fills it while others wait. The processes of a run fill it together,
shard by shard, and may be stopped after each. Clips whose content cannot be decoded are known from then on; those that
took too long, or could not be read, are tried once more by each run. A clip of which one view cannot be decoded counts
as bad in all.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ..util import atomic_write
from ..workers import clip_loader
from .bad_clips import Note
from .clip_contents import ContentHashes, Signature
from .dataset import ClipDataset, collate
from .feature_part import BLANK, CHANGES, CachedClips, Part, Pixels, row_hash
from .feature_shards import SUFFIX, ShardFolder
from .frame_encoder import FrameEncoder
from .ranks import Ranks
from .tables import DataError

# To be raised by whoever changes what the tower sees of a clip: decoding, sampling of frames, transforms.
FORMAT = 2
# A shard is written when it has come to this size or age.
SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 20.0  # no more: clusters give a job 30 seconds to leave
WAIT_SECONDS = 5.0  # for another run, before the signals are looked at
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


class Computed(NamedTuple):
    """What a process has computed.

    Attributes:
        shard: Where the rows are; None if there are none.
        causes: Why clips are bad, by index.
        lasting: The causes that lie in what clips hold, by the keys of the rows.
    """

    shard: str | None
    causes: dict[int, str]
    lasting: dict[str, str]


class FeatureCache:
    """A folder of frame features.

    Args:
        folder: The folder, which runs may share.
        limit: Bytes that it may come to hold, such as `50GB`.
        encoder: The tower.
        batch_size: Videos of one view that go through the tower together.
        num_workers: Processes that decode.
        between_shards: Called on each process when all have written a shard, and on the first now and then while
            another run fills the folder. It may raise SystemExit, which ends all processes and leaves the folder whole.
        worker_timeout: Seconds to wait for a batch of the decoding processes; None is no limit.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        limit: str | int,
        encoder: FrameEncoder,
        batch_size: int,
        num_workers: int = 0,
        between_shards: Callable[[], None] | None = None,
        worker_timeout: float | None = None,
    ):
        self.folder, self.limit, self.encoder = Path(folder), limit, encoder
        self.batch_size, self.num_workers, self.worker_timeout = batch_size, num_workers, worker_timeout
        self._between_shards = between_shards or (lambda: None)

    def cached(self, wanted: dict[str, ClipDataset]) -> dict[str, CachedClips]:
        """The examples of some parts of a run with features; those that are not there are computed.

        All processes of a run have to call it.

        Args:
            wanted: The clips of each part, by its name.

        Raises:
            DataError: If the folder cannot be used, or would outgrow its limit.
            SystemExit: If `between_shards` does.
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
        folder = self.folder / f"{kind}-{row_hash(json.dumps(about, sort_keys=True, allow_nan=False))}"
        hashes = ContentHashes(self.folder / "contents.json", clips.reader.time_limit)
        contents: list[tuple[str | None, Signature | None]] = [(None, None)] * len(clips)
        share = ranks.share(range(len(clips)))
        for rank, found in enumerate(ranks.gather(lambda: [hashes(clips.table.video(index)) for index in share])):
            contents[rank :: ranks.world] = found
        hashes.save()
        unread = [index for index in share if contents[index][0] is None]
        causes: dict[int, str] = {}
        for told in ranks.gather(lambda: {index: _why_unread(clips, index) for index in unread}):
            causes |= told
        return Part(clips, about, ShardFolder(folder), contents, causes)

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
        """Opens the new shards with rows that are needed, and removes those of them that are damaged."""
        part.learn(ranks.first(part.known_causes))
        names = [name for name in ranks.first(part.shards.names) if name not in part.seen]
        share, needed = ranks.share(names), part.needed()
        checks: dict[str, bool | None] = {}
        for told in ranks.gather(lambda: {name: part.shards.check(name, needed) for name in share}):
            checks |= told
        damaged = sorted(name for name, whole in checks.items() if whole is False)
        for name in damaged:
            rank_zero_warn(f"Feature cache: {part.shards.folder / name} is damaged; what it held is computed anew")
        ranks.first(lambda: part.shards.remove(damaged))
        part.places |= part.shards.open(sorted(name for name, whole in checks.items() if whole))
        part.seen |= checks.keys() - set(damaged)

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
        while not lock.is_locked:
            self._between_shards()
            with suppress(Timeout):
                lock.acquire(timeout=WAIT_SECONDS)

    def _blank(self, part: Part) -> torch.Tensor:
        if BLANK in part.places:
            return part.shards.row(*part.places[BLANK])
        return self._features(torch.zeros((1, *part.clips.reader.shape), dtype=torch.uint8))[0]

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (B, T', D) of pixels (B, T, 3, H, W), both on the CPU, or the same with views, (B, views, ...)."""
        features = self.encoder.encode(pixels.flatten(0, -5)).cpu()
        if not torch.isfinite(features).all():
            raise DataError(
                "data.feature_cache: the tower gives features that are not finite numbers; its weights or its "
                "processor's settings are damaged, or it needs a wider trainer.precision"
            )
        return features.unflatten(0, pixels.shape[:-4])

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
        with closing(self._compute(name, part, ranks.share(part.missing()), new)) as shards:
            while any(told := ranks.gather(lambda: next(shards, None))):
                for computed in filter(None, told):
                    part.places |= part.shards.open(filter(None, [computed.shard]))
                    part.causes |= computed.causes
                    ranks.first(partial(part.keep_causes, computed.lasting))
                ranks.gather(self._between_shards)

    def _prepare(self, part: Part) -> None:
        folder = part.shards.folder
        folder.mkdir(exist_ok=True)
        part.shards.sweep()
        atomic_write(folder / "about.json", (json.dumps(part.about, indent=2, allow_nan=False) + "\n").encode())

    def _compute(
        self, name: str, part: Part, rows: list[tuple[int, int]], new: dict[str, torch.Tensor]
    ) -> Iterator[Computed]:
        """Computes rows and writes them, and tells each shard."""
        causes, lasting, done, since = {}, {}, 0, time.monotonic()
        views = part.clips.reader.num_clips * part.clips.reader.num_crops
        loader = clip_loader(
            Pixels(part, rows),
            self.num_workers,
            collate,
            self.worker_timeout,
            batch_size=max(1, self.batch_size // views),
            generator=torch.Generator(),  # what the head draws later must not depend on how much is computed here
        )
        order = iter(rows)
        for batch in loader:
            features, readable = self._features(batch["pixel_values_videos"]), batch["readable"].tolist()
            reasons = iter(batch["bad_clips"])
            for row, good, lasts, (index, view) in zip(
                features, readable, batch["lasting"].tolist(), order, strict=False
            ):
                key = part.keys[index][view]
                if good:
                    new[key] = row
                    continue
                causes[index] = next(reasons)[2]
                if lasts:
                    lasting[key] = causes[index]
            done += len(features)
            held = sum(row.nbytes for row in new.values())
            if held >= SHARD_BYTES or time.monotonic() - since >= SHARD_SECONDS:
                yield Computed(part.shards.write(new) if new else None, causes, lasting)
                new, causes, lasting, since = {}, {}, {}, time.monotonic()
                rank_zero_info(f"Feature cache: {name} {done} of {len(rows)}")
        if new or causes:
            yield Computed(part.shards.write(new) if new else None, causes, lasting)


def _why_unread(clips: ClipDataset, index: int) -> str:
    """Why a clip has no hash, in the words of a run without the cache."""
    bad: list[Note] = []
    clips.read(index, 0, bad)
    return bad[0][2] if bad else CHANGES
