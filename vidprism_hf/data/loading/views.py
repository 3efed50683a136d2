"""How the clips of a run are seen: by which reader, whether mirrored, and in words.

Training clips are seen in random views unless the settings say otherwise, held-out ones as the processor makes them.
"""

import re
from collections.abc import Iterable
from typing import Any

from ...model import VidPrismVideoProcessor
from ..reading.transforms import ClipAugmentation
from .dataset import ClipReader

# Labels with one of these words may change their meaning in a mirror.
MIRROR_WORDS = frozenset(
    {"left", "right", "leftward", "rightward", "leftwards", "rightwards"}
    | {"clockwise", "counterclockwise", "anticlockwise"}
)


def mirror_label(labels: Iterable[str]) -> str | None:
    """The first label with a word that a mirror may turn wrong, None if there is none."""
    for label in labels:
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", label)
        if MIRROR_WORDS.intersection(word.lower() for word in words):
            return label
    return None


def mirrored(asked: bool | None, labels: Iterable[str]) -> tuple[bool, str]:
    """Whether to mirror half of the training clips, and the reason in words.

    Args:
        asked: What the setting says; None lets the labels decide.
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
    """What reads the clips of a part of a run.

    Args:
        part: train, val, or test, which is val in all test views.
        settings: The arguments of `VideoDataModule`.
        processor: What defines evaluation input.
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
    """What training clips go through, in words.

    Args:
        settings: The arguments of `VideoDataModule`.
        processor: What defines evaluation input.
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
