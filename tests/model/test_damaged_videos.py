"""Damaged variants of real clips: each gives the right frames or a VideoDecodeError, and nothing crashes or leaks.

Variants are judged in processes of their own, so that a crash or a hang names its variant. To look at one:
`python tests/model/test_damaged_videos.py SHARED NUMBER 1`.
"""

import gc
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from av.sidedata.sidedata import Type as SideDataType

from vidprism_hf.model.video_decoding_vidprism import VideoDecodeError, check_video, decode_video, segment_centers

BATCH = 300
SLOW_VARIANTS = 2400
FRAMES = 6
TIME_LIMIT_S = 30


# --- damage


def flip_bits(data, other, rng, first, last, count):
    data = bytearray(data)
    for place in rng.integers(int(first * len(data)), max(1, int(last * len(data))), count):
        data[place] ^= 1 << int(rng.integers(8))
    return bytes(data)


def zeroed(data, other, rng):
    length = int(rng.integers(1, 1 + len(data) // 10))
    start = int(rng.integers(len(data) - length))
    return data[:start] + bytes(length) + data[start + length :]


def spliced(data, other, rng):
    cut = int(rng.choice([1024, 4096, len(data) // 4, len(data) // 2]))
    return data[:cut] + other[cut:]


def repeated(data, other, rng):
    start, end = sorted(rng.integers(0, len(data), 2).tolist())
    return data[:end] + data[start:]


DAMAGES = {
    "bits of the head": lambda data, other, rng: flip_bits(data, other, rng, 0, 0.01, rng.integers(1, 9)),
    "a few bits": lambda data, other, rng: flip_bits(data, other, rng, 0, 1, rng.integers(1, 4)),
    "many bits": lambda data, other, rng: flip_bits(data, other, rng, 0, 1, rng.integers(4, 200)),
    "bits of the end": lambda data, other, rng: flip_bits(data, other, rng, 0.97, 1, rng.integers(1, 9)),
    "cut": lambda data, other, rng: data[: int(rng.integers(1, len(data)))],
    "head missing": lambda data, other, rng: data[int(rng.integers(1, len(data))) :],
    "zeroed": zeroed,
    "spliced": spliced,
    "a part missing": lambda data, other, rng: (
        data[: len(data) // 3] + data[len(data) // 3 + int(rng.integers(9999)) :]
    ),
    "a part repeated": repeated,
    "empty": lambda data, other, rng: b"",
    "wrong extension": lambda data, other, rng: data,
}
EXTENSIONS = (".mp4", ".avi", ".mkv", ".ts", ".jpg", ".txt", ".h264", "")


def real_clips(shared: Path) -> list[Path]:
    return sorted(path for path in (shared / "data").rglob("*") if path.suffix in (".mp4", ".avi"))


def variant(number: int, paths: list[Path]) -> tuple[str, Path, bytes]:
    """Damage, undamaged clip and bytes of a variant, which follow from its number."""
    rng = np.random.default_rng([20_240_117, number])
    kind = list(DAMAGES)[number % len(DAMAGES)]
    small = [path for path in paths if path.suffix == ".avi"]
    path, other = rng.choice(small if rng.random() < 0.5 and small else paths, 2)
    return kind, path, DAMAGES[kind](path.read_bytes(), other.read_bytes(), rng)


# --- judging


def sequential(data: bytes, wanted: set[int]) -> dict[int, np.ndarray]:
    """The wanted frames of a plain full decode, as far as it comes."""
    found = {}
    try:
        with av.open(io.BytesIO(data), metadata_errors="replace") as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    found[index] = frame.to_ndarray(format="rgb24", threads=1)
    except (av.FFmpegError, ValueError, IndexError):
        pass
    return found


def judge(number: int, paths: list[Path], folder: Path) -> str:
    """Decode a variant; "right" or "refused", anything else is an AssertionError."""
    kind, path, data = variant(number, paths)
    source = data
    if kind == "wrong extension":
        source = folder / f"clip{number}{EXTENSIONS[number // len(DAMAGES) % len(EXTENSIONS)]}"
        source.write_bytes(data)
    error = frames = None
    try:
        frames, info = decode_video(source, lambda total: segment_centers(total, FRAMES), time_limit=TIME_LIMIT_S)
    except VideoDecodeError as exc:
        error = exc
    if error is not None:
        assert kind != "wrong extension", error
        assert "takes longer" not in str(error)
        assert "\n" not in str(error)
        return "refused"
    assert frames.shape == (FRAMES, info.height, info.width, 3)
    expected = sequential(data, set(info.indices))
    wrong = [i for i, frame in zip(info.indices, frames, strict=True) if not np.array_equal(frame, expected.get(i))]
    if wrong:
        undamaged = sequential(path.read_bytes(), set(info.indices))
        wrong = [
            index for index in wrong if not np.array_equal(frames[info.indices.index(index)], undamaged.get(index))
        ]
    assert not wrong or shown_otherwise(data), f"{kind} of {path.name}: frames {wrong} of {info}"
    return "right"


def shown_otherwise(data: bytes) -> bool:
    """Whether damage has hit the header's word on the pixels' shape or on which way is up, which is valid still."""
    with av.open(io.BytesIO(data), metadata_errors="replace") as container:
        frame = next(container.decode(video=0))
        turned = any(side.type == SideDataType.DISPLAYMATRIX for side in frame.side_data)
        return turned or container.streams.video[0].sample_aspect_ratio not in (None, 1)


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def judge_batch(shared: Path, first: int, count: int) -> None:
    """What a process of its own does: says each variant before it touches it, and at the end what it found."""
    paths, seen = real_clips(shared), Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + count):
            print(number, flush=True)
            kind = list(DAMAGES)[number % len(DAMAGES)]
            seen[kind, judge(number, paths, Path(folder))] += 1
            if number == first + count // 3:
                gc.collect()
                files, memory = len(os.listdir("/proc/self/fd")), resident_mib()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files
    assert resident_mib() < memory + 40, (memory, resident_mib())
    print(json.dumps([[kind, answer, times] for (kind, answer), times in seen.items()]))


def run_batch(shared: Path, first: int, count: int) -> Counter:
    command = [sys.executable, __file__, str(shared), str(first), str(count)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired as hung:
        pytest.fail(f"hangs at variant {(hung.stdout or b'').decode().split()[-1:]}")
    assert done.returncode == 0, (done.returncode, done.stdout.split()[-1:], done.stderr[-2000:])
    return Counter({(kind, answer): times for kind, answer, times in json.loads(done.stdout.splitlines()[-1])})


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")


@needs_proc
def test_some_damaged_variants(shared):
    seen = run_batch(shared, 0, 96)
    assert seen.total() == 96
    assert seen["empty", "refused"] == seen["wrong extension", "right"] == 8


@needs_proc
@pytest.mark.slow
def test_many_damaged_variants(shared):
    seen = Counter()
    for first in range(0, SLOW_VARIANTS, BATCH):
        seen += run_batch(shared, first, BATCH)
    assert seen.total() == SLOW_VARIANTS
    each = SLOW_VARIANTS // len(DAMAGES)
    assert seen["empty", "refused"] == seen["wrong extension", "right"] == each
    # Neither answer is given to everything.
    for kind in ("a few bits", "bits of the end"):
        assert seen[kind, "right"] > each // 20, seen
        assert seen[kind, "refused"] > each // 20, seen


def test_damage_beside_the_wanted_frames_does_not_matter(shared):
    """Only a full check finds it; the frames are those of the undamaged clip."""
    path = real_clips(shared)[-1]  # MPEG-4 with a keyframe every 12 frames
    data = path.read_bytes()
    with av.open(str(path)) as container:
        late = next(packet for packet in container.demux(video=0) if packet.pts == 40)
        start = late.pos + 200
    damaged = data[:start] + b"\xa5" * 600 + data[start + 600 :]
    expected = sequential(data, {0, 5})
    frames, _ = decode_video(damaged, lambda total: [0, 5])
    assert np.array_equal(frames, np.stack([expected[0], expected[5]]))
    assert check_video(data).num_frames > 45
    with pytest.raises(VideoDecodeError, match="damaged"):
        check_video(damaged)
    with pytest.raises(VideoDecodeError, match="damaged"):
        decode_video(damaged, lambda total: [total - 1, 42])


if __name__ == "__main__":
    judge_batch(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
