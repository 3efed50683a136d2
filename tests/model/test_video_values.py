"""What the processor makes of values and settings: the same pixels in every dtype, or one clear error."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidprism_hf.model.video_processing_vidprism import VidPrismVideoProcessor

KEY = "pixel_values_videos"


def small(**kwargs):
    return VidPrismVideoProcessor(num_frames=4, size=32, crop_size=32, **kwargs)


def pixels(videos, processor=None, **kwargs):
    return (processor or small())(videos, return_tensors="pt", **kwargs)[KEY]


def edges(seed=0, count=4, height=40, width=60):
    """Frames of hard edges from black to white, which bicubic resizing carries past both."""
    rng = np.random.default_rng(seed)
    blocks = rng.choice([0, 3, 120, 252, 255], (count, height // 4, width // 4, 3))
    return blocks.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)


NUMPY = ["float16", "float32", "float64", "longdouble", ">f4", "int16", "int32", "int64", ">i2", "uint16", "uint64"]
TORCH = [torch.float16, torch.bfloat16, torch.float64, torch.int16, torch.uint16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", [*NUMPY, *TORCH], ids=str)
def test_the_same_pixels_in_every_dtype(dtype):
    video = edges()
    other = video.astype(dtype) if isinstance(dtype, str) else torch.from_numpy(video).to(dtype)
    assert torch.equal(pixels(other), pixels(video))
    assert torch.equal(pixels(other[:, :, :3]), pixels(video[:, :, :3]))
    assert torch.equal(pixels([[*other], video]), pixels([video, video]))


@given(st.integers(0, 2**32), st.integers(8, 90), st.integers(8, 90), st.booleans())
@settings(max_examples=60, deadline=None)
def test_values_from_0_to_1_never_slip_through(seed, height, width, channels_first):
    video = edges(seed, 2, height, width)
    if not video.size or not video.any():
        return
    unit = video.transpose(0, 3, 1, 2) / 255 if channels_first else video / 255
    layout = {"input_data_format": "channels_first" if channels_first else "channels_last"}
    with pytest.raises(ValueError, match="do_rescale=False"):
        pixels(unit, **layout)
    torch.testing.assert_close(pixels(unit, do_rescale=False, **layout), pixels(video), atol=1e-5, rtol=0)


def test_one_video_of_a_batch_is_enough_for_an_error():
    video = edges()
    with pytest.raises(ValueError, match="between 0 and 1, not 0 and 255"):
        pixels([video, video / 255])


WRONG = {
    "-1 to 1": (lambda video: video / 127.5 - 1, "between -1 and 1, not 0 and 255"),
    "normalised": (lambda video: (video / 255 - 0.45) / 0.27, "between -1.66667 and 2.03704"),
    "16 bits": (lambda video: video * 257.0, "between 0 and 65535"),
    "16 bits, integers": (lambda video: video * np.uint16(257), "of int64 holds 0 to 255|of uint16 holds 0 to 255"),
    "signed": (lambda video: video.astype(int) - 128, "holds 0 to 255, got -128 to 127"),
    "NaN": (lambda video: np.where(video == 255, np.nan, video), "NaN or infinite"),
    "infinite": (lambda video: np.where(video == 255, np.inf, video), "NaN or infinite"),
    "too large for 32 bits": (lambda video: video * 1e300, "NaN or infinite"),
    "bool": (lambda video: video > 100, "got bool: convert it to uint8"),
    "complex": (lambda video: video * 1j, "got complex128"),
    "objects": (lambda video: video.astype(object), "got object"),
    "0 and 1 only": (lambda video: (video > 100) * 1.0, "between 0 and 1, not 0 and 255"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_values_of_another_range_are_refused(kind):
    change, message = WRONG[kind]
    for video in (change(edges()), [*change(edges())]):
        with pytest.raises(ValueError, match=message) as caught:
            pixels(video)
        assert "\n" not in str(caught.value)
    if change(edges()).dtype != object:
        with pytest.raises(ValueError, match=message):
            pixels(torch.from_numpy(change(edges())))


def test_dark_videos_are_videos():
    dark = edges() // 100  # 0 to 2
    assert torch.equal(pixels(dark.astype(np.float32)), pixels(dark))
    darker = (edges() > 100).astype(np.int64)
    assert torch.equal(pixels(darker), pixels(darker.astype(np.uint8)))
    black = np.zeros_like(dark)
    for dtype in (np.uint8, np.float32, np.int64):
        assert torch.equal(pixels(black.astype(dtype)), pixels(black))
    assert torch.equal(pixels(black / 255, do_rescale=False), pixels(black))


def test_without_rescaling_values_go_from_0_to_1():
    video = edges()
    for wrong in (video, video * 1.0, video / 127.5 - 1):
        with pytest.raises(ValueError, match="do_normalize=False"):
            pixels(wrong, do_rescale=False)
        with pytest.raises(ValueError, match="do_normalize=False"):
            pixels(wrong, small(do_rescale=False))
    # Mean and deviation may be those of 0 to 255.
    mean, std = [120.0, 121.0, 122.0], [60.0, 61.0, 62.0]
    large = pixels(video, do_rescale=False, image_mean=mean, image_std=std)
    expected = pixels(video, image_mean=[part / 255 for part in mean], image_std=[part / 255 for part in std])
    torch.testing.assert_close(large, expected, atol=1e-5, rtol=0)
    assert torch.equal(pixels(video * 1.0, do_rescale=False, image_mean=mean, image_std=std), large)


def test_normalised_pixels_are_taken_as_they_are():
    video = torch.randn(4, 3, 32, 32)
    assert torch.equal(pixels(video, do_rescale=False, do_normalize=False)[0], video)
    with pytest.raises(ValueError, match="NaN"):
        pixels(video / 0, do_rescale=False, do_normalize=False)


def test_other_factors():
    video = edges()
    torch.testing.assert_close(pixels(video / 255, rescale_factor=1.0), pixels(video), atol=1e-5, rtol=0)
    wide = np.full((4, 32, 32, 3), 30000.0)
    expected = pixels(wide / 65535, do_rescale=False)
    torch.testing.assert_close(pixels(wide, rescale_factor=1 / 65535), expected, atol=0.01, rtol=0)
    doubled = pixels(video * 1.0, rescale_factor=1 / 127.5, do_normalize=False)
    assert (float(doubled.min()), float(doubled.max())) == (0, 2)


def test_transparent_floats_lie_over_white_of_their_range():
    video = np.concatenate([edges(), edges(1)[..., :1]], axis=-1)
    expected = pixels(video)
    torch.testing.assert_close(pixels(video * 1.0), expected, atol=0.02, rtol=0)
    torch.testing.assert_close(pixels(video / 255, do_rescale=False), expected, atol=0.02, rtol=0)


def test_frames_of_two_dtypes_are_refused():
    video = edges()
    with pytest.raises(ValueError, match="must have one dtype"):
        pixels([video[0], video[1] / 255])
    with pytest.raises(ValueError, match="must have one dtype"):
        pixels([video[0], torch.from_numpy(video[1])])


# --- settings


BAD_SETTINGS = {
    "image_std": [[0.5, 0.0, 0.5], [0.5, -1, 0.5], [float("nan"), 1, 1], [float("inf"), 1, 1], [1, 1], [1] * 4, [], 0],
    "image_mean": [[0.5, float("nan"), 0.5], [0.5, 0.5], [0.5] * 4, float("inf")],
    "rescale_factor": [0.0, -1 / 255, float("nan"), float("inf")],
    "num_frames": [0, -1, 10**9],
    "size": [10**6, 0, -5, {"shortest_edge": 10**6}, {"shortest_edge": 0}, {"height": 32, "width": -1}],
    "crop_size": [10**6, 0, {"height": 10**6, "width": 32}, {"height": 32, "width": 0}],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_SETTINGS.items() for value in values]
)
def test_settings_out_of_range_are_refused(name, value):
    for call in (lambda: VidPrismVideoProcessor(**{name: value}), lambda: pixels("none.mp4", **{name: value})):
        with pytest.raises(ValueError, match=name) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_one_number_stands_for_all_channels():
    processor = small(image_mean=0.5, image_std=0.25)
    assert (processor.image_mean, processor.image_std) == ((0.5,) * 3, (0.25,) * 3)
    assert torch.equal(pixels(edges(), processor), pixels(edges(), image_mean=0.5, image_std=0.25))
