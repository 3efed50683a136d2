"""The video processor of VidPrism: from a file, an array or frames to the pixels that the model reads.

It is the one definition of evaluation input: the evaluation of a training, the pipeline and the command line
all call it, and every file goes through `decode_video`. Resize and crop are CLIP's: short side, bicubic with
antialias, centre crop.
"""

import json
import math
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

from .video_decoding_vidprism import decode_video, is_animation, segment_centers

CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
# Far above what any tower reads: more is a mistake or an attack, and memory for it would be asked for.
MAX_EDGE = 4096
MAX_FRAMES = 10_000
SETTINGS = ("size", "crop_size", "num_frames", "rescale_factor", "image_mean", "image_std")
HOW_TO_PASS = (
    "pass uint8 or floats from 0 to 255, or set do_rescale=False for 0 to 1, and do_normalize=False too for pixels "
    "that are normalised already"
)


class VidPrismVideoProcessor(BaseVideoProcessor):
    """Prepares videos for VidPrism.

    A video is a path, an http(s) URL, the bytes of a file, a binary file object, an animated PIL image, a 4-D array
    or tensor (T, H, W, C) or (T, C, H, W) of 1, 3 or 4 channels, or a list of frames (PIL images of one size and any
    mode, or 3-D arrays of one shape and dtype). The processor takes one video or a list of them, kinds mixed.

    Values are 0 to 255 in any integer or floating dtype, and give the same pixels in each. With `do_rescale=False`
    floats are 0 to 1; with `do_normalize=False` too they are taken as they are, normalised ones for example. A video
    in another range is refused, as are NaN, infinity and bool. A floating video that stays between 0 and 1 is taken
    for one of that range, unless it is black; as integers it is what it says, very dark.

    By default it keeps the frames at the centres of `num_frames` equal segments (shorter videos repeat
    frames), resizes the short side to `size`, crops the centre and normalises as CLIP does. The output holds
    `pixel_values_videos`, float32 (B, T, 3, H, W) with `return_tensors="pt"`. With `do_rescale=False` and
    `do_normalize=False` they are the same pixels as uint8, for normalising later on a device.

    A grey video becomes RGB by repeating its channel, a transparent one by laying it over white.

    Raises:
        ValueError: If a setting is out of its range, here or in a call.
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

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        _check_settings({name: getattr(self, name, None) for name in SETTINGS})
        for name in ("image_mean", "image_std"):
            if isinstance(getattr(self, name), (int, float)):
                setattr(self, name, (getattr(self, name),) * 3)  # whoever reads it expects a value for each channel

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

    def preprocess(self, videos, **kwargs):
        """Prepare videos; see the class, and `BaseVideoProcessor` for all that a call may set."""
        _check_settings({name: kwargs.get(name) for name in SETTINGS})  # before anything is decoded
        return super().preprocess(videos, **kwargs)

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
            top = _top(video)
            colour, alpha = video[..., :3, :, :].float(), video[..., 3:, :, :].float() / top
            blended = colour * alpha + top * (1 - alpha)
            return (blended if video.is_floating_point() else blended.round()).to(video.dtype)
        return video

    def rescale_and_normalize(self, images: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Rescale and normalise videos (..., C, H, W), the last step, and lay them out in that order.

        Until here decoded frames keep their channels last in memory, where resizing is several times faster.
        """
        return super().rescale_and_normalize(images.contiguous(), *args, **kwargs)

    def _preprocess(self, videos, **kwargs):
        white = _white(
            **{name: kwargs[name] for name in ("do_rescale", "rescale_factor", "do_normalize", "image_mean")}
        )
        if white is not None:
            for video in videos:  # before resizing, which carries floats past their range
                _check_range(video, white)
        if kwargs["do_resize"] and white in (1, 255):
            # As uint8, whose resizing clamps at each step: the same pixels whatever the dtype.
            videos = [_to_uint8(video, white) for video in videos]
            if white == 1:
                factor = kwargs["rescale_factor"] if kwargs["do_rescale"] else 1
                kwargs |= {"do_rescale": True, "rescale_factor": factor / 255}
        return super()._preprocess(videos, **kwargs)

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
                    clip = [video[index] for index in indices] if isinstance(video, list) else video[indices]
                    metadata.frames_indices = indices.tolist()
                clip = _stack_frames(clip) if isinstance(clip, list) else clip
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
    return (
        isinstance(video, (str, os.PathLike, bytes, bytearray, memoryview))
        or hasattr(video, "read")
        or is_animation(video)
    )


def _is_array(video: Any, *dims: int) -> bool:
    return isinstance(video, (np.ndarray, torch.Tensor)) and video.ndim in dims


def _is_frame(item: Any) -> bool:
    return (is_pil_image(item) and not is_animation(item)) or _is_array(item, 2, 3)


def _as_list(videos: Any) -> list:
    """One video or nested lists of them as a flat list of files, 4-D arrays and lists of frames."""
    if _is_file(videos) or _is_array(videos, 4):
        return [videos]
    if _is_array(videos, 5):
        return list(videos)
    if _is_frame(videos):
        return [[videos]]
    if not isinstance(videos, (list, tuple)):
        shape = f" of shape {tuple(videos.shape)}" if hasattr(videos, "shape") else ""
        raise ValueError(
            f"Not a video: {type(videos).__name__}{shape}. Pass a path, URL, bytes, file object, 4-D array "
            "or list of frames, or a list of these."
        )
    if not videos:
        raise ValueError("Got an empty list of videos.")
    if all(_is_frame(item) for item in videos):
        _check_one("size", {item.size for item in videos if is_pil_image(item)})
        _check_one("shape", {tuple(item.shape) for item in videos if not is_pil_image(item)})
        return [list(videos)]
    first = videos[0]
    if is_animation(first) and len(videos) == first.n_frames and all(item is first for item in videos):
        return [first]  # what list(ImageSequence.Iterator(image)) gives: the image itself, again and again
    return [video for item in videos for video in _as_list(item)]


def _stack_frames(frames: Sequence) -> np.ndarray | torch.Tensor:
    """Frames of one video as a 4-D array, or tensor where they are tensors."""
    images = [frame for frame in frames if is_pil_image(frame)]
    if images:
        # One mode for all: a picture's frames may be grey, of a palette and in colour in turn.
        mode = "RGBA" if any(image.has_transparency_data for image in images) else "RGB"
        frames = [_pil_to_array(frame, mode) if is_pil_image(frame) else frame for frame in frames]
    _check_one("shape", {tuple(frame.shape) for frame in frames})
    _check_one("dtype", {f"{type(frame).__name__} of {frame.dtype}" for frame in frames})
    stacked = torch.stack(frames) if isinstance(frames[0], torch.Tensor) else np.stack(frames)
    return stacked[..., None] if stacked.ndim == 3 else stacked  # grey frames without a channel axis


def _check_one(what: str, found: set) -> None:
    if len(found) > 1:
        raise ValueError(f"The frames of a video must have one {what}, got {sorted(found)}.")


def _pil_to_array(image: Any, mode: str) -> np.ndarray:
    """Colours of 8 bits; Pillow would cut off all above 255 of the modes that hold more."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode.startswith("I;16"):
            values = values // 257  # all 16 bits are used
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 255) or (image.mode == "F" and 0 < high <= 1):
            raise ValueError(f"A PIL image of mode {image.mode} holds {low:g} to {high:g}, not 0 to 255: convert it.")
        grey = np.rint(values).astype(np.uint8)[..., None]
        return np.concatenate([grey] * 3 + [np.full_like(grey, 255)] * (mode == "RGBA"), axis=-1)
    return np.asarray(image.convert(mode))


def _channels_first(video: np.ndarray | torch.Tensor, data_format: str | None) -> torch.Tensor:
    """A video as a tensor (T, C, H, W).

    Where the shape leaves open which axis is the channels', an array has them last and a tensor first, as
    their libraries do.
    """
    is_tensor = isinstance(video, torch.Tensor)
    video = _pixels(video)
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


def _pixels(video: np.ndarray | torch.Tensor) -> torch.Tensor:
    """A video as a tensor of uint8 or finite float32; integers of other widths are the same pixels."""
    dtype = str(video.dtype).removeprefix("torch.")
    if isinstance(video, np.ndarray):
        wide = {"f": np.float32, "i": np.int64, "u": np.int64}.get(video.dtype.kind)
        if wide is None:
            raise ValueError(f"A video holds numbers from 0 to 255, got {dtype}: convert it to uint8.")
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            video = torch.from_numpy(np.ascontiguousarray(video, np.uint8 if dtype == "uint8" else wide))
    if video.dtype == torch.uint8:
        return video
    if video.dtype == torch.bool or video.is_complex():
        raise ValueError(f"A video holds numbers from 0 to 255, got {dtype}: convert it to uint8.")
    if video.is_floating_point():
        video = video.float()
        if not all(map(math.isfinite, _ends(video))):
            raise ValueError("The video holds NaN or infinite values: repair what it was computed from.")
        return video
    low, high = _ends(video.long())
    if low < 0 or high > 255:
        raise ValueError(f"A video of {dtype} holds 0 to 255, got {low} to {high}: scale it.")
    return video.to(torch.uint8)


def _ends(video: torch.Tensor) -> tuple[float, float]:
    """The lowest and highest value; NaN where there is one."""
    return tuple(value.item() for value in video.aminmax()) if video.numel() else (0, 0)


def _top(video: torch.Tensor) -> float:
    """The value of white: 1 of a floating video that stays at or below it, else 255."""
    return 1.0 if video.is_floating_point() and video.numel() and video.max() <= 1 else 255.0


def _white(
    do_rescale: bool, rescale_factor: float, do_normalize: bool, image_mean: float | Sequence[float]
) -> float | None:
    """The value of white that rescaling and normalising expect; None where they leave it open."""
    if do_rescale and rescale_factor < 1:
        return max(255, 1 / rescale_factor)
    if not do_normalize:
        return None
    return 255 if np.max(image_mean) > 1 else 1  # a mean of 0 to 255 needs no rescaling


def _check_range(video: torch.Tensor, white: float) -> None:
    """Check that the values of a video go from 0 to white.

    Raises:
        ValueError: If they do not.
    """
    if video.dtype == torch.uint8:
        if white == 1:
            raise ValueError("uint8 pixels cannot be normalised without rescaling: set do_normalize=False too.")
        return
    low, high = _ends(video)
    if low < -1e-3 or high > white * 1.001 or (white > 1 and 0 < high <= 1):
        raise ValueError(f"The video's values lie between {low:g} and {high:g}, not 0 and {white:g}: {HOW_TO_PASS}.")


def _to_uint8(video: torch.Tensor, white: float) -> torch.Tensor:
    return video if video.dtype == torch.uint8 else (video * (255 / white)).round().clamp(0, 255).to(torch.uint8)


def _check_settings(settings: dict[str, Any]) -> None:
    """Check the settings that are given, None meaning none.

    Raises:
        ValueError: If one is out of its range.
    """
    for name, value in settings.items():
        if value is None:
            continue
        if name in ("size", "crop_size"):
            edges = [*dict(value).values()] if hasattr(value, "get") else value
            edges = edges if isinstance(edges, (list, tuple)) else [edges]
            right = all(edge is None or _is_count(edge, MAX_EDGE) for edge in edges)
            wanted = f"edges of 1 to {MAX_EDGE} pixels"
        elif name == "num_frames":
            right, wanted = _is_count(value, MAX_FRAMES), f"a whole number from 1 to {MAX_FRAMES}"
        elif name == "rescale_factor":
            right, wanted = _is_finite(value, positive=True), "a number above 0"
        else:
            positive = name == "image_std"
            parts = value if isinstance(value, (list, tuple, np.ndarray)) else [value] * 3
            right = len(parts) == 3 and all(_is_finite(part, positive) for part in parts)
            wanted = "one or three finite numbers" + (" above 0" if positive else "")
        if not right:
            raise ValueError(f"{name} of the video processor must be {wanted}, got {value}.")


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 1 <= value <= most


def _is_finite(value: Any, positive: bool) -> bool:
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return number and math.isfinite(value) and (value > 0 or not positive)


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
