"""Chooses the frames of a clip: one per segment of the whole video, or densely from a part of it.

Segments: the video is divided into `num_frames` equal segments, and each gives one frame (Wang et al., Temporal Segment
Networks, arXiv:1608.00859). Dense: every `stride`-th frame from some start; a video that is too short is looped, as in
mmaction2's SampleFrames by default.
"""

from dataclasses import dataclass

import numpy as np

from ...model import segment_centers


@dataclass(frozen=True)
class FrameSampling:
    """Samples the frames of a clip for training and testing.

    Attributes:
        num_frames: Frames per clip.
        stride: Step between the frames of a dense clip; None samples from segments.

    Raises:
        ValueError: If a number is less than 1.
    """

    num_frames: int
    stride: int | None = None

    def __post_init__(self):
        _at_least_one(num_frames=self.num_frames, stride=1 if self.stride is None else self.stride)

    def train(self, total: int, generator: np.random.Generator) -> np.ndarray:
        """Samples one random clip: a random frame from each segment, or a dense clip with a random start.

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
        """Samples clips that cover the video evenly; a single one is centred.

        From segments, clip c takes the centre of the c-th of `num_clips` equal parts of each segment, so that all
        clips together are the segment centres of one long clip, and a single clip is `segment_centers`. Dense clips
        have evenly spaced starts, rounded, from the first frame to the last start that fits; a single clip starts
        halfway.

        Args:
            total: Frames in the video.
            num_clips: Number of clips.

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
        """Returns the last start from which a dense clip fits into the video; 0 if none does."""
        _at_least_one(total=total)
        return max(total - 1 - (self.num_frames - 1) * self.stride, 0)


def random_in_segments(total: int, num_frames: int, generator: np.random.Generator) -> np.ndarray:
    """Draws one random frame from each of `num_frames` equal segments of a video.

    Segment k covers the time from `k * total / num_frames` to `(k + 1) * total / num_frames`, in frames.
    Frames repeat if segments are shorter than a frame.

    Args:
        total: Frames in the video.
        num_frames: Number of frames to draw.
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
    """Takes every `stride`-th frame from `start`, wrapping around at the end of the video.

    Args:
        total: Frames in the video.
        num_frames: Number of frames to take.
        stride: Step between them, in frames.
        start: First frame.

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
