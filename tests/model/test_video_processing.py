"""The video processor: every kind of input, PIL's pixels, and its way to disk and to the Hub."""

import io
import json
import subprocess
import sys

import clips
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vidprism_hf.model.video_decoding_vidprism import VideoDecodeError, decode_video, segment_centers
from vidprism_hf.model.video_processing_vidprism import VidPrismVideoProcessor

KEY = "pixel_values_videos"


def small(num_frames=4, **kwargs):
    return VidPrismVideoProcessor(num_frames=num_frames, size=32, crop_size=32, **kwargs)


def raw(processor, videos, **kwargs):
    """The pixels before rescaling and normalising, as `pipeline` asks for them otherwise."""
    out = processor(videos, do_rescale=False, do_normalize=False, return_tensors="pt", **kwargs)
    return out[KEY]


def textured(count, height, width, seed=0):
    """Frames (count, height, width, 3) with coarse and fine structure and hard edges."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    fine = rng.integers(-40, 40, (count, height, width, 3))
    blocks = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    return np.clip(blocks.astype(int) + fine, 0, 255).astype(np.uint8)


@pytest.fixture
def clip(tmp_path):
    return clips.b_frames(tmp_path / "clip.mp4", count=30)


def indices_of(pixels):
    """Which frames of a grey clip lie in pixels (1, T, 3, H, W)."""
    return [clips.index_of(frame.float().numpy()) for frame in pixels[0]]


# --- pixels


@pytest.mark.parametrize(("height", "width"), [(144, 180), (240, 320), (480, 271), (225, 223), (100, 300)])
def test_pixels_are_those_of_pil(height, width):
    frames = textured(2, height, width)
    out = raw(VidPrismVideoProcessor(num_frames=2), frames)[0]
    assert out.dtype == torch.uint8
    assert out.shape == (2, 3, 224, 224)
    assert out.is_contiguous()
    scale = 224 / min(height, width)
    new = (224, int(height * scale)) if width < height else (int(width * scale), 224)
    left, top = (new[0] - 224) // 2, (new[1] - 224) // 2
    for frame, pixels in zip(frames, out, strict=True):
        image = Image.fromarray(frame).resize(new, Image.Resampling.BICUBIC)
        expected = np.asarray(image.crop((left, top, left + 224, top + 224))).astype(int)
        assert np.abs(pixels.permute(1, 2, 0).numpy() - expected).max() <= 2


def test_raw_pixels_normalise_to_the_full_output(clip):
    processor = small()
    full = processor(clip, return_tensors="pt")[KEY]
    mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
    torch.testing.assert_close(full, (raw(processor, clip).float() / 255 - mean) / std)
    assert full.dtype == torch.float32
    assert full.is_contiguous()


def test_defaults_are_those_of_clip(clip):
    processor = VidPrismVideoProcessor()
    assert tuple(processor.image_mean) == tuple(OPENAI_CLIP_MEAN)
    assert tuple(processor.image_std) == tuple(OPENAI_CLIP_STD)
    assert processor(clip, return_tensors="pt")[KEY].shape == (1, 32, 3, 224, 224)


def test_size_mean_and_std_can_be_chosen():
    video = torch.full((3, 3, 40, 60), 51, dtype=torch.uint8)
    processor = small(3, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 1.0, 0.1])
    out = processor(video, return_tensors="pt")[KEY]
    assert out.shape == (1, 3, 3, 32, 32)
    torch.testing.assert_close(out[0, 0, :, 0, 0], torch.tensor([0.2, 0.0, -1.0]), atol=1e-6, rtol=0)
    assert raw(processor, video, size={"shortest_edge": 64}, crop_size=48).shape == (1, 3, 3, 48, 48)


# --- which frames


def test_frames_are_the_segment_centres(clip):
    for count in (1, 4, 7, 30):
        assert indices_of(raw(small(count), clip)) == segment_centers(30, count).tolist()
    # The call decides over the processor: this is how the pipeline asks.
    assert indices_of(raw(small(4), str(clip), num_frames=3, do_sample_frames=True)) == [5, 15, 25]


def test_short_clips_repeat_frames(tmp_path):
    path = clips.render(tmp_path / "short.mp4", clips.greys(3))
    assert indices_of(raw(small(6), path)) == [0, 0, 1, 1, 2, 2]
    assert indices_of(raw(small(6), np.stack(clips.greys(3)))) == [0, 0, 1, 1, 2, 2]


def test_arrays_and_frame_lists_are_sampled_too():
    frames = clips.greys(30)
    video = np.stack(frames)
    images = [Image.fromarray(frame) for frame in frames]
    for source in (
        video,
        torch.from_numpy(video),
        torch.from_numpy(video).permute(0, 3, 1, 2),
        frames,
        images,
    ):
        assert indices_of(raw(small(3), source)) == [5, 15, 25]


def test_without_sampling_all_frames_stay(clip):
    for source in (clip, np.stack(clips.greys(30))):
        assert indices_of(raw(small(4), source, do_sample_frames=False)) == list(range(30))


def test_sampling_by_rate_is_refused(clip):
    with pytest.raises(ValueError, match="not `fps`"):
        small()(clip, fps=2.0)


# --- kinds of input


def test_files_of_any_kind_give_the_same_pixels(clip):
    processor, data = small(), clip.read_bytes()
    expected = raw(processor, np.stack(list(decode_video(clip, range)[0])))
    with open(clip, "rb") as file:
        for source in (str(clip), clip, data, io.BytesIO(data), file):
            assert torch.equal(raw(processor, source), expected)
            assert torch.equal(raw(processor, [source]), expected)


def test_a_batch_may_mix_kinds(clip):
    processor = small()
    video = textured(9, 40, 60)
    channels_first = torch.from_numpy(textured(5, 60, 40, seed=1)).permute(0, 3, 1, 2)
    images = [Image.fromarray(frame) for frame in video]
    batch = [clip, video, clip.read_bytes(), channels_first, images, str(clip)]
    out = raw(processor, batch)
    assert out.shape == (6, 4, 3, 32, 32)
    for row, source in zip(out, batch, strict=True):
        assert torch.equal(row[None], raw(processor, source))
    assert torch.equal(raw(processor, np.stack([video, video[::-1]]))[1:], raw(processor, video[::-1]))
    assert torch.equal(raw(processor, [[clip], [video]]), out[:2])


def test_layouts_of_channels(clip):
    processor, video = small(), textured(4, 40, 60)
    expected = raw(processor, video)
    assert torch.equal(raw(processor, video.transpose(0, 3, 1, 2)), expected)
    assert torch.equal(raw(processor, video, input_data_format="channels_last"), expected)
    # Three rows or columns of pixels leave it open: arrays have channels last, tensors first.
    assert raw(processor, video[:, :3, :, :]).shape == expected.shape
    narrow = video[:, :, :3, :]
    first = torch.from_numpy(narrow).permute(0, 3, 1, 2)
    assert torch.equal(raw(processor, narrow), raw(processor, first))


def test_grey_and_transparent_videos():
    processor, video = small(), textured(4, 40, 60)
    grey = video[..., :1]
    expected = raw(processor, grey.repeat(3, axis=-1))
    images = [Image.fromarray(frame[..., 0]) for frame in grey]
    for source in (grey, grey.transpose(0, 3, 1, 2), images, list(grey[..., 0])):
        assert torch.equal(raw(processor, source), expected)

    alpha = np.full((4, 40, 60, 1), 255, np.uint8)
    alpha[:, :, 30:] = 0
    transparent = np.concatenate([video, alpha], axis=-1)
    over_white = video.copy()
    over_white[:, :, 30:] = 255
    expected = raw(processor, over_white)
    for source in (transparent, [Image.fromarray(frame) for frame in transparent]):
        out = raw(processor, source)
        assert out.dtype == torch.uint8
        assert torch.equal(out, expected)
    palette = [Image.fromarray(frame).convert("P") for frame in video]
    assert torch.equal(raw(processor, palette), raw(processor, [image.convert("RGB") for image in palette]))


def test_floating_values_have_the_range_of_pixels():
    processor, video = small(), textured(4, 32, 32)
    expected = processor(video, return_tensors="pt")[KEY]
    as_float = video.astype(np.float32)
    torch.testing.assert_close(processor(as_float, return_tensors="pt")[KEY], expected)
    unit = processor(as_float / 255, do_rescale=False, return_tensors="pt")[KEY]
    torch.testing.assert_close(unit, expected)
    with pytest.raises(ValueError, match="do_rescale=False"):
        processor(as_float / 255)


def test_the_input_is_left_alone():
    video = torch.from_numpy(textured(4, 32, 32)).permute(0, 3, 1, 2).contiguous()
    before = video.clone()
    out = raw(small(), video)
    out.zero_()
    small()(video, return_tensors="pt")
    small()(video.float(), return_tensors="pt")
    assert torch.equal(video, before)


def test_metadata(clip):
    out = small(3)([clip, np.stack(clips.greys(9))], return_metadata=True)
    file, array = out["video_metadata"]
    assert (file.total_num_frames, file.fps, file.duration) == (30, 25.0, 1.2)
    assert (file.height, file.width, file.frames_indices) == (48, 64, [5, 15, 25])
    assert (array.total_num_frames, array.frames_indices) == (9, [1, 4, 7])
    given = {"total_num_frames": 900, "fps": 30.0}
    out = small(3)(np.stack(clips.greys(9)), video_metadata=given, return_metadata=True)
    assert (out["video_metadata"][0].fps, out["video_metadata"][0].frames_indices) == (30.0, [1, 4, 7])


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "empty list"),
        (None, "Not a video: NoneType"),
        (3.5, "Not a video: float"),
        (np.zeros((2, 2, 2, 2, 2, 2), np.uint8), "Not a video: ndarray of shape"),
        (np.zeros((4, 20, 20, 5), np.uint8), r"\(4, 20, 20, 5\) has no channel axis"),
        (np.zeros((4, 20, 20, 3), bool), "got bool"),
        ([np.zeros((20, 20, 3), np.uint8), np.zeros((21, 20, 3), np.uint8)], "must have one shape"),
    ],
)
def test_what_is_no_video(video, message):
    with pytest.raises(ValueError, match=message):
        small()(video)


def test_a_bad_file_is_named(tmp_path, clip):
    with pytest.raises(VideoDecodeError, match=r"none\.mp4: no such file"):
        small()([clip, tmp_path / "none.mp4"])


# --- disk and Hub


def test_save_and_load(tmp_path, clip):
    processor = small(7, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7], do_normalize=False)
    processor.save_pretrained(tmp_path)
    loaded = VidPrismVideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert torch.equal(
        loaded(clip, return_tensors="pt")[KEY],
        processor(clip, return_tensors="pt")[KEY],
    )
    assert VidPrismVideoProcessor.from_pretrained(tmp_path, num_frames=2).num_frames == 2


@pytest.mark.slow
def test_the_saved_folder_works_where_the_package_is_unknown(tmp_path, clip, monkeypatch):
    monkeypatch.setattr(VidPrismVideoProcessor, "_auto_class", None)
    VidPrismVideoProcessor.register_for_auto_class()
    processor = small(3)
    processor.save_pretrained(tmp_path / "model")
    code = f"""
import sys, torch
sys.modules["vidprism_hf"] = None  # as if it were not installed
from transformers import AutoVideoProcessor
processor = AutoVideoProcessor.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
torch.save(processor({str(clip)!r}, return_tensors="pt")[{KEY!r}], "pixels.pt")
"""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    expected = processor(clip, return_tensors="pt")[KEY]
    assert torch.equal(torch.load(tmp_path / "pixels.pt"), expected)


def checkpoint(folder, config, preprocessor=None):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


OLD = {"size": 336, "crop_size": 336, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
NEW = {**OLD, "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}


@pytest.mark.parametrize(
    ("config", "preprocessor", "crop", "resize", "mean"),
    [
        ({"model_type": "clip", "vision_config": {"image_size": 336}}, OLD, 336, 336, [0.1, 0.2, 0.3]),
        ({"model_type": "clip_vision_model", "image_size": 336}, NEW, 336, 336, [0.1, 0.2, 0.3]),
        ({"model_type": "clip_vision_model", "image_size": 64}, None, 64, 64, OPENAI_CLIP_MEAN),
        # Configs leave out defaults.
        ({"model_type": "clip", "vision_config": {}}, None, 224, 224, OPENAI_CLIP_MEAN),
        # A resize size belongs to its crop: for another image size it says nothing ...
        ({"model_type": "clip_vision_model", "image_size": 64}, OLD, 64, 64, [0.1, 0.2, 0.3]),
        # ... and for the same one it may be larger.
        (
            {"model_type": "clip_vision_model", "image_size": 336},
            {**NEW, "size": 400},
            336,
            400,
            [0.1, 0.2, 0.3],
        ),
    ],
)
def test_a_processor_for_a_clip_checkpoint(tmp_path, config, preprocessor, crop, resize, mean):
    folder = checkpoint(tmp_path / "clip", config, preprocessor)
    processor = VidPrismVideoProcessor.from_vision_pretrained(folder, num_frames=6)
    assert processor.num_frames == 6
    assert (processor.crop_size["height"], processor.crop_size["width"]) == (crop, crop)
    assert processor.size["shortest_edge"] == resize
    assert list(processor.image_mean) == list(mean)
    out = raw(processor, np.zeros((2, 50, 70, 3), np.uint8))
    assert out.shape == (1, 6, 3, crop, crop)


def test_no_checkpoint(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        VidPrismVideoProcessor.from_vision_pretrained(tmp_path, num_frames=6)
