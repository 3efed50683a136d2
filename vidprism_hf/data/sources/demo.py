"""Demo videos: moving shapes whose class depends on the order of frames alone.

Classes come in pairs of opposite motions. A video of the second class of a pair is drawn like those of the first and
played backwards, so the frames of both classes have one distribution: neither a single frame nor the bag of all frames
separates them. Every frame is coded on its own with a constant quantiser, because prediction between frames would mark
the direction of time in the coding noise.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from ..tables import DataError

# The second of each pair is the first played backwards.
DEMO_PAIRS = (
    ("moving_right", "moving_left"),
    ("moving_down", "moving_up"),
    ("circling_clockwise", "circling_counterclockwise"),
    ("growing", "shrinking"),
)
DEMO_CLASSES = tuple(sorted(label for pair in DEMO_PAIRS for label in pair))
DEMO_VERSION = 1  # Part of the folder's name: raise it with any change to what is drawn or how it is coded.

HEIGHT, WIDTH = 64, 64
FRAME_RATES = (10, 12, 15, 25, 30)
GREY, FAINT = 117, 10  # of the background and its variation, in levels of 255
SHAPES = ("disc", "square", "diamond", "triangle", "ring", "cross")
_SPLIT_STREAMS = {"train": 0, "val": 1}


def demo_folder(root: str | os.PathLike, seed: int = 0, train_per_class: int = 100, val_per_class: int = 20) -> Path:
    """Returns the folder of demo videos below `root` for these settings, rendered if missing.

    Raises:
        DataError: If the clips cannot be written below `root`.
    """
    folder = Path(root) / "demo_clips" / f"v{DEMO_VERSION}-{train_per_class}train-{val_per_class}val-seed{seed}"
    if not folder.is_dir():
        render_demo(folder, seed, train_per_class, val_per_class)
    return folder


def render_demo(root: str | os.PathLike, seed: int = 0, train_per_class: int = 100, val_per_class: int = 20) -> None:
    """Renders the demo as `root/{train,val}/<class>/<nnn>.mp4`.

    Every video has a random stream of its own, named by seed, split, class and number: splits share none, and
    raising the counts changes no video that exists.

    Args:
        root: The folder to create. It must not exist.
        seed: Seed of all videos. The same seed gives the same frames.
        train_per_class: Training clips of each class.
        val_per_class: Validation clips of each class.

    Raises:
        DataError: If the folder exists or cannot be written.
    """
    root = Path(root)
    if root.exists():
        raise DataError(f"{root}: exists already; give a new folder to render the demo clips to")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        # Rendered beside and renamed: a folder with this name is complete.
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as partial:
            _render_splits(Path(partial) / root.name, seed, {"train": train_per_class, "val": val_per_class})
            _publish(Path(partial) / root.name, root)
    except (OSError, av.FFmpegError) as error:
        raise DataError(f"{root}: demo clips cannot be written ({error.strerror}); choose another data.root") from error


def _render_splits(root: Path, seed: int, clips_per_class: dict[str, int]) -> None:
    for split, count in clips_per_class.items():
        for label in DEMO_CLASSES:
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                rate = FRAME_RATES[number % len(FRAME_RATES)]
                write_clip(folder / f"{number:03d}.mp4", demo_frames(label, seed, split, number), rate)


def _publish(partial: Path, root: Path) -> None:
    try:
        partial.rename(root)
    except OSError:
        # Another process may have rendered the same videos meanwhile.
        if not root.is_dir():
            raise


def demo_frames(label: str, seed: int, split: str, number: int) -> np.ndarray:
    """Draws the frames of one demo clip, (T, H, W, 3) uint8, T from 16 to 28."""
    rng = _clip_rng(label, seed, split, number)
    pair = next(pair for pair in DEMO_PAIRS if label in pair)
    frames = np.stack(list(_draw(pair[0], rng)))
    return frames if label == pair[0] else frames[::-1]


def _clip_rng(label: str, seed: int, split: str, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, _SPLIT_STREAMS[split], DEMO_CLASSES.index(label), number])


def _draw(motion: str, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Draws a clip of the first class of a pair, frame by frame."""
    length = int(rng.integers(16, 29))
    x_T, y_T, radius_T = _path(motion, _progress(length, rng), rng)
    shape = SHAPES[rng.integers(len(SHAPES))]
    tilt = rng.uniform(0, 2 * np.pi)
    background, colour = _colours(rng)
    noise = rng.uniform(1, 5)
    grid_y, grid_x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    for x, y, radius in zip(x_T, y_T, radius_T, strict=True):
        distance = _distance(shape, (grid_x - x) / radius, (grid_y - y) / radius, tilt) * radius
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        frame = background + cover * (colour - background)
        frame = frame + noise * rng.standard_normal(frame.shape, dtype=np.float32)
        yield np.clip(frame + 0.5, 0, 255).astype(np.uint8)


def _progress(length: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the share of the motion done at each frame, from 0 to 1, (T,), at a randomly varying speed."""
    time = np.arange(length - 1) / (length - 1)
    swing, waves, phase = rng.uniform(0, 0.7), rng.uniform(0.5, 1.5), rng.uniform(0, 1)
    speed = 1 + swing * np.cos(2 * np.pi * (waves * time + phase))
    return np.concatenate([[0], np.cumsum(speed) / speed.sum()])


def _path(motion: str, progress: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Returns centre x, centre y and radius of the shape at each frame, (T,) each, in pixels.

    The motion stays within the central square, which the evaluation crop keeps.
    """
    middle_x, middle_y = WIDTH / 2, HEIGHT / 2
    start, end = rng.uniform(-22, -14), rng.uniform(14, 22)
    travel = start + (end - start) * progress
    # Along the other axis the shape drifts a little, either way.
    across = rng.uniform(-14, 14) + rng.uniform(-5, 5) * progress
    radius = np.full_like(progress, rng.uniform(7, 11))
    if motion == "moving_right":
        return middle_x + travel, middle_y + across, radius
    if motion == "moving_down":
        return middle_x + across, middle_y + travel, radius
    if motion == "circling_clockwise":  # y points down, so a growing angle turns clockwise
        angle = rng.uniform(0, 2 * np.pi) + 2 * np.pi * rng.uniform(0.6, 1.1) * progress
        orbit = rng.uniform(14, 20)
        return middle_x + orbit * np.cos(angle), middle_y + orbit * np.sin(angle), radius
    small, large = rng.uniform(4, 7), rng.uniform(17, 25)
    drift = rng.uniform(-8, 8, size=2)[:, None] + rng.uniform(-4, 4, size=2)[:, None] * progress
    return middle_x + drift[0], middle_y + drift[1], small * (large / small) ** progress


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns a grey background of faint soft blobs, (H, W, 3), and a contrasting colour for the shape, (3,).

    Grey, because a tower with random weights has to learn within minutes where the shape is: on a background
    near the mean colour of CLIP's pixels the patches that hold it stand out from the first step on.
    """
    base = GREY + rng.uniform(-FAINT, FAINT, size=3)
    while True:
        colour = rng.uniform(20, 235, size=3)
        if np.abs(base - colour).sum() > 150:
            break
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    background = np.broadcast_to(base, (HEIGHT, WIDTH, 3)).copy()
    for _ in range(3):
        centre_y, centre_x, width = rng.uniform(0, HEIGHT), rng.uniform(0, WIDTH), rng.uniform(8, 24)
        blob = np.exp(-((x - centre_x) ** 2 + (y - centre_y) ** 2) / (2 * width**2))
        background += blob[..., None] * rng.uniform(-FAINT, FAINT, size=3)
    return background.astype(np.float32), colour.astype(np.float32)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, tilt: float) -> np.ndarray:
    """Returns the signed distance to a shape of radius about 1, negative inside."""
    if shape == "disc":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75) - 0.3
    x, y = np.cos(tilt) * x - np.sin(tilt) * y, np.sin(tilt) * x + np.cos(tilt) * y
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85
    if shape == "diamond":
        return np.abs(x) / 0.7 + np.abs(y) / 1.2 - 1
    if shape == "triangle":
        return np.maximum(-y, np.sqrt(3) / 2 * np.abs(x) + y / 2) - 0.6
    thin, wide = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return np.maximum(thin - 0.35, wide - 1)


def write_clip(path: Path, frames: np.ndarray, rate: int) -> None:
    """Codes frames (T, H, W, 3) uint8 as an mp4 file, `rate` in frames per second.

    Frames played backwards are coded as the same pictures backwards.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        # g=1: key frames only. One thread: the bytes must not depend on the machine's cores.
        stream.options = {"preset": "ultrafast", "qp": "18", "g": "1", "threads": "1"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
