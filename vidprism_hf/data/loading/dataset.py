"""Training and evaluation examples, and the order in which each rank gets them.

An example depends on the seed, the epoch and the video's name alone, not on the number of workers or ranks or on the
rest of its batch.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate
from torch.utils.data.distributed import DistributedSampler

from ...distributed import rank_and_world
from ...model import VideoDecodeError, VidPrismVideoProcessor, decode_video
from ..bad_videos import Note
from ..reading.processor import normalize_clips
from ..reading.sampling import FrameSampling
from ..reading.time_limit import TimeLimit
from ..reading.transforms import ClipAugmentation, test_views
from ..tables import ClipTable, stable_hash

# Videos of a class to try in place of a bad one before the example counts as unreadable.
MAX_REPLACEMENTS = 16


@dataclass
class ClipReader:
    """Decodes a video into pixels: a random view for training, or the processor's output for evaluation.

    Attributes:
        processor: Sets the number of frames and makes the evaluation input.
        augmentation: Makes the training input; None gives evaluation input.
        frame_stride: Step between the frames of a clip; None takes one from each equal segment of the video.
        num_clips: Clips per video in evaluation.
        num_crops: Crops of each clip in evaluation, 1 or 3.
        seed: Seed of the frames and the augmentation.
        time_limit: Seconds that decoding may take; None is unlimited.
    """

    processor: VidPrismVideoProcessor
    augmentation: ClipAugmentation | None = None
    frame_stride: int | None = None
    num_clips: int = 1
    num_crops: int = 1
    seed: int = 0
    time_limit: float | None = None
    _within: TimeLimit = field(init=False, repr=False)

    def __post_init__(self):
        # The decoder checks the time itself; this outer limit catches calls that never return.
        self._within = TimeLimit(None if self.time_limit is None else self.time_limit + 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the pixels: (T, 3, H, W), or (views, T, 3, H, W) with several views."""
        crop = self.processor.crop_size
        views = () if self.augmentation or self.num_clips * self.num_crops == 1 else (self.num_clips * self.num_crops,)
        return (*views, self.processor.num_frames, 3, crop["height"], crop["width"])

    def __call__(self, video: str | bytes, key: tuple) -> torch.Tensor:
        """Decodes a video.

        Args:
            video: Path, URL or bytes.
            key: Identifies the view; with the seed it determines everything random.

        Returns:
            uint8 pixels of `shape`.

        Raises:
            VideoDecodeError: If the video cannot be decoded in time.
        """
        return self._random_view(video, key) if self.augmentation else self._test_views(video)

    def _random_view(self, video: str | bytes, key: tuple) -> torch.Tensor:
        sampling = FrameSampling(self.processor.num_frames, self.frame_stride)

        def sample(total: int) -> np.ndarray:
            # A fresh generator, since the decoder may call twice: with the expected frame count and with the true one.
            return sampling.train(total, np.random.default_rng(stable_hash("frames", self.seed, *key)))

        clip = torch.from_numpy(self._decode(video, sample)).permute(0, 3, 1, 2)
        return self.augmentation(clip, stable_hash("view", self.seed, *key)).contiguous()

    def _test_views(self, video: str | bytes) -> torch.Tensor:
        sampling = FrameSampling(self.processor.num_frames, self.frame_stride)
        frames = self._decode(video, lambda total: sampling.test(total, self.num_clips).reshape(-1))
        crops = test_views(frames, self.processor, self.num_crops)  # (crops, clips * T, 3, H, W)
        return crops.unflatten(1, (self.num_clips, -1)).transpose(0, 1).reshape(self.shape)

    def _decode(self, video: str | bytes, sample: Callable[[int], np.ndarray]) -> np.ndarray:
        try:
            frames, _ = self._within(partial(decode_video, time_limit=self.time_limit), video, sample)
        except TimeoutError:
            name = video if isinstance(video, str) else f"<bytes, {len(video)} bytes>"
            cause = f"took longer than {self.time_limit:g} s"
            message = f"{name}: {cause}; shorten or remove it, or raise data.clip_time_limit"
            raise VideoDecodeError(message, name, cause) from None
        return frames


class ClipDataset(Dataset):
    """Map-style dataset of videos, keyed by `ClipSampler`'s keys or by index, which means epoch 0.

    Items are dicts of
    - `pixel_values_videos`: uint8 of the reader's shape;
    - `labels`: the class index;
    - `clip_index`: the table row that the pixels come from;
    - `readable`: False if the pixels are only zeros;
    - `counts`: False if the key marks the example as padding;
    - `bad_clips`: the videos that could not be decoded, as (name, class index, cause).

    In training, a video that cannot be decoded is replaced by another of its class, determined by seed, epoch and
    index; in evaluation it counts as wrong. No video raises, since the other ranks would hang waiting for this one:
    check `bad_clips` in each batch.

    Args:
        table: The videos.
        reader: Makes their pixels.
        train_views: Number of fixed random views per video, one per epoch in turn; None draws a new one each epoch.
        training: Whether this is for training; None means if the reader augments. Without an augmentation every
            epoch uses the evaluation view.
    """

    def __init__(
        self, table: ClipTable, reader: ClipReader, train_views: int | None = None, training: bool | None = None
    ):
        self.table = table
        self.reader = reader
        self.train_views = train_views
        self.training = reader.augmentation is not None if training is None else training
        # Remembered per process, so that a video that hangs is not retried each epoch.
        self._causes: dict[int, str] = {}
        self._lasting: set[int] = set()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: int | tuple) -> dict[str, Any]:
        epoch, index, *counts = key if isinstance(key, tuple) else (0, key)
        view = (epoch % self.train_views if self.train_views else epoch) if self.reader.augmentation else 0
        pixels, bad, chosen = None, [], index
        for chosen in self._candidates(view, index) if self.training else (index,):
            pixels = self.read(chosen, view, bad)
            if pixels is not None:
                break
        shown = index if pixels is None else chosen
        return example(self.reader, pixels, int(self.table.labels[index]), int(shown), bad, all(counts))

    def read(self, index: int, view: int, bad: list[Note]) -> torch.Tensor | None:
        """Returns the pixels of a video, or None after adding an entry to `bad`."""
        if index not in self._causes:
            start = time.monotonic()
            try:
                return self._load(index, view)
            except VideoDecodeError as error:
                self._causes[index] = error.cause or str(error)
                limit, elsewhere = self.reader.time_limit, isinstance(error.__context__, (OSError, MemoryError))
                if not elsewhere and (limit is None or time.monotonic() - start < limit):
                    self._lasting.add(index)
        bad.append((self.table.name(index), int(self.table.labels[index]), self._causes[index]))
        return None

    def is_lasting(self, index: int) -> bool:
        """Whether a video is bad because of its content rather than a timeout, the disk or the memory."""
        return index in self._lasting

    def _load(self, index: int, view: int) -> torch.Tensor:
        # Keyed by name, so that a video has the same views in a few-shot draw or another fold, where its index differs.
        return self.reader(self.table.video(index), (view, self.table.name(index)))

    def _candidates(self, view: int, index: int) -> Iterator[int]:
        """Yields the video itself, then others of its class in a reproducible random order."""
        yield index
        others = np.flatnonzero(self.table.labels == self.table.labels[index])
        others = others[others != index]
        generator = np.random.default_rng(stable_hash("replacement", self.reader.seed, view, index))
        yield from generator.permutation(others)[:MAX_REPLACEMENTS].tolist()


def example(
    reader: ClipReader,
    pixels: torch.Tensor | None,
    label: int,
    clip_index: int,
    bad: list[Note],
    counts: bool = True,
) -> dict[str, Any]:
    """Returns one item of a dataset; missing pixels become zeros."""
    return {
        "pixel_values_videos": torch.zeros(reader.shape, dtype=torch.uint8) if pixels is None else pixels,
        "labels": label,
        "clip_index": clip_index,
        "readable": pixels is not None,
        "counts": counts,
        "bad_clips": bad,
    }


class PlainExamples(Dataset):
    """Normalised examples for a training loop of your own; made by `VideoDataModule.examples`.

    Items are dicts of `pixel_values_videos`, float32 (T, 3, H, W), and `labels`. Each epoch has new random views if
    the loop calls `set_epoch`, as transformers' Trainer does.

    Args:
        clips: The dataset that VideoDataModule's own loaders read.
    """

    def __init__(self, clips: ClipDataset):
        self.clips = clips
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Switches to the views of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads an example; in training a video that cannot be decoded is replaced, with a warning.

        Raises:
            VideoDecodeError: If a validation video, which is never replaced, cannot be decoded.
        """
        example = self.clips[(self.epoch, index)]
        for name, _, cause in example["bad_clips"]:
            if not self.clips.training or not example["readable"]:
                raise VideoDecodeError(f"{name}: {cause}")
            warnings.warn(f"{name}: {cause}; replaced by another video of its class", stacklevel=2)
        pixels = normalize_clips(example["pixel_values_videos"], self.clips.reader.processor)
        return {"pixel_values_videos": pixels, "labels": example["labels"]}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches items and joins their `bad_clips` into one list.

    Adds two numbers that stay on the host: `num_counted`, the items that count, and `num_unreadable`, how many of those
    have no pixels.
    """
    bad = [entry for item in items for entry in item["bad_clips"]]
    counted = [item for item in items if item["counts"]]
    unreadable = sum(not item["readable"] for item in counted)
    of_batch = ("bad_clips", "counts")
    batch = default_collate([{key: value for key, value in item.items() if key not in of_batch} for item in items])
    return batch | {"bad_clips": bad, "num_counted": len(counted), "num_unreadable": unreadable}


# A DistributedSampler by type, so that Lightning does not wrap it and shard the order twice.
class ClipSampler(DistributedSampler):
    """Yields the (epoch, index) keys of this rank.

    Each video is used exactly once across all ranks, so ranks may differ by one video. Evaluation keeps the table's
    order; training reshuffles each epoch, and all ranks take the same number of batches: a rank with one batch fewer
    repeats its first video as (epoch, index, False), which does not count. Rank and world size are read on use, since
    they are not known when a data module is built.

    Args:
        num_clips: Videos in the dataset.
        training: Whether to shuffle and to equalise the number of batches.
        seed: Seed of the shuffle.
        batch_size: The loader's batch size.
    """

    def __init__(self, num_clips: int, training: bool, seed: int = 0, batch_size: int = 1):
        super().__init__(range(num_clips), num_replicas=1, rank=0, shuffle=training, seed=seed)
        self.num_clips = num_clips
        self.training = training
        self.batch_size = batch_size
        self._begun = (0, 0)

    def begin(self, epoch: int, keys: int = 0) -> None:
        """Sets the epoch and how many of its keys this rank has already used."""
        self.set_epoch(epoch)
        self._begun = (epoch, keys)

    def __len__(self) -> int:
        rank, world = rank_and_world()
        return len(range(rank, self.num_clips, world)) + self._lacks_a_batch(rank, world)

    def __iter__(self) -> Iterator[tuple]:
        rank, world = rank_and_world()
        order, epoch = np.arange(self.num_clips), self.epoch
        if self.training:
            order = np.random.default_rng(stable_hash("order", self.seed, epoch)).permutation(order)
        keys: list[tuple] = [(epoch, index) for index in order[rank::world].tolist()]
        if self._lacks_a_batch(rank, world):
            keys.append((epoch, int(order[rank % self.num_clips]), False))
        return iter(keys[self._begun[1] if epoch == self._begun[0] else 0 :])

    def _lacks_a_batch(self, rank: int, world: int) -> bool:
        """Whether this rank has fewer training batches than rank 0, which has the most."""
        own, most = (len(range(first, self.num_clips, world)) for first in (rank, 0))
        return self.training and own < most and own % self.batch_size == 0
