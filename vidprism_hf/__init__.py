"""VidPrism: fine-tune CLIP on video with a mixture of temporal experts, and publish the result.

Importing the package registers its classes with transformers' Auto classes, so that `AutoModel`,
`AutoModelForVideoClassification`, `AutoVideoProcessor` and `pipeline("video-classification")` know
`vidprism`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification, AutoVideoProcessor

from ._version import __version__
from .model import (
    VideoDecodeError,
    VidPrismConfig,
    VidPrismForVideoClassification,
    VidPrismModel,
    VidPrismTemporalModel,
    VidPrismVideoProcessor,
)

AutoConfig.register("vidprism", VidPrismConfig, exist_ok=True)
AutoModel.register(VidPrismConfig, VidPrismModel, exist_ok=True)
AutoModelForVideoClassification.register(VidPrismConfig, VidPrismForVideoClassification, exist_ok=True)
AutoVideoProcessor.register(VidPrismConfig, VidPrismVideoProcessor, exist_ok=True)

# Training needs Lightning, which is slow to import and which prediction does not need: resolved on first use.
_LAZY = {
    "VideoDataModule": ("data", "VideoDataModule"),
    "VidPrismLightningModule": ("training", "VidPrismLightningModule"),
    "Run": ("training.run", "Run"),
    "finetune": ("training.run", "finetune"),
    "evaluate": ("evaluation.evaluate", "evaluate"),
    "predict": ("evaluation.predict", "predict_files"),
    "push": ("hub.push", "push_export"),
}


def __getattr__(name: str):
    if name in _LAZY:
        from importlib import import_module

        module, attribute = _LAZY[name]
        return getattr(import_module(f".{module}", __name__), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Run",
    "VidPrismConfig",
    "VidPrismForVideoClassification",
    "VidPrismLightningModule",
    "VidPrismModel",
    "VidPrismTemporalModel",
    "VidPrismVideoProcessor",
    "VideoDataModule",
    "VideoDecodeError",
    "__version__",
    "evaluate",
    "finetune",
    "predict",
    "push",
]
