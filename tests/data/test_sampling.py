"""Which frames of a video are taken, in training and in testing."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidprism_hf.data.reading.sampling import FrameSampling, dense_indices, random_in_segments
from vidprism_hf.model import segment_centers

TOTALS = st.integers(1, 5000) | st.integers(1, 40)  # many videos shorter than a clip
COUNTS = st.integers(1, 64)
STRIDES = st.integers(1, 16)
CLIPS = st.integers(1, 12)
SEEDS = st.integers(0, 2**32)


def check_indices(indices, shape, total):
    assert indices.shape == shape
    assert indices.dtype == np.int64
    assert indices.min() >= 0
    assert indices.max() < total


def check_segments(indices, total, num_frames):
    """Frame k comes from segment k: the time from i to i + 1 that frame i covers overlaps it."""
    k = np.arange(num_frames)
    assert (indices * num_frames < (k + 1) * total).all()
    assert ((indices + 1) * num_frames > k * total).all()
    assert (np.diff(indices) >= 0).all()


# --- segments


@given(total=TOTALS, num_frames=COUNTS, seed=SEEDS)
def test_one_frame_from_each_segment(total, num_frames, seed):
    indices = FrameSampling(num_frames).train(total, np.random.default_rng(seed))
    check_indices(indices, (num_frames,), total)
    check_segments(indices, total, num_frames)
    assert np.array_equal(indices, random_in_segments(total, num_frames, np.random.default_rng(seed)))


def test_every_frame_of_a_segment_is_drawn_alike():
    generator = np.random.default_rng(0)
    drawn = np.stack([random_in_segments(12, 3, generator) for _ in range(4000)])
    for segment, indices in enumerate(drawn.T):
        counts = np.bincount(indices - 4 * segment, minlength=4)
        assert len(counts) == 4
        assert np.abs(counts - 1000).max() < 120  # four standard deviations


@given(total=TOTALS, num_frames=COUNTS)
def test_a_single_clip_is_the_segment_centers(total, num_frames):
    assert np.array_equal(FrameSampling(num_frames).test(total), segment_centers(total, num_frames)[None])


@given(total=TOTALS, num_frames=COUNTS, num_clips=CLIPS)
def test_clips_share_out_each_segment(total, num_frames, num_clips):
    clips = FrameSampling(num_frames).test(total, num_clips)
    check_indices(clips, (num_clips, num_frames), total)
    for number, indices in enumerate(clips):
        check_segments(indices, total, num_frames)
        exact = [
            int((frame + Fraction(2 * number + 1, 2 * num_clips)) * total / num_frames) for frame in range(num_frames)
        ]
        assert indices.tolist() == exact


@given(total=TOTALS, num_frames=COUNTS, num_clips=CLIPS)
def test_segment_clips_are_the_same_backwards(total, num_frames, num_clips):
    clips = FrameSampling(num_frames).test(total, num_clips)
    mirrored = total - 1 - clips[::-1, ::-1]
    # A place between two frames takes the later one, and so does its mirror image.
    parts = num_frames * num_clips
    between = ((2 * np.arange(parts) + 1) * total % (2 * parts) == 0).reshape(num_frames, num_clips).T
    assert np.array_equal(clips - mirrored, between)


def test_long_videos_are_counted_exactly():
    total = 3**30  # no float32, and no multiple of the counts
    clips = FrameSampling(32).test(total, 10)
    assert clips[9, 31] == (2 * 319 + 1) * total // 640
    check_indices(FrameSampling(32, stride=10**7).test(total, 3), (3, 32), total)


# --- dense


@given(total=TOTALS, num_frames=COUNTS, stride=STRIDES, seed=SEEDS)
def test_random_stretch(total, num_frames, stride, seed):
    indices = FrameSampling(num_frames, stride).train(total, np.random.default_rng(seed))
    check_indices(indices, (num_frames,), total)
    span = (num_frames - 1) * stride + 1
    if span <= total:
        assert (np.diff(indices) == stride).all()
    else:  # from the start, in a loop
        assert indices.tolist() == [stride * frame % total for frame in range(num_frames)]


def test_every_start_that_fits_is_drawn_alike():
    generator = np.random.default_rng(0)
    starts = [FrameSampling(3, stride=4).train(13, generator)[0] for _ in range(5000)]
    counts = np.bincount(starts)
    assert len(counts) == 5  # frames 4, 8 and 12 are the last that fit
    assert np.abs(counts - 1000).max() < 120


@given(total=TOTALS, num_frames=COUNTS, stride=STRIDES, num_clips=CLIPS)
def test_dense_clips_cover_the_video(total, num_frames, stride, num_clips):
    clips = FrameSampling(num_frames, stride).test(total, num_clips)
    check_indices(clips, (num_clips, num_frames), total)
    last = max(total - (num_frames - 1) * stride - 1, 0)
    if num_clips == 1:
        exact = [last // 2]
    else:
        exact = [int(Fraction(number * last, num_clips - 1) + Fraction(1, 2)) for number in range(num_clips)]
        assert exact[0] == 0
        assert exact[-1] == last
    assert clips[:, 0].tolist() == exact
    assert np.array_equal(clips, [dense_indices(total, num_frames, stride, start) for start in exact])
    # The same backwards, but for starts halfway between two frames, which are rounded up.
    assert set((clips[:, 0] - (last - clips[::-1, 0])).tolist()) <= ({0, 1} if num_clips > 1 else {0, -1})


def test_a_video_that_is_too_short_loops():
    assert dense_indices(5, 4, 2, 0).tolist() == [0, 2, 4, 1]
    assert dense_indices(5, 3, 1, 4).tolist() == [4, 0, 1]
    assert FrameSampling(4, stride=2).test(5, 2).tolist() == [[0, 2, 4, 1]] * 2
    assert FrameSampling(4, stride=2).test(7, 2).tolist() == [[0, 2, 4, 6]] * 2  # just fits
    assert FrameSampling(4, stride=2).test(9, 3).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7], [2, 4, 6, 8]]


# --- both


@pytest.mark.parametrize("stride", [None, 3])
def test_training_follows_from_the_generator(stride):
    sampling = FrameSampling(8, stride)
    once, again, other = (sampling.train(500, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


@pytest.mark.parametrize("stride", [None, 3])
def test_counts_below_one_are_refused(stride):
    sampling = FrameSampling(4, stride)
    for call in (
        lambda: sampling.train(0, np.random.default_rng(0)),
        lambda: sampling.test(0),
        lambda: sampling.test(10, num_clips=0),
        lambda: FrameSampling(0, stride),
    ):
        with pytest.raises(ValueError, match="at least 1"):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 1, 0), "total"),
        ((9, 0, 1, 0), "num_frames"),
        ((9, 4, 0, 0), "stride"),
        ((9, 4, 1, 9), "start"),
        ((9, 4, 1, -1), "start"),
    ],
)
def test_dense_indices_refuse_what_leaves_the_video(arguments, message):
    with pytest.raises(ValueError, match=message):
        dense_indices(*arguments)


def test_a_stride_below_one_is_refused():
    with pytest.raises(ValueError, match="stride"):
        FrameSampling(4, stride=0)
