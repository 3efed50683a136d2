"""Clips decoded a second of CPU time, by our decoder and by the others that are installed.

Each round decodes every clip with every library, one after the other, so that what else the machine does hits all
of them alike; the table gives medians over the rounds. `python benchmarks/decode.py --output table.md` writes it.
"""

import argparse
import datetime
import importlib
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vidprism_hf.model import decode_video, segment_centers

FRAME_COUNTS = (8, 32)


# --- the ways to decode: path and number of frames -> uint8 (T, H, W, 3)


def ours(path: str, count: int) -> np.ndarray:
    return decode_video(path, lambda total: segment_centers(total, count))[0]


def ours_shrunk(path: str, count: int) -> np.ndarray:
    return decode_video(path, lambda total: segment_centers(total, count), short_side=256)[0]


def ours_resized(path: str, count: int) -> np.ndarray:
    import torch
    from torchvision.transforms.v2 import functional

    frames = torch.from_numpy(ours(path, count)).permute(0, 3, 1, 2)
    return functional.resize(frames, [256], functional.InterpolationMode.BICUBIC, antialias=True).numpy()


def sequential(path: str, count: int) -> np.ndarray:
    """What one writes first: count by a demux, decode all, convert what is wanted."""
    with av.open(path) as container:
        total = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(video=0))
    wanted = segment_centers(total, count).tolist()
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        found = {}
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                found[index] = frame.to_ndarray(format="rgb24", threads=1)
    return np.stack([found[index] for index in wanted])


def torchcodec(path: str, count: int, mode: str = "exact") -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode)
    indices = segment_centers(len(decoder), count).tolist()
    return decoder.get_frames_at(indices=indices).data.numpy()


def torchcodec_approximate(path: str, count: int) -> np.ndarray:
    return torchcodec(path, count, "approximate")


def decord(path: str, count: int) -> np.ndarray:
    from decord import VideoReader

    reader = VideoReader(path, num_threads=1)
    return reader.get_batch(segment_centers(len(reader), count)).asnumpy()


def opencv(path: str, count: int) -> np.ndarray:
    """Grabs every frame up to the last one wanted; jumping is slower and lands on wrong frames."""
    import cv2

    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    frames, at = [], -1
    for index in segment_centers(total, count).tolist():
        while at < index:
            capture.grab()
            at += 1
        if frames and index == frames[-1][0]:
            frames.append(frames[-1])
        else:
            frames.append((index, cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)))
    capture.release()
    return np.stack([image for _, image in frames])


OTHERS = {
    "PyAV, sequential": ("av", sequential),
    "torchcodec exact": ("torchcodec", torchcodec),
    "torchcodec approximate": ("torchcodec", torchcodec_approximate),
    "decord": ("decord", decord),
    "OpenCV": ("cv2", opencv),
}


def installed() -> tuple[dict[str, Callable], list[str]]:
    """The ways to decode that this machine has, and names with versions of what they need."""
    found, versions = {}, {}
    for name, (module, function) in OTHERS.items():
        try:
            versions[module] = importlib.import_module(module).__version__
        except (ImportError, OSError, RuntimeError) as exc:
            print(f"skipped: {name} ({str(exc).strip().splitlines()[0]})", file=sys.stderr)
            continue
        found[name] = function
    if "cv2" in versions:
        import cv2

        cv2.setNumThreads(1)
    return found, [f"{module} {version}" for module, version in versions.items()]


def lend_libav(folder: str) -> None:
    """Start anew with PyAV's libav where others look for FFmpeg: torchcodec brings none, and PyAV hides its own."""
    if "VIDPRISM_BENCH_LIBAV" in os.environ:
        return
    for library in (Path(av.__file__).parents[1] / "av.libs").glob("lib*"):
        if name := re.match(r"(lib(?:av|sw)[a-z]+)-\w+(\.so\.\d+)", library.name):
            Path(folder, name[1] + name[2]).symlink_to(library)
    paths = filter(None, [os.environ.get("LD_LIBRARY_PATH"), folder])
    os.environ |= {"LD_LIBRARY_PATH": ":".join(paths), "VIDPRISM_BENCH_LIBAV": folder}
    sys.exit(subprocess.run([sys.executable, *sys.argv]).returncode)


# --- clips


def film(count: int, height: int, width: int, seed: int) -> Iterator[np.ndarray]:
    """Frames that cost a codec about what real ones do: a moving view of a texture, moving things, and grain."""
    rng = np.random.default_rng(seed)
    texture = np.zeros((2 * height, 2 * width, 3), np.float32)
    for scale in (4, 16, 64):
        coarse = rng.normal(0, 14 * scale**0.35, (2 * height // scale + 1, 2 * width // scale + 1, 3))
        texture += coarse.repeat(scale, 0).repeat(scale, 1)[: 2 * height, : 2 * width]
    texture += 128
    grain = rng.normal(0, 2.5, (height + 64, width + 64, 1)).astype(np.float32)
    for index in range(count):
        y = int((0.5 + 0.5 * np.sin(index / 40 + seed)) * height)
        x = int((0.5 + 0.5 * np.cos(index / 55)) * width)
        image = texture[y : y + height, x : x + width].copy()
        for thing in range(6):
            size = height // (5 + thing)
            top = int((0.5 + 0.5 * np.sin(index / (9 + 3 * thing) + thing)) * (height - size))
            left = int((0.5 + 0.5 * np.cos(index / (13 + 2 * thing) + thing)) * (width - size))
            image[top : top + size, left : left + size] *= 0.4 + 0.2 * thing
        dy, dx = rng.integers(0, 64, 2)
        yield np.clip(image + grain[dy : dy + height, dx : dx + width], 0, 255).astype(np.uint8)


def render(path: Path, count: int, height: int, width: int, seed: int, rate: int = 30, varying: bool = False) -> Path:
    """An H.264 file as x264 makes it by default: keyframes at most 250 frames apart, three B-frames."""
    with av.open(str(path), "w") as container:
        options = {"crf": "23", "preset": "veryfast" if height > 500 else "medium", "g": "250", "bf": "3"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        time = 0
        for index, image in enumerate(film(count, height, width, seed)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            time += 17 + (23 * index) % 40 if varying else 33
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def clip_sets(shared: Path, folder: Path, per_set: int) -> dict[str, list[str]]:
    sets = {}
    for name, title in (("weizmann", "weizmann, 180x144 mpeg4"), ("tennis", "tennis, 398x224 h264")):
        paths = sorted(path for path in (shared / "data" / name).rglob("*.*") if path.suffix in (".avi", ".mp4"))
        if paths:
            sets[title] = paths[:: max(1, len(paths) // per_set)][:per_set]
        else:
            print(f"skipped: {title} (no clips in {shared / 'data' / name})", file=sys.stderr)
    sets["rendered, 340x256 h264, 280-420 frames"] = [
        render(folder / f"small{seed}.mp4", 280 + 35 * seed, 256, 340, seed) for seed in range(5)
    ]
    sets["rendered, 1080p h264, 300 frames, gop 250"] = [
        render(folder / f"large{seed}.mp4", 300, 1080, 1920, seed) for seed in range(2)
    ]
    sets["rendered, 1080p h264, variable rate"] = [
        render(folder / f"varying{seed}.mp4", 120, 1080, 1920, seed, varying=True) for seed in range(2)
    ]
    return {name: [str(path) for path in paths] for name, paths in sets.items()}


# --- measuring


def measure(paths: list[str], count: int, ways: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median clips a second of each way over rounds in which they take turns."""
    rates = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        spent = dict.fromkeys(ways, 0.0)
        for number, path in enumerate(paths):
            names = list(ways)
            turn = (round_ + number) % len(names)
            for name in names[turn:] + names[:turn]:
                start = time.process_time()
                ways[name](path, count)
                spent[name] += time.process_time() - start
        if round_:  # the first one warms up
            for name, seconds in spent.items():
                rates[name].append(len(paths) / seconds)
    return {name: statistics.median(values) for name, values in rates.items()}


def right_frames(paths: list[str], count: int, way: Callable) -> str:
    """In how many clips a way gives the frames of a full decode; another colour conversion may differ a little."""
    right = 0
    for path in paths:
        try:
            frames, expected = way(path, count), sequential(path, count)
        except Exception as exc:  # another library may raise what it likes; it shows in the table
            return f"fails: {type(exc).__name__}"
        same = frames.shape == expected.shape and all(
            np.abs(a.astype(np.int16) - b).mean() < 2 for a, b in zip(frames, expected, strict=True)
        )
        right += same
    return f"{right}/{len(paths)}"


def report(shared: Path, per_set: int, rounds: int, machine: str) -> str:
    others, versions = installed()
    ways = {"ours": ours, **others}
    lines = [
        "# Clips decoded a second",
        "",
        f"Clips a second of CPU time, each library told to use one thread; medians of {rounds} interleaved rounds;",
        "segment centres. Only ratios within a row count.",
        '"frames right": clips whose frames are those of a full sequential decode (mean difference below 2 of 255).',
        "",
        "| clips | frames | " + " | ".join(ways) + " | ours / best other that is right |",
        "|---|---|" + "---|" * (len(ways) + 1),
    ]
    notes, shrunk = [], []
    with tempfile.TemporaryDirectory() as folder:
        for title, paths in clip_sets(shared, Path(folder), per_set).items():
            right = {name: right_frames(paths, 32, way) for name, way in ways.items()}
            notes.append(f"| {title} | " + " | ".join(right.values()) + " |")
            for count in FRAME_COUNTS:
                rates = measure(paths, count, ways, rounds)
                complete = f"{len(paths)}/{len(paths)}"
                best = max(rate for name, rate in rates.items() if name != "ours" and right[name] == complete)
                cells = " | ".join(f"{rate:.3g}" for rate in rates.values())
                lines.append(f"| {title} | {count} | {cells} | {rates['ours'] / best:.2f} |")
                print(lines[-1], file=sys.stderr)
                if "1080p h264, 300" in title:
                    two = measure(paths, count, {"resized": ours_resized, "shrunk": ours_shrunk}, rounds)
                    shrunk.append(f"{count} frames: {two['shrunk'] / two['resized']:.2f}")
    lines += ["", "| frames right | " + " | ".join(ways) + " |", "|---|" + "---|" * len(ways), *notes]
    lines += [
        "",
        "1080p shrunk to a short side of 256 by `short_side=256`, times as fast as by torchvision after decoding: "
        f"{'; '.join(shrunk)}.",
        "",
        f"{datetime.date.today()}, {machine}; Python {platform.python_version()}, {', '.join(versions)}.",
        "",
    ]
    return "\n".join(lines)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def memory(shared: Path, decodes: int) -> str:
    """Resident memory over many decodes of all real clips."""
    paths = sorted(path for path in (shared / "data").rglob("*.*") if path.suffix in (".avi", ".mp4"))
    lines = ["| decodes | resident memory, MiB |", "|---|---|"]
    for number in range(decodes + 1):
        if number in (0, decodes // 100, decodes // 10, decodes // 2, decodes):
            lines.append(f"| {number} | {resident_mib():.1f} |")
        ours(str(paths[number % len(paths)]), 8)
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=os.environ.get("VIDPRISM_SHARED", "../shared"))
    parser.add_argument("--clips", type=int, default=12, help="real clips of each set")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=int, default=0, metavar="N", help="measure memory over N decodes instead")
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores", help="the machine, in words")
    parser.add_argument("--output", type=Path, help="file for the Markdown")
    args = parser.parse_args()
    if not args.memory:
        with tempfile.TemporaryDirectory() as folder:
            lend_libav(folder)
    text = (
        memory(args.shared, args.memory) if args.memory else report(args.shared, args.clips, args.rounds, args.machine)
    )
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
