"""Pixel transforms: random views for training, test crops, and mixup and cutmix of batches.

A view is the same for all frames of a clip and stays uint8; normalisation happens on the device. Randomness comes
from a seed given with each call and leaves the process's random state alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn.functional import one_hot
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from transformers.image_utils import OPENAI_CLIP_MEAN

from ...model import VidPrismVideoProcessor

# The short side is resized to 256 pixels for a crop of 224, and in proportion for others.
RESIZE_RATIO = 256 / 224
RAND_AUGMENT_MAX = 30  # the strongest magnitude of RandAugment


class ClipAugmentation:
    """Draws a random view of a training clip: resize, RandomResizedCrop, flip, RandAugment, grayscale, erasing.

    The order is timm's. RandAugment is Cubuk et al., arXiv:1909.13719, with two operations per clip; its operations
    that depend on the content (contrast, autocontrast, equalize) treat each frame separately. It has no flip. Random
    erasing is Zhong et al., arXiv:1708.04896, with one rectangle for the whole clip.

    Args:
        crop_size: Height and width of the result, in pixels.
        min_crop_scale: Smallest area of the crop as a fraction of the frame.
        horizontal_flip: Whether to flip half of the clips.
        grayscale: Fraction of clips converted to grayscale.
        rand_augment: Magnitude of RandAugment, 0 to 30; None disables it.
        random_erasing: Fraction of clips with a rectangle of 2 to 33 % of the frame erased.
        mean: The backbone's mean colour, (red, green, blue) from 0 to 1. It fills erased and out-of-frame areas, so
            that they are 0 after normalisation.

    Attributes:
        settings: All of these; with the seed they determine the view.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        min_crop_scale: float = 0.08,
        horizontal_flip: bool = True,
        grayscale: float = 0.2,
        rand_augment: int | None = None,
        random_erasing: float = 0.0,
        mean: Sequence[float] = OPENAI_CLIP_MEAN,
    ):
        if min(crop_size) < 1:
            raise ValueError(f"crop_size must be at least 1, got {crop_size}")
        if not 0 < min_crop_scale <= 1:
            raise ValueError(f"min_crop_scale must be above 0 and at most 1, got {min_crop_scale}")
        if rand_augment is not None and not 0 <= rand_augment <= RAND_AUGMENT_MAX:
            raise ValueError(f"rand_augment must lie between 0 and {RAND_AUGMENT_MAX}, got {rand_augment}")
        for name, share in (("grayscale", grayscale), ("random_erasing", random_erasing)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {share}")
        self.settings = {
            "crop_size": tuple(crop_size),
            "min_crop_scale": min_crop_scale,
            "horizontal_flip": horizontal_flip,
            "grayscale": grayscale,
            "rand_augment": rand_augment,
            "random_erasing": random_erasing,
            "mean": tuple(mean),
        }
        fill = [round(255 * value) for value in mean]
        bicubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
        steps = [
            v2.Resize(round(min(crop_size) * RESIZE_RATIO), **bicubic),
            v2.RandomResizedCrop(crop_size, scale=(min_crop_scale, 1.0), **bicubic),
            v2.RandomHorizontalFlip(0.5 if horizontal_flip else 0.0),
        ]
        if rand_augment is not None:
            bilinear = InterpolationMode.BILINEAR
            bins = RAND_AUGMENT_MAX + 1
            steps.append(v2.RandAugment(2, rand_augment, num_magnitude_bins=bins, interpolation=bilinear, fill=fill))
        steps.append(v2.RandomGrayscale(grayscale))
        if random_erasing:
            steps.append(v2.RandomErasing(random_erasing, value=fill))
        self.transform: Callable[[torch.Tensor], torch.Tensor] = v2.Compose(steps)

    def __call__(self, clip: torch.Tensor, seed: int) -> torch.Tensor:
        """Draws a view.

        Args:
            clip: (T, 3, H, W) uint8, of any size; small frames are enlarged.
            seed: The view's seed, in [0, 2**63).

        Returns:
            (T, 3, height, width) uint8.
        """
        with _seeded(seed):
            return self.transform(clip)


def test_views(frames: np.ndarray, processor: VidPrismVideoProcessor, num_crops: int) -> torch.Tensor:
    """Returns the test crops of a clip: the processor's centre crop, or three along the longer side.

    Args:
        frames: (T, H, W, 3) uint8.
        processor: Resizes and crops.
        num_crops: 1 for the centre; 3 for left, centre and right, or top, centre and bottom of an upright video.

    Returns:
        (num_crops, T, 3, height, width) uint8. The centre crop is the processor's output.

    Raises:
        ValueError: If `num_crops` is neither 1 nor 3.
    """
    if num_crops not in (1, 3):
        raise ValueError(f"num_crops must be 1 or 3, got {num_crops}")
    as_it_is = {"do_sample_frames": False, "do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    if num_crops == 1:
        return processor(frames, **as_it_is)["pixel_values_videos"]
    clip = processor(frames, do_center_crop=False, **as_it_is)["pixel_values_videos"][0]
    size = processor.crop_size
    # The outer parts are as long as the crop, so that their centre crop keeps their length.
    if clip.shape[-1] >= clip.shape[-2]:
        parts = clip[..., : size.width], clip, clip[..., -size.width :]
    else:
        parts = clip[..., : size.height, :], clip, clip[..., -size.height :, :]
    return torch.stack([processor.center_crop(part, size) for part in parts])


class BatchMixing:
    """Mixes each clip of a training batch, and its label, with its neighbour.

    Mixup (Zhang et al., arXiv:1710.09412) averages two clips with weights; CutMix (Yun et al., arXiv:1905.04899)
    pastes a rectangle of one into the other, the same in all frames. One weight or rectangle is drawn per batch. With
    both, each batch draws one of them with equal probability. A batch of one clip is not mixed.

    Args:
        num_classes: Number of classes, K.
        mixup_alpha: Both parameters of mixup's Beta distribution; 0 disables it.
        cutmix_alpha: The same for CutMix.

    Raises:
        ValueError: If a parameter is negative.
    """

    def __init__(self, num_classes: int, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0):
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if alpha < 0:
                raise ValueError(f"{name} must not be negative, got {alpha}")
        kinds = ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha))
        chosen = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
        self.num_classes = num_classes
        self.transform = v2.RandomChoice(chosen) if chosen else None

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixes a batch on its device, without synchronisation.

        Args:
            pixels: (B, T, 3, H, W), floats.
            labels: Class indices, (B,).
            seed: The batch's seed, in [0, 2**63).

        Returns:
            The mixed pixels and soft labels, (B, K), float32; without mixing, the same pixels and one-hot labels.
        """
        if self.transform is None or len(labels) == 1:
            return pixels, one_hot(labels, self.num_classes).float()
        with _seeded(seed):
            # As a Video, the only type for which these transforms take 5 dimensions.
            mixed, shares = self.transform(tv_tensors.Video(pixels), labels)
        return mixed.as_subclass(torch.Tensor), shares


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator and restores its state afterwards."""
    # Not torch.manual_seed, which would also seed accelerators, whose state is not restored here.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
