"""`model.config.feature_norm: whitened`: the fit to the training clips, before the first step."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from ..data.features.split import CachedClips
from ..errors import UserError
from ..model.temporal_vidprism import VidPrismFeatureWhitening

# Clips that a fit takes: the covariance of their frames is known well enough, whatever the size of the data.
MOST_CLIPS = 4096
NEEDS_FEATURES = (
    "model.config.feature_norm: whitened is fitted to kept features; set data.feature_cache to a folder and "
    "model.freeze_backbone to true"
)


def check_whitening(config: dict | None, feature_cache: str | None) -> None:
    """Looks whether a recipe that whitens frame features keeps them.

    Raises:
        UserError: If it does not.
    """
    if (config or {}).get("feature_norm", "none") == "whitened" and not feature_cache:
        raise UserError(NEEDS_FEATURES)


def fit_whitening(model: nn.Module, clips: Dataset | None) -> None:
    """Fits the whitening of a model's frame features to training clips, unless it has been.

    On every process the same clips are taken, in the same order: at most 4096, evenly spread, each in its first view.

    Args:
        model: The classifier.
        clips: Training clips with kept features.

    Raises:
        UserError: If their features are not kept, or there is nothing to fit to.
    """
    for module in model.modules():
        if isinstance(module, VidPrismFeatureWhitening) and not module.num_frames:
            try:
                module.fit(_frames(clips))
            except ValueError as error:
                raise UserError(f"model.config.feature_norm: {error}") from error


def _frames(clips: Dataset | None) -> Iterator[torch.Tensor]:
    if not isinstance(clips, CachedClips):
        raise UserError(NEEDS_FEATURES)
    number = len(clips)
    for index in np.unique(np.linspace(0, number - 1, min(number, MOST_CLIPS)).round().astype(int)).tolist():
        item = clips[0, index]
        if item["readable"]:
            yield item["frame_features"]
