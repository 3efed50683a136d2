"""The arguments of the data module: values that cannot be, and those that do not go together.

What the kind of source has to do with it is in sources.py.
"""

import math
import sys
from typing import Any

from .feature_cache import parse_size
from .tables import DataError

# Least and greatest value of each number; None is no bound. A value that is null is not looked at.
BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "batch_size": (1, None),
    "num_frames": (1, None),
    "num_workers": (0, None),
    "split": (1, 3),
    "shots": (1, None),
    "seed": (0, None),
    "train_views": (1, None),
    "frame_stride": (1, None),
    "test_clips": (1, None),
    "grayscale": (0, 1),
    "rand_augment": (0, 30),
    "random_erasing": (0, 1),
    "mixup_alpha": (0, None),
    "cutmix_alpha": (0, None),
    "max_bad_fraction": (0, 1),
}

# What makes the random views of training, and the values that ask for none.
VIEW_SETTINGS: dict[str, tuple[Any, ...]] = {
    "train_views": (None,),
    "horizontal_flip": (None, False),
    "rand_augment": (None,),
    "random_erasing": (0,),
}

# What needs a table of all clips.
TABLE_SETTINGS = (
    *("train_views", "feature_cache"),
    *("shots", "val_fraction", "val_list", "val_pattern", "train_list", "allow_missing"),
)


def check_arguments(settings: dict[str, Any]) -> None:
    """Looks for values that cannot be, and for settings that do not go together.

    Args:
        settings: The arguments of `VideoDataModule`.

    Raises:
        DataError: If there is one.
    """
    _check_values(settings)
    _check_views(settings)
    if settings["streaming"]:
        _check_streaming(settings)
    parse_size(settings["feature_cache_limit"])
    if settings["feature_cache"]:
        _check_feature_cache(settings)


def _check_values(settings: dict[str, Any]) -> None:
    for name, (least, most) in BOUNDS.items():
        value = settings[name]
        if value is None or least <= value <= (sys.float_info.max if most is None else most):
            continue
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise DataError(f"data.{name}={value}: must be {bounds}")
    scale, crops = settings["min_crop_scale"], settings["test_crops"]
    if not 0 < scale <= 1:
        raise DataError(f"data.min_crop_scale={scale}: must be above 0 and at most 1")
    for name in ("clip_time_limit", "worker_timeout"):
        if (limit := settings[name]) is not None and not 0 < limit < math.inf:
            raise DataError(f"data.{name}={limit}: must be above 0, or null for no limit")
    if crops not in (1, 3):
        raise DataError(f"data.test_crops={crops}: must be 1 or 3")


def _check_views(settings: dict[str, Any]) -> None:
    for name, unused in VIEW_SETTINGS.items():
        if not settings["augment"] and settings[name] not in unused:
            raise DataError(
                f"data.{name}={settings[name]}: is of random views, and data.augment=false trains on the evaluation's; "
                "leave one out"
            )


def _check_streaming(settings: dict[str, Any]) -> None:
    for name in TABLE_SETTINGS:
        if settings[name]:
            raise DataError(f"data.{name}: needs a table of all clips, which data.streaming has not; remove one")
    if not settings["augment"]:
        raise DataError("data.augment: streamed training clips are always augmented; set it to true")


def _check_feature_cache(settings: dict[str, Any]) -> None:
    if settings["train_views"] is None and settings["augment"]:
        raise DataError("data.feature_cache: needs data.train_views, the number of random views of each clip")
    for name in ("mixup_alpha", "cutmix_alpha"):
        if settings[name]:
            raise DataError(f"data.{name}: mixes pixels, which data.feature_cache replaces; use one of them")
