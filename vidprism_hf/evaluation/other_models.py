"""Other video classifiers of transformers (VideoMAE, TimeSformer, ViViT, V-JEPA 2), for comparison.

Each model's own processor prepares its input: number of frames, size, crop, mean and deviation. Frames are sampled as
for every model here: from equal segments of the video, or with `data.frame_stride`. Many of these models were published
with a stride, but their checkpoints do not state it.
"""

from pickle import UnpicklingError
from typing import Any

import lightning as L
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    BaseVideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import SizeDict

from ..data.features.encoder import FrameEncoder, encoder_of
from ..errors import UserError, why_not_loaded

BROKEN = (StrictDataclassError, SafetensorError, UnpicklingError)  # configuration or weights
FRAME_FIELDS = ("num_frames", "frames_per_clip")  # configuration fields with the number of frames
# VideoDataModule needs uint8 pixels, resized and cropped.
PIXELS = {"do_sample_frames": False, "do_rescale": False, "do_normalize": False, "return_tensors": "pt"}


class OtherProcessor:
    """Adapts another model's processor to what `VideoDataModule` expects.

    Args:
        processor: The processor of the model's checkpoint.
        num_frames: Frames per view.

    Attributes:
        num_frames: Frames per view.
        crop_size: Height and width of the model's input.
        rescale_factor: Converts uint8 pixels to the model's floats, together with mean and deviation.
        image_mean: One value per channel.
        image_std: One value per channel.
    """

    def __init__(self, processor: BaseVideoProcessor, num_frames: int):
        self.processor, self.num_frames = processor, num_frames
        edges = self(np.zeros((1, 256, 256, 3), dtype=np.uint8), **PIXELS)["pixel_values_videos"].shape[-2:]
        self.crop_size = SizeDict(height=edges[0], width=edges[1])
        # The last step, whether by settings or by code as in ViViT, is a linear function of each channel.
        ends = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 1, 1)
        line = processor.rescale_and_normalize(
            ends,
            processor.do_rescale,
            processor.rescale_factor,
            processor.do_normalize,
            processor.image_mean,
            processor.image_std,
        ).double()
        black, rise = line[0, :, 0, 0], (line[1] - line[0])[:, 0, 0]
        self.rescale_factor = 1 / 255
        self.image_std = (1 / rise).tolist()
        self.image_mean = (-black / rise).tolist()

    def __call__(self, frames: np.ndarray, **settings: Any) -> dict[str, torch.Tensor]:
        """Converts sampled frames, (T, H, W, 3) uint8, to `pixel_values_videos`, (1, T, 3, height, width).

        Settings are passed to the model's processor; with `PIXELS` it only resizes and crops.
        """
        video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        made = self.processor(video, **settings)
        (pixels,) = (made[name] for name in ("pixel_values_videos", "pixel_values") if name in made)
        return {"pixel_values_videos": pixels}

    def center_crop(self, clip: torch.Tensor, size: SizeDict) -> torch.Tensor:
        """Crops the centre of a clip (T, 3, H, W) to a height and width."""
        return self.processor.center_crop(clip, size)


class TestedClassifier(L.LightningModule):
    """Tests a classifier on data whose labels may be in another order.

    Args:
        model: A transformers model.
        order: The model's index of each of the data's classes; None if they are the same.
    """

    def __init__(self, model: PreTrainedModel, order: list[int] | None = None):
        super().__init__()
        self.model = model
        self.order = list(range(model.config.num_labels)) if order is None else order

    def frame_encoder(self) -> FrameEncoder:
        """Returns the tower for `data.feature_cache`; only a VidPrism has one."""
        return encoder_of(self.model, self.trainer)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        """Returns `logits` (B, views, K) in the order of the data's classes."""
        kept = "frame_features" in batch
        name = "frame_features" if kept else "pixel_values_videos"
        views = batch[name] if batch[name].ndim == (4 if kept else 6) else batch[name][:, None]
        logits = self.model(**{name if kept else self.model.main_input_name: views.flatten(0, 1)}).logits
        return {"logits": logits[:, self.order].unflatten(0, (-1, views.shape[1]))}


def load_other(
    name: str, config: PreTrainedConfig, revision: str | None = None
) -> tuple[PreTrainedModel, OtherProcessor]:
    """Loads a transformers classifier in float32, and its processor. Does not run code from the repository.

    Args:
        name: Folder or Hub id.
        config: Its configuration.
        revision: Branch, tag or commit on the Hub; main if None.

    Raises:
        UserError: If it is not a video classifier, cannot be loaded, or lacks some weights.
    """
    frames = frames_of(name, config)
    try:
        settings = {"revision": revision, "config": config, "dtype": torch.float32, "output_loading_info": True}
        model, info = AutoModelForVideoClassification.from_pretrained(name, trust_remote_code=False, **settings)
        processor = AutoVideoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
        processor = OtherProcessor(processor, frames)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, *BROKEN) as error:
        raise UserError(f"{name}: cannot be evaluated ({why_not_loaded(name, error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name}: incomplete classifier, {len(missing)} weights are missing ({missing[0]})")
    return model.eval(), processor


def frames_of(name: str, config: PreTrainedConfig) -> int:
    """Returns a model's number of frames from its configuration.

    Raises:
        UserError: If the configuration does not state it.
    """
    found = [getattr(config, field) for field in FRAME_FIELDS if getattr(config, field, None)]
    if not found:
        raise UserError(f"{name}: its config.json has no number of frames ({' or '.join(FRAME_FIELDS)})")
    return int(found[0])
