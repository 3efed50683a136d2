"""Clips as training and evaluation examples, and the order in which each process gets them.

What an example looks like follows from (seed, epoch, index) alone, so it is the same whatever the number of
workers or processes and whichever clips share its batch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from ..model import VidPrismVideoProcessor, decode_video, segment_centers
from .tables import ClipTable, stable_hash
from .transforms import ClipAugmentation, random_in_segments


class ClipDataset(Dataset):
    """Map-style dataset of clips, keyed by (epoch, index) or by index, which means epoch 0.

    Items are dicts of `pixel_values_videos` (T, 3, H, W) uint8, `labels` and `clip_index` (the row of the
    table). With an augmentation frames are drawn within segments at random; without one the processor makes
    the pixels from the frames at the segments' centres, as it does when the model is served.

    A clip that cannot be decoded raises VideoDecodeError, which names the file.

    Args:
        table: The clips.
        processor: Gives the number of frames and makes the evaluation input.
        augmentation: Makes the training input.
        seed: Seed of frames and augmentation.
        train_views: Random views of a clip that its epochs go through in turn; None draws a new one each epoch.
            With a number, items also hold `view`, so that what was computed of a view can be kept.
    """

    def __init__(
        self,
        table: ClipTable,
        processor: VidPrismVideoProcessor,
        augmentation: ClipAugmentation | None = None,
        seed: int = 0,
        train_views: int | None = None,
    ):
        self.table = table
        self.processor = processor
        self.augmentation = augmentation
        self.seed = seed
        self.train_views = train_views

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        path = self.table.video(index)
        view = epoch % self.train_views if self.train_views else epoch
        if self.augmentation is None:
            view, pixels = 0, self._evaluation_view(path)
        else:
            pixels = self._random_view(path, view, index)
        item = {
            "pixel_values_videos": pixels,
            "labels": int(self.table.labels[index]),
            "clip_index": int(index),
        }
        return item | {"view": view} if self.train_views else item

    def _random_view(self, path: str, view: int, index: int) -> torch.Tensor:
        def sample(total: int) -> np.ndarray:
            # A fresh generator: the decoder may ask twice, for the count it expects and for the true one.
            generator = np.random.default_rng(stable_hash("frames", self.seed, view, index))
            return random_in_segments(total, self.processor.num_frames, generator)

        frames, _ = decode_video(path, sample)
        clip = torch.from_numpy(frames).permute(0, 3, 1, 2)
        return self.augmentation(clip, stable_hash("view", self.seed, view, index)).contiguous()

    def _evaluation_view(self, path: str) -> torch.Tensor:
        frames, _ = decode_video(path, lambda total: segment_centers(total, self.processor.num_frames))
        return self.processor(
            frames, do_sample_frames=False, do_rescale=False, do_normalize=False, return_tensors="pt"
        )["pixel_values_videos"][0]


# A DistributedSampler by type, so that Lightning never divides an already divided order once more.
class ClipSampler(DistributedSampler):
    """Yields the (epoch, index) keys of this process.

    In training the order is shuffled anew each epoch and wrapped to a multiple of the number of processes, as
    all must take the same number of steps. In evaluation each clip comes exactly once over all processes, in
    order, so their shares may differ by one clip. Rank and number of processes are read when they are needed:
    they are not known yet when a data module is built.

    Args:
        num_clips: Clips in the dataset.
        training: Whether to shuffle and wrap.
        seed: Seed of the shuffle.
    """

    def __init__(self, num_clips: int, training: bool, seed: int = 0):
        super().__init__(range(num_clips), num_replicas=1, rank=0, shuffle=training, seed=seed)
        self.num_clips = num_clips
        self.training = training

    def __len__(self) -> int:
        rank, world = _rank_and_world()
        if self.training:
            return -(-self.num_clips // world)
        return len(range(rank, self.num_clips, world))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rank, world = _rank_and_world()
        order = np.arange(self.num_clips)
        if self.training:
            order = np.random.default_rng(stable_hash("order", self.seed, self.epoch)).permutation(order)
            order = np.resize(order, len(self) * world)  # repeats from the start
        epoch = self.epoch
        return ((epoch, index) for index in order[rank::world].tolist())


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
