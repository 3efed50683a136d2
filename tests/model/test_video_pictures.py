"""Animated pictures, by path or opened with Pillow, and lists of pictures in any mode."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence, features

from vidprism_hf.model.video_decoding_vidprism import VideoDecodeError, check_video, decode_video
from vidprism_hf.model.video_processing_vidprism import VidPrismVideoProcessor

KEY = "pixel_values_videos"
ANIMATED = {"gif": {"disposal": 2}, "png": {}, "webp": {"lossless": True}, "avif": {"quality": 100}}
DURATIONS = [40, 200, 40, 80, 40]


def raw(videos, **kwargs):
    processor = VidPrismVideoProcessor(num_frames=5, size=32, crop_size=32)
    return processor(videos, do_rescale=False, do_normalize=False, return_tensors="pt", **kwargs)[KEY]


def pictures(count=5, mode="RGBA", height=48, width=64):
    """Frames of one colour each on a ground that is transparent in part."""
    found = []
    for number in range(count):
        image = np.zeros((height, width, 4), np.uint8)
        image[..., :3] = np.random.default_rng(number).integers(0, 256, 3)
        image[height // 4 :, :, 3] = 255
        image[:, : width // 4, 3] = 0
        found.append(Image.fromarray(image).convert(mode))
    return found


def over_white(image):
    image = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))[..., :3]


def animation(folder, suffix, mode="RGBA", **kwargs):
    if suffix in ("webp", "avif") and not features.check(suffix):
        pytest.skip(f"this Pillow has no {suffix}")
    first, *others = pictures(mode=mode)
    path = folder / f"clip.{suffix}"
    first.save(path, save_all=True, append_images=others, duration=DURATIONS, **ANIMATED[suffix], **kwargs)
    return path


@pytest.mark.parametrize("mode", ["RGBA", "RGB"])
@pytest.mark.parametrize("suffix", ANIMATED)
def test_an_animated_picture_is_a_video_by_path_and_opened(tmp_path, suffix, mode):
    path = animation(tmp_path, suffix, mode)
    with Image.open(path) as image:
        expected = np.stack([over_white(frame) for frame in ImageSequence.Iterator(image)])
        assert expected.shape == (5, 48, 64, 3)
        image.seek(2)
        for source in (path, path.read_bytes(), image):
            frames, info = decode_video(source, range)
            np.testing.assert_array_equal(frames, expected)
            assert (info.num_frames, info.height, info.width) == (5, 48, 64)
            some, info = decode_video(source, lambda total: [3, total - 4, 3])
            np.testing.assert_array_equal(some, expected[[3, 1, 3]])
            assert info.indices == (3, 1, 3)
            assert check_video(source).num_frames == 5
            assert decode_video(source, range, short_side=24)[0].shape == (5, 24, 32, 3)
        assert image.tell() == 2
        for source in (path, image, [image], [*ImageSequence.Iterator(image)], [[image]]):
            assert torch.equal(raw(source), raw(expected))
        assert torch.equal(raw([image, path]), raw([expected, expected]))
        copies = [frame.copy() for frame in ImageSequence.Iterator(image)]
        assert torch.equal(raw(copies), raw(expected))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "avif", "jpg"])
def test_a_still_picture_by_path_is_refused_and_opened_is_one_frame(tmp_path, suffix):
    if suffix in ("webp", "avif") and not features.check(suffix):
        pytest.skip(f"this Pillow has no {suffix}")
    path = tmp_path / f"still.{suffix}"
    pictures(1, "RGB")[0].save(path)
    if suffix == "gif":  # is one frame: the format is that of animations
        assert decode_video(path, range)[1].num_frames == 1
    else:
        with pytest.raises(VideoDecodeError, match="is a still image"):
            decode_video(path, range)
    with Image.open(path) as image:
        assert torch.equal(raw(image), raw(np.asarray(image.convert("RGB"))[None]))


def test_a_picture_for_old_readers_is_no_frame(tmp_path):
    path = tmp_path / "clip.png"
    first, *others = pictures(4, "RGB")
    first.save(path, save_all=True, append_images=others, default_image=True)
    expected = np.stack([np.asarray(image) for image in others])
    with Image.open(path) as image:
        assert image.n_frames == 4
        for source in (path, image):
            np.testing.assert_array_equal(decode_video(source, range)[0], expected)


def test_two_views_of_one_scene_are_no_video(tmp_path):
    left, right = pictures(2, "RGB")
    left.save(tmp_path / "photo.mpo", save_all=True, append_images=[right])
    with Image.open(tmp_path / "photo.mpo") as image:
        assert image.n_frames == 2
        assert raw([image, image.convert("RGB")]).shape == (1, 5, 3, 32, 32)


@pytest.mark.parametrize("suffix", ["webp", "avif"])
def test_damaged_animations_are_refused(tmp_path, suffix):
    path = animation(tmp_path, suffix)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    for call in (lambda: decode_video(path, range), lambda: check_video(path)):
        with pytest.raises(VideoDecodeError, match=str(path)) as caught:
            call()
        assert "\n" not in str(caught.value)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode_is_its_colours(mode):
    if mode in ("RGBa", "LAB"):
        image = pictures(1, "RGB")[0]
        image = image.convert("RGBA").convert("RGBa") if mode == "RGBa" else Image.new("LAB", (64, 48), (90, 100, 200))
    elif mode == "PA":
        image = pictures(1)[0].convert("LA").convert("PA")
    else:
        image = pictures(1)[0].convert("RGB" if mode not in ("LA", "RGBA") else mode).convert(mode)
    assert image.mode == mode
    transparent = mode in ("LA", "PA", "RGBA", "RGBa")
    expected = over_white(image) if transparent else np.asarray(image.convert("RGB"))
    assert torch.equal(raw(image), raw(expected[None]))
    # Among others too, in any order.
    mixed = [image, *pictures(2, "RGB"), *pictures(1, "L"), *pictures(1, "RGBA")]
    assert torch.equal(raw(mixed), raw(np.stack([expected, *map(over_white, mixed[1:])])))
    assert torch.equal(raw(mixed[::-1]), raw(mixed).flip(1))


def test_a_colour_that_stands_for_transparency():
    for image in (Image.new("L", (64, 48), 7), Image.new("RGB", (64, 48), (7, 7, 7)), Image.new("P", (64, 48), 7)):
        image.info["transparency"] = (7, 7, 7) if image.mode == "RGB" else 7
        assert (raw([image, *pictures(1, "RGB")])[0, 0] == 255).all()


def test_grey_pictures_of_more_bits():
    grey = np.random.default_rng(0).integers(0, 256, (48, 64), dtype=np.uint8)
    expected = raw(np.repeat(grey[None, ..., None], 3, axis=-1))
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert wide.mode == "I;16"
    for image in (wide, Image.fromarray(grey.astype(np.int32)), Image.fromarray(grey.astype(np.float32))):
        assert torch.equal(raw([image]), expected)
        assert torch.equal(raw([image, *pictures(1, "RGB")])[:, 0], expected[:, 0])
    for values in (grey.astype(np.int32) * 257, grey / np.float32(255), grey.astype(np.float32) - 128):
        with pytest.raises(ValueError, match="not 0 to 255: convert it"):
            raw([Image.fromarray(values)])


def test_frames_of_two_sizes_are_refused():
    frames = [*pictures(9, "RGB"), *pictures(1, "RGB", height=32)]
    with pytest.raises(ValueError, match="must have one size"):
        raw(frames)


def test_only_the_frames_wanted_are_converted(monkeypatch):
    converted, convert = [], Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda image, mode: converted.append(mode) or convert(image, mode))
    raw([Image.new("L", (64, 48)) for _ in range(100)])
    assert len(converted) <= 10


def test_field_files_of_pictures(shared):
    folder = shared / "faults" / "files"
    for name, count in (("anim.gif", 20), ("pil.gif", 6)):
        frames, info = decode_video(folder / name, range)
        assert info.num_frames == count
        with Image.open(folder / name) as image:
            np.testing.assert_array_equal(decode_video(image, range)[0], frames)
            copies = [frame.copy() for frame in ImageSequence.Iterator(image)]
        assert torch.equal(raw(copies), raw(frames))
