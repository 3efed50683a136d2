"""Views of clips for training and testing, and mixed batches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from vidprism_hf import VidPrismVideoProcessor
from vidprism_hf.data.reading import transforms
from vidprism_hf.data.reading.transforms import BatchMixing, ClipAugmentation

OPTIONS = [
    {},
    {"horizontal_flip": False, "grayscale": 1.0},
    {"rand_augment": 9},
    {"rand_augment": 30},
    {"random_erasing": 1.0},
    {"rand_augment": 15, "random_erasing": 0.5, "grayscale": 0.5},
]


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


# --- training views


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_view_is_one_for_all_frames(options):
    clip = noise(3, 40, 56).expand(5, 3, 40, 56).contiguous()
    augmentation = ClipAugmentation((24, 16), **options)
    views = [augmentation(clip, seed) for seed in range(60)]
    for view in views:
        assert view.shape == (5, 3, 24, 16)
        assert view.dtype == torch.uint8
        assert (view == view[:1]).all()
    assert len({view.numpy().tobytes() for view in views}) > 50  # small pictures have few crops


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_view_follows_from_its_seed_and_leaves_randomness_alone(options):
    clip, augmentation = noise(3, 3, 40, 56), ClipAugmentation((24, 24), **options)
    torch.manual_seed(1)
    first = augmentation(clip, 5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(augmentation(clip, 5), first)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(augmentation(clip, 6), first)


def test_clip_itself_stays_as_it_is():
    clip = noise(2, 3, 37, 37)  # of the size that it is resized to
    before = clip.clone()
    augmentation = ClipAugmentation((32, 32), 1.0, False, 0.0, rand_augment=9, random_erasing=1.0)
    for seed in range(20):
        augmentation(clip, seed)
    assert torch.equal(clip, before)


def test_some_clips_lose_their_colour():
    augmentation = ClipAugmentation((24, 24), grayscale=0.5)
    views = [augmentation(noise(2, 3, 40, 56), seed) for seed in range(20)]
    assert {bool((view[:, :1] == view).all()) for view in views} == {True, False}


@pytest.mark.parametrize("rand_augment", [None, 9])
def test_only_a_flip_swaps_sides(rand_augment):
    clip = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    clip[..., :16] = 200
    plain, flipped = (
        ClipAugmentation((32, 32), 0.9, horizontal_flip=flip, grayscale=0.0, rand_augment=rand_augment)
        for flip in (False, True)
    )
    left = [[bool(a(clip, s)[..., :8].sum() > a(clip, s)[..., -8:].sum()) for s in range(30)] for a in (plain, flipped)]
    assert all(left[0])
    assert set(left[1]) == {True, False}


def test_rand_augment_grows_with_its_magnitude():
    clip = noise(1, 3, 8, 8).float()
    clip = functional.resize(clip, [37, 37], antialias=True).to(torch.uint8)

    def change(magnitude):
        plain = ClipAugmentation((32, 32), 1.0, False, 0.0)
        strong = ClipAugmentation((32, 32), 1.0, False, 0.0, rand_augment=magnitude)
        return np.mean([(strong(clip, s).float() - plain(clip, s).float()).abs().mean().item() for s in range(40)])

    assert change(2) < change(10) < change(30)


def test_erasing_blanks_one_rectangle_with_the_mean_colour():
    mean = (0.5, 0.25, 1.0)
    colour = torch.tensor([128, 64, 255], dtype=torch.uint8)[:, None, None]
    clip = torch.zeros(3, 3, 48, 48, dtype=torch.uint8)
    augmentation = ClipAugmentation((32, 32), grayscale=1.0, random_erasing=1.0, mean=mean)
    for seed in range(30):
        view = augmentation(clip, seed)
        erased = (view == colour).all(1)
        assert (erased == (view != 0).any(1)).all()  # nothing else changes, and not the colour of what is erased
        rows, columns = erased[0].any(1), erased[0].any(0)
        assert torch.equal(erased[0], rows[:, None] & columns)
        assert 0.01 < erased[0].float().mean() < 0.35


def test_share_of_erased_clips():
    augmentation = ClipAugmentation((16, 16), grayscale=0.0, random_erasing=0.25)
    clip = torch.zeros(1, 3, 20, 20, dtype=torch.uint8)
    erased = sum(bool(augmentation(clip, seed).any()) for seed in range(400))
    assert abs(erased - 100) < 36  # four standard deviations


@pytest.mark.parametrize("shape", [(90, 120), (120, 90), (256, 256), (18, 24), (32, 40)])
def test_clips_that_arrive_shrunk_give_the_same_view(shape):
    clip = noise(2, 3, *shape)
    # As the augmentation resizes, before it draws anything.
    shrunk = functional.resize(clip, [32], interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert min(shrunk.shape[-2:]) == 32
    augmentation = ClipAugmentation((28, 28), rand_augment=9, random_erasing=0.5)
    for seed in range(8):
        view = augmentation(clip, seed)
        assert view.shape == (2, 3, 28, 28)
        assert torch.equal(view, augmentation(shrunk, seed))


def test_view_of_a_small_clip_shows_the_same_part():
    ramp = torch.linspace(0, 255, 224)
    large = torch.stack([ramp.expand(168, 224), ramp[:168, None].expand(168, 224), torch.zeros(168, 224)])
    small = functional.resize(large, [18, 24], antialias=True)
    augmentation = ClipAugmentation((32, 32), grayscale=0.0)
    for seed in range(10):
        one, two = (augmentation(clip[None].round().to(torch.uint8), seed).float() for clip in (large, small))
        assert (one - two).abs().mean() < 4


@pytest.mark.parametrize(
    "options",
    [
        {"crop_size": (0, 32)},
        {"min_crop_scale": 0.0},
        {"min_crop_scale": 1.1},
        {"grayscale": 1.1},
        {"grayscale": -0.1},
        {"rand_augment": -1},
        {"rand_augment": 31},
        {"random_erasing": 1.1},
        {"random_erasing": -0.1},
    ],
    ids=str,
)
def test_nonsense_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
        ClipAugmentation(**({"crop_size": (32, 32)} | options))


# --- test crops


def processor(edge=32, crop=(32, 32)):
    height, width = crop
    return VidPrismVideoProcessor(
        num_frames=4, size={"shortest_edge": edge}, crop_size={"height": height, "width": width}
    )


def pixels_of(processor, frames):
    made = processor(frames, do_sample_frames=False, do_rescale=False, do_normalize=False, return_tensors="pt")
    return made["pixel_values_videos"]


@settings(max_examples=40, deadline=None)
@given(height=st.integers(8, 90), width=st.integers(8, 90), edge=st.integers(16, 40), crop=st.integers(16, 40))
def test_centre_crop_is_the_processors(height, width, edge, crop):
    frames = noise(2, height, width, 3).numpy()
    own = processor(edge, (crop, crop + 3))
    expected = pixels_of(own, frames)
    assert torch.equal(transforms.test_views(frames, own, num_crops=1), expected)
    views = transforms.test_views(frames, own, num_crops=3)
    assert views.shape == (3, 2, 3, crop, crop + 3)
    assert views.dtype == torch.uint8
    assert torch.equal(views[1], expected[0])


@pytest.mark.parametrize("upright", [False, True])
def test_three_crops_lie_along_the_longer_side(upright):
    frames = noise(3, 41, 97, 3).numpy()
    frames = frames.transpose(0, 2, 1, 3) if upright else frames
    own = processor(40, (32, 32))
    resized = functional.resize(
        torch.from_numpy(frames.copy()).permute(0, 3, 1, 2),
        [40],
        interpolation=InterpolationMode.BICUBIC,
        antialias=True,
    )
    along, across = (2, 3) if upright else (3, 2)
    parts = [resized.narrow(along, start, 32).narrow(across, 4, 32) for start in (0, (94 - 32) // 2, 94 - 32)]
    assert resized.shape[along] == 94
    assert torch.equal(transforms.test_views(frames, own, 3), torch.stack(parts))


def test_square_video_that_the_crop_fills_gives_three_equal_views():
    views = transforms.test_views(noise(2, 32, 32, 3).numpy(), processor(), 3)
    assert (views == views[:1]).all()


@pytest.mark.parametrize("num_crops", [0, 2, 5])
def test_other_numbers_of_crops_are_refused(num_crops):
    with pytest.raises(ValueError, match="1 or 3"):
        transforms.test_views(np.zeros((1, 32, 32, 3), np.uint8), processor(), num_crops)


# --- mixed batches

MIXINGS = [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}]


def clips_and_labels(batch=4, frames=3):
    pixels = torch.randn(batch, 1, 3, 10, 14, generator=torch.Generator().manual_seed(0))
    return pixels.expand(batch, frames, 3, 10, 14).contiguous(), torch.arange(batch) * 2 % 5


def neighbours(pixels):
    """What each clip is mixed with."""
    return pixels.roll(1, 0)


@pytest.mark.parametrize("alphas", MIXINGS, ids=str)
def test_mixing_is_convex_and_one_for_all_frames(alphas):
    pixels, labels = clips_and_labels()
    before = pixels.clone()
    hard = one_hot(labels, 5).float()
    for seed in range(40):
        mixed, soft = BatchMixing(5, **alphas)(pixels, labels, seed)
        assert type(mixed) is torch.Tensor
        assert mixed.shape == pixels.shape
        assert mixed.dtype == soft.dtype == torch.float32
        assert torch.allclose(soft.sum(1), torch.ones(4))
        assert (soft >= 0).all()
        assert (mixed == mixed[:, :1]).all()
        other = neighbours(pixels)
        assert (mixed <= torch.maximum(pixels, other) + 1e-6).all()
        assert (mixed >= torch.minimum(pixels, other) - 1e-6).all()
        # All labels differ, so a clip's share shows in its label: the pixels are mixed by it.
        share = (soft * hard).sum(1)
        assert torch.allclose(share, share[:1].expand(4))
        assert torch.allclose(soft, share[:, None] * hard + (1 - share[:, None]) * hard.roll(1, 0), atol=1e-6)
        share = share[0].item()
        added = torch.allclose(mixed, share * pixels + (1 - share) * other, atol=1e-5)
        kept, taken = mixed == pixels, mixed == other
        pasted = bool((kept | taken).all()) and abs(kept.float().mean().item() - share) < 1e-6
        assert added if alphas.keys() == {"mixup_alpha"} else pasted or (added and "mixup_alpha" in alphas)
    assert torch.equal(pixels, before)


def test_both_kinds_of_mixing_come_up():
    pixels, labels = clips_and_labels()
    pasted = []
    for seed in range(200):
        mixed, _ = BatchMixing(5, 0.8, 1.0)(pixels, labels, seed)
        pasted.append(bool(((mixed == pixels) | (mixed == neighbours(pixels))).all()))
    assert 70 < sum(pasted) < 130  # four standard deviations


@pytest.mark.parametrize("alphas", MIXINGS, ids=str)
def test_mixing_follows_from_its_seed_and_leaves_randomness_alone(alphas):
    mixing = BatchMixing(5, **alphas)
    torch.manual_seed(1)
    first = mixing(*clips_and_labels(), 5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = mixing(*clips_and_labels(), 5)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert len({mixing(*clips_and_labels(), seed)[1].numpy().tobytes() for seed in range(10)}) > 5


@pytest.mark.parametrize(("alphas", "batch"), [({}, 4), *((alphas, 1) for alphas in MIXINGS)], ids=str)
def test_nothing_to_mix_leaves_clips_as_they_are(alphas, batch):
    pixels, labels = clips_and_labels(batch)
    mixed, soft = BatchMixing(5, **alphas)(pixels, labels, 0)
    assert mixed is pixels
    assert torch.equal(soft, one_hot(labels, 5).float())
    assert soft.dtype == torch.float32


@pytest.mark.parametrize("alphas", [{}, *MIXINGS], ids=str)
def test_mixing_never_looks_at_the_values(alphas):
    # Tensors of the meta device have none: what waits for a device's values fails on them.
    pixels = torch.empty(4, 2, 3, 8, 8, device="meta")
    for seed in range(8):
        mixed, soft = BatchMixing(5, **alphas)(pixels, torch.empty(4, dtype=torch.int64, device="meta"), seed)
        assert mixed.shape == pixels.shape
        assert soft.shape == (4, 5)
        assert mixed.device.type == soft.device.type == "meta"


@pytest.mark.parametrize("alphas", [{"mixup_alpha": -0.1}, {"cutmix_alpha": -1.0}], ids=str)
def test_negative_parameters_are_refused(alphas):
    with pytest.raises(ValueError, match="negative"):
        BatchMixing(5, **alphas)
