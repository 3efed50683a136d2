"""`model.config.feature_norm: whitened`: fits the whitening to training videos before the first step."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from ..data.features.split import CachedClips
from ..errors import UserError
from ..model.temporal_vidprism import VidPrismFeatureWhitening

# Videos used for the fit: enough to estimate the covariance of their frames, whatever the size of the dataset.
MOST_CLIPS = 4096
NEEDS_FEATURES = (
    "model.config.feature_norm: whitened needs cached features; set data.feature_cache to a folder and "
    "model.freeze_backbone to true"
)


def check_whitening(config: dict | None, feature_cache: str | None) -> None:
    """Checks that a recipe that whitens frame features also caches them.

    Raises:
        UserError: If it does not.
    """
    if (config or {}).get("feature_norm", "none") == "whitened" and not feature_cache:
        raise UserError(NEEDS_FEATURES)


def fit_whitening(model: nn.Module, clips: Dataset | None) -> None:
    """Fits the whitening of a model's frame features to the training set, unless it is fitted already.

    Every rank uses the same videos in the same order: at most 4096, evenly spaced, the first view of each.

    Args:
        model: The classifier.
        clips: Training set with cached features.

    Raises:
        UserError: If the features are not cached, or there is nothing to fit to.
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
