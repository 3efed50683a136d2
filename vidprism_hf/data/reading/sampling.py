"""Which frames of a video make a clip: from segments of the whole video, or densely from a stretch of it.

Segments: the video is cut into as many equal segments as frames are wanted, and each gives one (Wang et al.,
Temporal Segment Networks, arXiv:1608.00859). Dense: every `stride`-th frame from some start on; where a video is
too short for that, it is played in a loop, as mmaction2's SampleFrames does by default.
"""

from dataclasses import dataclass

import numpy as np

from ...model import segment_centers


@dataclass(frozen=True)
class FrameSampling:
    """How frames are chosen in training and in testing.

    Attributes:
        num_frames: Frames of a clip.
        stride: Step between the frames of a dense clip; None samples from segments.

    Raises:
        ValueError: If a number is less than 1.
    """

    num_frames: int
    stride: int | None = None

    def __post_init__(self):
        _at_least_one(num_frames=self.num_frames, stride=1 if self.stride is None else self.stride)

    def train(self, total: int, generator: np.random.Generator) -> np.ndarray:
        """One random clip: a frame from each segment, or a stretch with a random start.

        Args:
            total: Frames in the video.
            generator: Source of randomness.

        Returns:
            Indices, (num_frames,), int64.

        Raises:
            ValueError: If the video has no frames.
        """
        if self.stride is None:
            return random_in_segments(total, self.num_frames, generator)
        start = int(generator.integers(self._last_start(total) + 1))
        return dense_indices(total, self.num_frames, self.stride, start)

    def test(self, total: int, num_clips: int = 1) -> np.ndarray:
        """Clips that cover the video evenly; a single one is centred.

        From segments, clip c takes the centre of the c-th of `num_clips` equal parts of each segment: together
        the clips are the segment centres of one clip with as many frames, and a single clip is `segment_centers`.
        Dense clips start evenly from the video's first frame to the last start that fits, rounded; a single clip
        starts halfway.

        Args:
            total: Frames in the video.
            num_clips: Clips wanted.

        Returns:
            Indices, (num_clips, num_frames), int64.

        Raises:
            ValueError: If either number is less than 1.
        """
        _at_least_one(total=total, num_clips=num_clips)
        if self.stride is None:
            return segment_centers(total, self.num_frames * num_clips).reshape(self.num_frames, num_clips).T
        last, gaps = self._last_start(total), num_clips - 1
        starts = [(2 * clip * last + gaps) // (2 * gaps) for clip in range(num_clips)] if gaps else [last // 2]
        return np.stack([dense_indices(total, self.num_frames, self.stride, start) for start in starts])

    def _last_start(self, total: int) -> int:
        """The last start from which a dense clip ends within the video; 0 where there is none."""
        _at_least_one(total=total)
        return max(total - 1 - (self.num_frames - 1) * self.stride, 0)


def random_in_segments(total: int, num_frames: int, generator: np.random.Generator) -> np.ndarray:
    """One random frame from each of `num_frames` equal segments of a video.

    Segment k covers the time from `k * total / num_frames` to `(k + 1) * total / num_frames`, in frames;
    where segments are shorter than a frame, frames repeat.

    Args:
        total: Frames in the video.
        num_frames: Frames wanted.
        generator: Source of randomness.

    Returns:
        Indices in non-decreasing order, (num_frames,), int64.

    Raises:
        ValueError: If either number is less than 1.
    """
    _at_least_one(total=total, num_frames=num_frames)
    position = np.arange(num_frames) + generator.random(num_frames)
    # Rounding may carry a position to the segment's end.
    last = (np.arange(1, num_frames + 1) * total - 1) // num_frames
    return np.minimum((position * total / num_frames).astype(np.int64), last)


def dense_indices(total: int, num_frames: int, stride: int, start: int) -> np.ndarray:
    """Every `stride`-th frame from `start` on, going on at the video's beginning after its end.

    Args:
        total: Frames in the video.
        num_frames: Frames wanted.
        stride: Step between them, in frames.
        start: The first of them.

    Returns:
        Indices, (num_frames,), int64.

    Raises:
        ValueError: If a count or the stride is less than 1, or the start lies outside the video.
    """
    _at_least_one(total=total, num_frames=num_frames, stride=stride)
    if not 0 <= start < total:
        raise ValueError(f"start must lie in a video of {total} frames, got {start}")
    return (start + stride * np.arange(num_frames, dtype=np.int64)) % total


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
