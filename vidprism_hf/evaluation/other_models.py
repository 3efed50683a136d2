"""Classifiers of videos of transformers that are no VidPrism (VideoMAE, TimeSformer, ViViT, V-JEPA 2), for comparison.

Each is shown the clips as its own processor makes them: its number of frames, its size, crop, mean and deviation. The
frames are those that every model here gets: from equal segments of the video, or with `data.frame_stride`, which is the
rate that many of them were published with; no checkpoint tells it.
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

from ..errors import UserError, why_not_loaded

BROKEN = (StrictDataclassError, SafetensorError, UnpicklingError)  # configuration or weights
FRAME_FIELDS = ("num_frames", "frames_per_clip")  # what configurations call the number of frames
# What VideoDataModule asks for: pixels as they are decoded, resized and cropped.
PIXELS = {"do_sample_frames": False, "do_rescale": False, "do_normalize": False, "return_tensors": "pt"}


class OtherProcessor:
    """The processor of another model where `VideoDataModule` expects ours.

    Args:
        processor: What the model's checkpoint comes with.
        num_frames: Frames that the model takes.

    Attributes:
        num_frames: The same.
        crop_size: Height and width of what the model sees.
        rescale_factor: With mean and deviation it makes the model's floats of uint8 pixels.
        image_mean: A value for each channel.
        image_std: A value for each channel.
    """

    def __init__(self, processor: BaseVideoProcessor, num_frames: int):
        self.processor, self.num_frames = processor, num_frames
        edges = self(np.zeros((1, 256, 256, 3), dtype=np.uint8), **PIXELS)["pixel_values_videos"].shape[-2:]
        self.crop_size = SizeDict(height=edges[0], width=edges[1])
        # Whatever its last step does, by its own settings or by code as ViViT's, to each channel it is a straight line.
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
        """Chosen frames, (T, H, W, 3) uint8, as `pixel_values_videos`, (1, T, 3, height, width).

        Settings go to the model's processor, as they would to ours; with those of `PIXELS` it resizes and crops.
        """
        video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        made = self.processor(video, **settings)
        (pixels,) = (made[name] for name in ("pixel_values_videos", "pixel_values") if name in made)
        return {"pixel_values_videos": pixels}

    def center_crop(self, clip: torch.Tensor, size: SizeDict) -> torch.Tensor:
        """The middle of a clip (T, 3, H, W), so high and wide."""
        return self.processor.center_crop(clip, size)


class OtherClassifier(L.LightningModule):
    """Tests a classifier on clips whose labels have another order.

    Args:
        model: Of transformers.
        order: For each class of the data the model's index of it.
    """

    def __init__(self, model: PreTrainedModel, order: list[int]):
        super().__init__()
        self.model = model
        self.order = order

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        """Gives `logits` (B, views, K) to callbacks, in the order of the data's classes."""
        clips = batch["pixel_values_videos"]
        views = clips if clips.ndim == 6 else clips[:, None]
        logits = self.model(**{self.model.main_input_name: views.flatten(0, 1)}).logits
        return {"logits": logits[:, self.order].unflatten(0, (-1, views.shape[1]))}


def load_other(
    name: str, config: PreTrainedConfig, revision: str | None = None
) -> tuple[PreTrainedModel, OtherProcessor]:
    """Loads a classifier of transformers, in float32, and its processor. No code of the repository is run.

    Args:
        name: Folder or Hub id.
        config: Its configuration.
        revision: Branch, tag or commit on the Hub; main if None.

    Raises:
        UserError: If it is none, cannot be loaded, or some of its weights are not there.
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
        raise UserError(f"{name}: not a whole classifier, {len(missing)} weights are missing ({missing[0]})")
    return model.eval(), processor


def frames_of(name: str, config: PreTrainedConfig) -> int:
    """How many frames a model takes, as its configuration says.

    Raises:
        UserError: If it does not say.
    """
    found = [getattr(config, field) for field in FRAME_FIELDS if getattr(config, field, None)]
    if not found:
        raise UserError(f"{name}: its config.json has none of {', '.join(FRAME_FIELDS)}, so no number of frames")
    return int(found[0])
