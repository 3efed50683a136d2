"""The video processor of VidPrism: from a file, an array or frames to the pixels that the model reads.

It is the one definition of evaluation input: the evaluation of a training, the pipeline and the command line
all call it, and every file goes through `decode_video`. Resize and crop are CLIP's: short side, bicubic with
antialias, centre crop.
"""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import CLIPVisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, is_pil_image
from transformers.utils import cached_file
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, make_batched_metadata

from .video_decoding_vidprism import decode_video, segment_centers

CHANNELS = (1, 3, 4)  # grey, RGB, RGBA


class VidPrismVideoProcessor(BaseVideoProcessor):
    """Prepares videos for VidPrism.

    A video is a path, an http(s) URL, the bytes of a file, a binary file object, a 4-D array or tensor
    (T, H, W, C) or (T, C, H, W) of 1, 3 or 4 channels with values from 0 to 255, or a list of frames (PIL
    images or 3-D arrays of one size). The processor takes one video or a list of them, kinds mixed.

    By default it keeps the frames at the centres of `num_frames` equal segments (shorter videos repeat
    frames), resizes the short side to `size`, crops the centre and normalises as CLIP does. The output holds
    `pixel_values_videos`, float32 (B, T, 3, H, W) with `return_tensors="pt"`. With `do_rescale=False` and
    `do_normalize=False` they are the same pixels as uint8, for normalising later on a device.

    A grey video becomes RGB by repeating its channel, a transparent one by laying it over white.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 224}  # noqa: RUF012 - the base class copies it for each instance
    default_to_square = False
    crop_size = {"height": 224, "width": 224}  # noqa: RUF012
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = True
    num_frames = 32
    model_input_names = ["pixel_values_videos"]  # noqa: RUF012

    @classmethod
    def from_vision_pretrained(
        cls, name_or_path: str | os.PathLike, num_frames: int, **hub_kwargs
    ) -> "VidPrismVideoProcessor":
        """A processor that fits a CLIP checkpoint.

        The crop is the image size of the checkpoint's config. Mean, standard deviation and resize size come
        from its `preprocessor_config.json`; without one they are CLIP's.

        Args:
            name_or_path: Hub id or folder of the checkpoint.
            num_frames: Frames to sample from each video.
            **hub_kwargs: `revision`, `token`, `cache_dir` and the like, for the Hub.

        Raises:
            OSError: If there is no such checkpoint.
        """
        config = _read_json(name_or_path, "config.json", **hub_kwargs)
        if config is None:
            raise OSError(f"{name_or_path} holds no config.json: pass the Hub id or folder of a CLIP checkpoint.")
        vision = config.get("vision_config") or config
        # Configs leave out what equals the default of their class.
        image_size = vision.get("image_size", CLIPVisionConfig().image_size)
        facts = _read_json(name_or_path, "preprocessor_config.json", **hub_kwargs) or {}
        return cls(
            num_frames=num_frames,
            size=_resize_size(facts, image_size),
            crop_size={"height": image_size, "width": image_size},
            image_mean=facts.get("image_mean", OPENAI_CLIP_MEAN),
            image_std=facts.get("image_std", OPENAI_CLIP_STD),
        )

    def sample_frames(
        self, metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None, **kwargs
    ) -> np.ndarray:
        """Indices of the frames at the centres of equal segments.

        Args:
            metadata: Tells the count of frames, `total_num_frames`.
            num_frames: Frames wanted, more than there are included; the processor's own number if not given.
            fps: Not supported: the model reads a fixed number of segments, however long the video is.

        Returns:
            Non-decreasing int64 indices, shape (num_frames,).

        Raises:
            ValueError: If `fps` is given or no number of frames is known.
        """
        if fps is not None:
            raise ValueError("VidPrism samples by segments: pass `num_frames`, not `fps`.")
        num_frames = self.num_frames if num_frames is None else num_frames
        if num_frames is None:
            raise ValueError("Sampling needs `num_frames`, of the call or of the processor.")
        return segment_centers(metadata.total_num_frames, num_frames)

    def fetch_videos(self, video_url_or_urls, sample_indices_fn: Callable | None = None):
        """Decode one video file or a list of them.

        Args:
            video_url_or_urls: A path, URL, bytes or file object, or a list of these.
            sample_indices_fn: Maps `metadata=VideoMetadata(...)` to the indices wanted; without it, all are.

        Returns:
            The frames, uint8 (T, H, W, 3), and their `VideoMetadata`; for a list, a list of each.

        Raises:
            VideoDecodeError: If a video is missing, unreadable or damaged.
        """
        if isinstance(video_url_or_urls, (list, tuple)):
            pairs = [self.fetch_videos(video, sample_indices_fn) for video in video_url_or_urls]
            return [frames for frames, _ in pairs], [metadata for _, metadata in pairs]

        def sample(total: int) -> Sequence[int]:
            if sample_indices_fn is None:
                return range(total)
            return sample_indices_fn(metadata=VideoMetadata(total_num_frames=total))

        frames, info = decode_video(video_url_or_urls, sample)
        return frames, VideoMetadata(
            total_num_frames=info.num_frames,
            fps=info.fps,
            width=info.width,
            height=info.height,
            duration=info.num_frames / info.fps if info.fps else None,
            video_backend="pyav",
            frames_indices=list(info.indices),
        )

    def convert_to_rgb(self, video: torch.Tensor) -> torch.Tensor:
        """Turn a grey, RGB or RGBA video (T, C, H, W) into RGB of the same dtype, transparency over white."""
        channels = video.shape[-3]
        if channels == 1:
            return video.expand(*video.shape[:-3], 3, *video.shape[-2:])
        if channels == 4:
            colour, alpha = video[..., :3, :, :].float(), video[..., 3:, :, :].float() / 255
            blended = colour * alpha + 255 * (1 - alpha)
            return (blended if video.is_floating_point() else blended.round()).to(video.dtype)
        return video

    def rescale_and_normalize(self, images: torch.Tensor, do_rescale: bool, *args, **kwargs) -> torch.Tensor:
        """Rescale and normalise videos (..., C, H, W), the last step, and lay them out in that order.

        Until here decoded frames keep their channels last in memory, where resizing is several times faster.

        Raises:
            ValueError: If the values are to be rescaled and lie between 0 and 1 already.
        """
        if do_rescale and images.is_floating_point() and 0 < images.max() <= 1:
            raise ValueError(
                "The values of this video lie between 0 and 1 already: pass do_rescale=False, or 0 to 255."
            )
        return super().rescale_and_normalize(images.contiguous(), do_rescale, *args, **kwargs)

    def _decode_and_sample_videos(self, videos, video_metadata, do_sample_frames=None, sample_indices_fn=None):
        videos = _as_list(videos)
        given = make_batched_metadata(videos, video_metadata) if video_metadata is not None else None
        clips, facts = [], []
        for place, video in enumerate(videos):
            if _is_file(video):
                clip, metadata = self.fetch_videos(video, sample_indices_fn)
            else:
                clip, metadata = video, given[place] if given else VideoMetadata(total_num_frames=len(video))
                if do_sample_frames:
                    # The length of the array, since metadata may speak of the file that it was cut from.
                    indices = sample_indices_fn(metadata=VideoMetadata(total_num_frames=len(video)))
                    clip, metadata.frames_indices = video[indices], indices.tolist()
            clips.append(clip)
            facts.append(metadata)
        return clips, facts

    def _prepare_input_videos(self, videos, do_convert_rgb=None, input_data_format=None, device=None):
        prepared = []
        for video in videos:
            video = _channels_first(video, input_data_format)
            if do_convert_rgb:
                video = self.convert_to_rgb(video)
            prepared.append(video if device is None else video.to(device))
        return prepared


def _is_file(video: Any) -> bool:
    return isinstance(video, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(video, "read")


def _is_array(video: Any, *dims: int) -> bool:
    return isinstance(video, (np.ndarray, torch.Tensor)) and video.ndim in dims


def _is_frame(item: Any) -> bool:
    return is_pil_image(item) or _is_array(item, 2, 3)


def _as_list(videos: Any) -> list:
    """One video or nested lists of them as a flat list of files and 4-D arrays."""
    if _is_file(videos) or _is_array(videos, 4):
        return [videos]
    if _is_array(videos, 5):
        return list(videos)
    if _is_frame(videos):
        return [_stack_frames([videos])]
    if not isinstance(videos, (list, tuple)):
        shape = f" of shape {tuple(videos.shape)}" if hasattr(videos, "shape") else ""
        raise ValueError(
            f"Not a video: {type(videos).__name__}{shape}. Pass a path, URL, bytes, file object, 4-D array "
            "or list of frames, or a list of these."
        )
    if not videos:
        raise ValueError("Got an empty list of videos.")
    if all(_is_frame(item) for item in videos):
        return [_stack_frames(videos)]
    return [video for item in videos for video in _as_list(item)]


def _stack_frames(frames: Sequence) -> np.ndarray | torch.Tensor:
    """Frames of one video as a 4-D array, or tensor where they are tensors."""
    frames = [_pil_to_array(frame) if is_pil_image(frame) else frame for frame in frames]
    shapes = {tuple(frame.shape) for frame in frames}
    if len(shapes) > 1:
        raise ValueError(f"The frames of a video must have one shape, got {sorted(shapes)}.")
    stacked = torch.stack(frames) if isinstance(frames[0], torch.Tensor) else np.stack(frames)
    return stacked[..., None] if stacked.ndim == 3 else stacked  # grey frames without a channel axis


def _pil_to_array(image: Any) -> np.ndarray:
    # RGBA keeps its alpha for the blending; palettes and the like are no colours yet.
    return np.asarray(image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGBA"))


def _channels_first(video: np.ndarray | torch.Tensor, data_format: str | None) -> torch.Tensor:
    """A video as a tensor (T, C, H, W).

    Where the shape leaves open which axis is the channels', an array has them last and a tensor first, as
    their libraries do.
    """
    is_tensor = isinstance(video, torch.Tensor)
    video = video if is_tensor else torch.from_numpy(np.ascontiguousarray(video))
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise ValueError(f"A video has uint8 or floating values from 0 to 255, got {video.dtype}.")
    if data_format is None:
        fitting = [axis for axis in ((1, 3) if is_tensor else (3, 1)) if video.shape[axis] in CHANNELS]
        axis = fitting[0] if fitting else None
    else:
        axis = {"channels_first": 1, "channels_last": 3}[getattr(data_format, "value", data_format)]
    if axis is None or video.shape[axis] not in CHANNELS:
        raise ValueError(
            f"A video of shape {tuple(video.shape)} has no channel axis of 1, 3 or 4 where it should: pass "
            "(T, H, W, C) or (T, C, H, W)."
        )
    return video.movedim(axis, 1)


def _read_json(name_or_path: str | os.PathLike, filename: str, **hub_kwargs) -> dict | None:
    """A JSON file of a checkpoint, None where it has no such file; a Hub out of reach raises."""
    path = cached_file(name_or_path, filename, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _resize_size(facts: dict, image_size: int) -> int | dict[str, int]:
    """The size to resize to; that of the image processor holds for its own crop only."""
    crop = facts.get("crop_size", image_size)
    edges = set(crop.values()) if isinstance(crop, dict) else {crop}
    return facts.get("size", image_size) if edges == {image_size} else image_size
