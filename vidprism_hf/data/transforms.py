"""Training input: which frames of a clip, and one random view of them.

A view is the same for all frames of a clip and stays uint8; floats are made on the device. Randomness comes
from a seed given with each call and leaves the process's random state alone.
"""

from collections.abc import Callable

import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2

# The short side is brought to 256 pixels for a crop of 224, and in proportion for others.
RESIZE_RATIO = 256 / 224


def random_in_segments(total: int, num_frames: int, generator: np.random.Generator) -> np.ndarray:
    """One random frame from each of `num_frames` equal segments of a video.

    Segment k covers the time from `k * total / num_frames` to `(k + 1) * total / num_frames`, in frames;
    where segments are shorter than a frame, frames repeat.

    Args:
        total: Frames in the video.
        num_frames: Frames wanted.
        generator: Source of randomness.

    Returns:
        Indices in non-decreasing order, (num_frames,), int64.

    Raises:
        ValueError: If either number is less than 1.
    """
    if total < 1 or num_frames < 1:
        raise ValueError(f"total and num_frames must be at least 1, got {total} and {num_frames}")
    position = np.arange(num_frames) + generator.random(num_frames)
    # Rounding may carry a position to the segment's end.
    last = (np.arange(1, num_frames + 1) * total - 1) // num_frames
    return np.minimum((position * total / num_frames).astype(np.int64), last)


class ClipAugmentation:
    """Random view of a training clip: short side, RandomResizedCrop, horizontal flip, grey.

    Args:
        crop_size: Height and width of the result, in pixels.
        min_crop_scale: Smallest area of the crop as a share of the picture.
        horizontal_flip: Whether half of the clips are mirrored.
        grayscale: Share of clips that lose their colour.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        min_crop_scale: float = 0.08,
        horizontal_flip: bool = True,
        grayscale: float = 0.2,
    ):
        resize_short_side = round(min(crop_size) * RESIZE_RATIO)
        bicubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
        self.transform: Callable[[torch.Tensor], torch.Tensor] = v2.Compose(
            [
                v2.Resize(resize_short_side, **bicubic),
                v2.RandomResizedCrop(crop_size, scale=(min_crop_scale, 1.0), **bicubic),
                v2.RandomHorizontalFlip(0.5 if horizontal_flip else 0.0),
                v2.RandomGrayscale(grayscale),
            ]
        )

    def __call__(self, clip: torch.Tensor, seed: int) -> torch.Tensor:
        """Draws a view.

        Args:
            clip: (T, 3, H, W) uint8.
            seed: The view's seed, in [0, 2**63).

        Returns:
            (T, 3, height, width) uint8.
        """
        # The CPU generator alone: torch.manual_seed would seed accelerators too, which nothing would restore.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(clip)
