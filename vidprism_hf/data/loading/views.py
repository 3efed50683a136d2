"""Chooses the views of a run: reader, horizontal flip, and their description.

Training uses random views unless the settings say otherwise, validation the processor's output.
"""

import re
from collections.abc import Iterable
from typing import Any

from ...model import VidPrismVideoProcessor
from ..reading.transforms import ClipAugmentation
from .dataset import ClipReader

# Labels with one of these words may change their meaning when flipped.
MIRROR_WORDS = frozenset(
    {"left", "right", "leftward", "rightward", "leftwards", "rightwards"}
    | {"clockwise", "counterclockwise", "anticlockwise"}
)


def mirror_label(labels: Iterable[str]) -> str | None:
    """Returns the first label that a horizontal flip may make wrong, None if there is none."""
    for label in labels:
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", label)
        if MIRROR_WORDS.intersection(word.lower() for word in words):
            return label
    return None


def mirrored(asked: bool | None, labels: Iterable[str]) -> tuple[bool, str]:
    """Decides whether to flip half of the training clips, and returns the reason in words.

    Args:
        asked: The setting; None decides by the labels.
        labels: Names of all labels.
    """
    sided = mirror_label(labels)
    if asked is not None:
        doubt = f", although label {sided!r} names a side" if asked and sided else ""
        return asked, f"horizontal flip {'on' if asked else 'off'} as asked{doubt}"
    if sided is not None:
        return False, f"horizontal flip off, since label {sided!r} names a side"
    return True, "horizontal flip on, since no label names a side"


def part_reader(
    part: str, settings: dict[str, Any], processor: VidPrismVideoProcessor, labels: Iterable[str]
) -> ClipReader:
    """Builds the reader for a part of a run.

    Args:
        part: train, val, or test (val in all test views).
        settings: The arguments of `VideoDataModule`.
        processor: Defines the evaluation input.
        labels: Names of all labels.
    """
    crop, own = processor.crop_size, {}
    if part == "train" and settings["augment"]:
        names = ("min_crop_scale", "grayscale", "rand_augment", "random_erasing")
        own["augmentation"] = ClipAugmentation(
            (crop["height"], crop["width"]),
            horizontal_flip=mirrored(settings["horizontal_flip"], labels)[0],
            mean=processor.image_mean,
            **{name: settings[name] for name in names},
        )
    elif part == "test":
        own = {"num_clips": settings["test_clips"], "num_crops": settings["test_crops"]}
    return ClipReader(
        processor,
        frame_stride=settings["frame_stride"],
        seed=settings["seed"],
        time_limit=settings["clip_time_limit"],
        **own,
    )


def describe_training_views(
    settings: dict[str, Any], processor: VidPrismVideoProcessor, labels: Iterable[str]
) -> dict[str, Any]:
    """Describes the training augmentation.

    Args:
        settings: The arguments of `VideoDataModule`.
        processor: Defines the evaluation input.
        labels: Names of all labels.
    """
    crop = processor.crop_size
    mixing = {name: settings[f"{name}_alpha"] or None for name in ("mixup", "cutmix")}
    if not settings["augment"]:
        return {"view": "that of the evaluation", **mixing}
    flip, stride = mirrored(settings["horizontal_flip"], labels)[1], settings["frame_stride"]
    return {
        "crop": f"random, {settings['min_crop_scale']:g} to 1 of the frame, to {crop['height']} x {crop['width']}",
        "horizontal flip": flip.removeprefix("horizontal flip "),
        "share without colour": settings["grayscale"],
        "frames": f"every {stride}th" if stride else "one of each equal segment",
        "RandAugment": settings["rand_augment"],
        "random erasing": settings["random_erasing"] or None,
        **mixing,
        "fixed views": settings["train_views"],
    }
