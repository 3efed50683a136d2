"""Frames, views, examples and their order over processes."""

from unittest import mock

import numpy as np
import pytest
import torch
from clips import greys, index_of, render
from hypothesis import given, settings
from hypothesis import strategies as st

from vidprism_hf.data import (
    ClipAugmentation,
    ClipDataset,
    ClipSampler,
    FileTable,
    load_processor,
    random_in_segments,
)
from vidprism_hf.model import VideoDecodeError


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    names = [f"{index}.mp4" for index in range(3)]
    for index, name in enumerate(names):
        render(root / name, greys(20 + index))
    return FileTable.from_lists(root, names, [2, 0, 1])


@pytest.fixture(scope="module")
def processor():
    return load_processor("tiny", num_frames=4)


@pytest.fixture(scope="module")
def augmentation(processor):
    return ClipAugmentation((processor.crop_size["height"], processor.crop_size["width"]))


# --- frames


@given(total=st.integers(1, 5000), num_frames=st.integers(1, 64), seed=st.integers(0, 2**32))
def test_one_frame_from_each_segment(total, num_frames, seed):
    indices = random_in_segments(total, num_frames, np.random.default_rng(seed))
    assert indices.shape == (num_frames,)
    assert indices.dtype == np.int64
    k = np.arange(num_frames)
    # Frame i covers the time from i to i + 1: it must overlap segment k.
    assert (indices * num_frames < (k + 1) * total).all()
    assert ((indices + 1) * num_frames > k * total).all()
    assert (np.diff(indices) >= 0).all()
    assert indices[0] >= 0
    assert indices[-1] < total


def test_every_frame_of_a_segment_is_drawn_alike():
    generator = np.random.default_rng(0)
    drawn = np.stack([random_in_segments(12, 3, generator) for _ in range(4000)])
    for segment, indices in enumerate(drawn.T):
        counts = np.bincount(indices - 4 * segment, minlength=4)
        assert len(counts) == 4
        assert np.abs(counts - 1000).max() < 120  # four standard deviations


@pytest.mark.parametrize(("total", "num_frames"), [(0, 4), (4, 0)])
def test_segments_need_frames(total, num_frames):
    with pytest.raises(ValueError, match="at least 1"):
        random_in_segments(total, num_frames, np.random.default_rng(0))


# --- views


def test_view_is_one_for_all_frames():
    frame = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    clip = frame.expand(6, 3, 40, 56).contiguous()
    augmentation = ClipAugmentation((24, 16), grayscale=0.5)
    views = [augmentation(clip, seed) for seed in range(12)]
    for view in views:
        assert view.shape == (6, 3, 24, 16)
        assert view.dtype == torch.uint8
        assert (view == view[:1]).all()
    assert len({view.numpy().tobytes() for view in views}) == 12
    assert {bool((view[:, :1] == view).all()) for view in views} == {True, False}  # some are grey


def test_whole_picture_without_flip_keeps_sides():
    clip = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    clip[..., :16] = 255
    plain = ClipAugmentation((32, 32), min_crop_scale=0.9, horizontal_flip=False, grayscale=0.0)
    flipped = ClipAugmentation((32, 32), min_crop_scale=0.9, horizontal_flip=True, grayscale=0.0)
    left = [[bool(a(clip, seed)[..., 2].float().mean() > 128) for seed in range(20)] for a in (plain, flipped)]
    assert all(left[0])
    assert set(left[1]) == {True, False}


def test_randomness_of_the_process_is_left_alone(augmentation):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    augmentation(torch.zeros(2, 3, 40, 40, dtype=torch.uint8), 5)
    assert torch.equal(before, torch.get_rng_state())


# --- examples


def test_training_example(table, processor, augmentation):
    item = ClipDataset(table, processor, augmentation)[(0, 0)]
    assert item["pixel_values_videos"].shape == (4, 3, 32, 32)
    assert item["pixel_values_videos"].dtype == torch.uint8
    assert (item["labels"], item["clip_index"]) == (2, 0)


def test_training_example_follows_from_seed_epoch_and_index(table, processor, augmentation):
    def pixels(key, seed=0):
        return ClipDataset(table, processor, augmentation, seed)[key]["pixel_values_videos"]

    torch.manual_seed(3)
    first = pixels((1, 0))
    torch.manual_seed(4)
    assert torch.equal(first, pixels((1, 0)))
    assert torch.equal(pixels((0, 0)), pixels(0))
    for other in (pixels((2, 0)), pixels((1, 1)), pixels((1, 0), seed=1)):
        assert not torch.equal(first, other)


def test_training_frames_come_one_from_each_segment(table, processor, augmentation):
    for epoch in range(5):
        clip = ClipDataset(table, processor, augmentation)[(epoch, 0)]["pixel_values_videos"]
        indices = [index_of(frame.numpy()) for frame in clip]
        assert [index // 5 for index in indices] == [0, 1, 2, 3]


def test_evaluation_example_is_what_the_processor_makes_of_the_file(table, processor):
    dataset = ClipDataset(table, processor)
    for index in range(len(dataset)):
        served = processor(table.video(index), do_rescale=False, do_normalize=False, return_tensors="pt")
        pixels = dataset[index]["pixel_values_videos"]
        assert pixels.dtype == torch.uint8
        assert torch.equal(pixels, served["pixel_values_videos"][0])
        assert torch.equal(pixels, dataset[(7, index)]["pixel_values_videos"])


@pytest.mark.parametrize("training", [True, False])
def test_a_bad_clip_is_named(tmp_path, processor, augmentation, training):
    (tmp_path / "bad.mp4").write_text("not a video")
    dataset = ClipDataset(
        FileTable.from_lists(tmp_path, ["bad.mp4"], [0]), processor, augmentation if training else None
    )
    with pytest.raises(VideoDecodeError, match=r"bad\.mp4"):
        dataset[0]


# --- order


def keys(sampler, rank, world):
    with (
        mock.patch("torch.distributed.is_initialized", return_value=True),
        mock.patch("torch.distributed.get_rank", return_value=rank),
        mock.patch("torch.distributed.get_world_size", return_value=world),
    ):
        drawn = list(sampler)
        assert len(sampler) == len(drawn)
    return drawn


sizes = {"num_clips": st.integers(1, 50), "world": st.integers(1, 8), "epoch": st.integers(0, 9)}


@settings(deadline=None)
@given(**sizes)
def test_evaluation_takes_every_clip_once(num_clips, world, epoch):
    sampler = ClipSampler(num_clips, training=False)
    sampler.set_epoch(epoch)
    drawn = [index for rank in range(world) for _, index in keys(sampler, rank, world)]
    assert sorted(drawn) == list(range(num_clips))


@settings(deadline=None)
@given(**sizes, seed=st.integers(0, 99))
def test_training_takes_every_clip_and_gives_all_processes_as_many(num_clips, world, epoch, seed):
    sampler = ClipSampler(num_clips, training=True, seed=seed)
    sampler.set_epoch(epoch)
    shares = [keys(sampler, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-num_clips // world)}
    assert {key[0] for share in shares for key in share} == {epoch}
    counts = np.bincount([index for share in shares for _, index in share], minlength=num_clips)
    assert counts.min() >= 1
    if num_clips >= world:
        assert counts.max() <= 2
    # Step by step the processes take together what one process would take alone.
    together = [key for step in zip(*shares, strict=True) for key in step]
    assert together[:num_clips] == keys(sampler, 0, 1)


def test_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        sampler = ClipSampler(20, training=True, seed=seed)
        sampler.set_epoch(epoch)
        return [index for _, index in sampler]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    torch.manual_seed(0)
    before = order(0, 1)
    torch.manual_seed(1)
    assert before == order(0, 1)
