"""Frames, views, examples and their order over processes."""

from unittest import mock

import pytest
import torch
from clips import greys, index_of, render
from hypothesis import given, settings
from hypothesis import strategies as st

from vidprism_hf.data import (
    ClipAugmentation,
    ClipDataset,
    ClipReader,
    ClipSampler,
    FileTable,
    load_processor,
)
from vidprism_hf.data.loading.dataset import collate, example


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


# --- examples


def test_training_example(table, processor, augmentation):
    item = ClipDataset(table, ClipReader(processor, augmentation))[(0, 0)]
    assert item["pixel_values_videos"].shape == (4, 3, 32, 32)
    assert item["pixel_values_videos"].dtype == torch.uint8
    assert (item["labels"], item["clip_index"]) == (2, 0)


def test_training_example_follows_from_seed_epoch_and_index(table, processor, augmentation):
    def pixels(key, seed=0):
        return ClipDataset(table, ClipReader(processor, augmentation, seed=seed))[key]["pixel_values_videos"]

    torch.manual_seed(3)
    first = pixels((1, 0))
    torch.manual_seed(4)
    assert torch.equal(first, pixels((1, 0)))
    assert torch.equal(pixels((0, 0)), pixels(0))
    for other in (pixels((2, 0)), pixels((1, 1)), pixels((1, 0), seed=1)):
        assert not torch.equal(first, other)


def test_training_frames_come_one_from_each_segment(table, processor, augmentation):
    for epoch in range(5):
        clip = ClipDataset(table, ClipReader(processor, augmentation))[(epoch, 0)]["pixel_values_videos"]
        indices = [index_of(frame.numpy()) for frame in clip]
        assert [index // 5 for index in indices] == [0, 1, 2, 3]


def test_evaluation_example_is_what_the_processor_makes_of_the_file(table, processor):
    dataset = ClipDataset(table, ClipReader(processor))
    for index in range(len(dataset)):
        served = processor(table.video(index), do_rescale=False, do_normalize=False, return_tensors="pt")
        pixels = dataset[index]["pixel_values_videos"]
        assert pixels.dtype == torch.uint8
        assert torch.equal(pixels, served["pixel_values_videos"][0])
        assert torch.equal(pixels, dataset[(7, index)]["pixel_values_videos"])


def test_a_clip_that_fills_up_a_batch_does_not_count(table, processor, augmentation):
    dataset = ClipDataset(table, ClipReader(processor, augmentation))
    first, again = collate([dataset[(1, 0)]]), collate([dataset[(1, 0, False)]])
    assert torch.equal(first["pixel_values_videos"], again["pixel_values_videos"])
    assert (first["num_counted"], again["num_counted"]) == (1, 0)
    lost = example(dataset.reader, None, 0, 0, [("0.mp4", 2, "is empty")], counts=False)
    assert collate([lost])["num_unreadable"] == 0


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
@given(**sizes, seed=st.integers(0, 99), batch_size=st.integers(1, 5))
def test_training_takes_every_clip_once_and_gives_all_processes_as_many_batches(
    num_clips, world, epoch, seed, batch_size
):
    sampler = ClipSampler(num_clips, training=True, seed=seed, batch_size=batch_size)
    sampler.set_epoch(epoch)
    shares = [keys(sampler, rank, world) for rank in range(world)]
    batches = [[share[at : at + batch_size] for at in range(0, len(share), batch_size)] for share in shares]
    alone = keys(sampler, 0, 1)
    assert sorted(alone) == [(epoch, index) for index in range(num_clips)]
    for step, together in enumerate(zip(*batches, strict=True)):
        # Step by step the processes take together what one process would take alone, and what does not count.
        counted = [key for batch in together for key in batch if len(key) == 2]
        size = batch_size * world
        assert sorted(counted) == sorted(alone[step * size : (step + 1) * size])
        assert all(len(batch) == 1 for batch in together for key in batch if len(key) == 3)
    if num_clips >= world:
        assert all((*share[0], False) == key for share in shares for key in share if len(key) == 3)


@settings(deadline=None)
@given(num_clips=sizes["num_clips"], epoch=sizes["epoch"], had=st.integers(0, 50))
def test_an_epoch_that_was_begun_goes_on(num_clips, epoch, had):
    whole, resumed = (ClipSampler(num_clips, training=True) for _ in range(2))
    whole.set_epoch(epoch)
    resumed.begin(epoch, had)
    assert len(resumed) == len(whole)
    assert list(resumed) == list(whole)[had:]
    for sampler in (whole, resumed):
        sampler.set_epoch(epoch + 1)
    assert list(resumed) == list(whole)


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
