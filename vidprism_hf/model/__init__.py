"""All that travels to the Hub beside a checkpoint: configuration, model, decoder and processor."""

from .configuration_vidprism import VISION_PRESETS, VidPrismConfig
from .modeling_vidprism import (
    VidPrismForVideoClassification,
    VidPrismModel,
    VidPrismPreTrainedModel,
    VidPrismTemporalModel,
)
from .outputs_vidprism import VidPrismForVideoClassificationOutput, VidPrismModelOutput
from .video_decoding_vidprism import VideoDecodeError, VideoInfo, check_video, decode_video, segment_centers
from .video_processing_vidprism import VidPrismVideoProcessor

# Its save_pretrained then writes its code, too; the configuration's does for the models.
VidPrismVideoProcessor.register_for_auto_class("AutoVideoProcessor")

__all__ = [
    "VISION_PRESETS",
    "VidPrismConfig",
    "VidPrismForVideoClassification",
    "VidPrismForVideoClassificationOutput",
    "VidPrismModel",
    "VidPrismModelOutput",
    "VidPrismPreTrainedModel",
    "VidPrismTemporalModel",
    "VidPrismVideoProcessor",
    "VideoDecodeError",
    "VideoInfo",
    "check_video",
    "decode_video",
    "segment_centers",
]
