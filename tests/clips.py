"""Render small test clips with PyAV: ordinary ones, and the awkward ones that real collections hold.

Frame `i` of a clip is a flat grey that tells `i` (`grey`, `index_of`); where it matters which way is up, a
white mark lies in the top left corner.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

GREY_STEP = 6  # survives lossy coding: neighbouring frames stay apart


def grey(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame `index` of a clip, uint8 (H, W, 3); indices below 38 are told apart."""
    return np.full((height, width, 3), 16 + GREY_STEP * index, np.uint8)


def greys(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    return [grey(index, height, width) for index in range(count)]


def index_of(frame: np.ndarray) -> int:
    """Which frame of a grey clip this is, read off its picture."""
    return round((float(np.mean(frame)) - 16) / GREY_STEP)


def marked(height: int = 48, width: int = 64) -> np.ndarray:
    """A grey picture with a white mark in its top left quarter."""
    image = grey(10, height, width)
    image[: height // 4, : width // 4] = 255
    return image


def render(
    path: Path | str,
    images: list[np.ndarray],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: int = 25,
    pts: list[int] | None = None,
    options: dict[str, str] | None = None,
    container_format: str | None = None,
    container_options: dict[str, str] | None = None,
    prepare=None,
    rewrite=iter,
) -> Path:
    """Encode images (uint8 (H, W, 3)) into a file.

    Args:
        path: The file; its suffix tells the container unless `container_format` does.
        images: The frames.
        codec: Encoder.
        pix_fmt: Pixel format of the stream.
        rate: Frames a second, and the time base.
        pts: Presentation time of each frame in ticks of 1/rate s; one tick a frame if not given.
        options: Encoder options.
        container_format: Muxer.
        container_options: Muxer options.
        prepare: Called with the stream before the first frame is encoded.
        rewrite: Maps the encoded packets to those that are written.
    """
    with av.open(str(path), "w", format=container_format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.thread_count = 1
        if prepare is not None:
            prepare(stream)
        frames = []
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number if pts is None else pts[number]
            frame.time_base = Fraction(1, rate)
            frames.append(frame)
        packets = (packet for frame in [*frames, None] for packet in stream.encode(frame))
        for packet in rewrite(packets):
            container.mux(packet)
    return Path(path)


def b_frames(path: Path, count: int = 30, **kwargs) -> Path:
    """H.264 with B-frames in a pyramid: stored in another order than shown."""
    options = {"bf": "3", "b_strategy": "0", "x264-params": "scenecut=0:keyint=12:b-pyramid=normal"}
    return render(path, greys(count), options=options, **kwargs)


def variable_rate(path: Path, count: int = 20) -> Path:
    """Frames of growing duration, whose timestamps are no multiple of a frame rate."""
    pts = np.cumsum([1 + (7 * index) % 11 for index in range(count)]).tolist()
    return render(path, greys(count), rate=1000, pts=pts)


def late_start(path: Path, count: int = 12, start: int = 5000) -> Path:
    """Timestamps that start long after 0."""
    return render(path, greys(count), pts=[start + index for index in range(count)])


def hidden_start(path: Path, count: int = 20, hidden: int = 5) -> Path:
    """An mp4 whose edit list hides the first frames, which stay in the file because others refer to them."""

    def shift(packets):
        for packet in packets:
            packet.pts -= hidden * int(1 / (25 * packet.time_base))
            packet.dts -= hidden * int(1 / (25 * packet.time_base))
            yield packet

    return render(path, greys(count), options={"bf": "0"}, rewrite=shift)


def turned(path: Path, degrees: int = 0, hflip: bool = False) -> Path:
    """A marked clip whose container says to show it turned counter-clockwise, then mirrored."""

    def prepare(stream):
        stream.set_display_rotation(degrees, hflip=hflip)

    return render(path, [marked()] * 3, options={"qp": "0"}, pix_fmt="yuv444p", prepare=prepare)


def packets_without_frame(path: Path, count: int = 12) -> Path:
    """VP8 in which frames 2, 5, 8, ... are there for reference and never shown: more packets than frames."""

    def hide(packets):
        for number, packet in enumerate(packets):
            data = bytearray(bytes(packet))
            if number % 3 == 2:
                data[0] &= ~0x10  # the bit of the frame tag that shows it
            yield _like(packet, bytes(data))

    options = {"auto-alt-ref": "0", "lag-in-frames": "0", "deadline": "realtime"}
    return render(path, greys(count), codec="libvpx", options=options, rewrite=hide)


def packets_with_two_frames(path: Path, count: int = 12) -> Path:
    """VP9 whose packets are superframes of two shown frames each: more frames than packets."""

    def pair(packets):
        packets = list(packets)
        for first, second in zip(packets[::2], packets[1::2], strict=True):
            # The index of a superframe: a marker (sizes of 4 bytes, 2 frames), the sizes, the marker again.
            marker = bytes([0b11000000 | 3 << 3 | 1])
            sizes = first.size.to_bytes(4, "little") + second.size.to_bytes(4, "little")
            yield _like(first, bytes(first) + bytes(second) + marker + sizes + marker)

    options = {"auto-alt-ref": "0", "lag-in-frames": "0", "cpu-used": "8", "deadline": "realtime"}
    return render(path, greys(count), codec="libvpx-vp9", options=options, rewrite=pair)


def _like(packet: av.Packet, data: bytes) -> av.Packet:
    """A packet of other data in the place of this one."""
    other = av.Packet(data)
    other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
    other.stream, other.is_keyframe = packet.stream, packet.is_keyframe
    return other


def avi_with_claimed_length(path: Path, claimed: int, count: int = 12) -> Path:
    """An avi whose headers claim another number of frames than it holds."""
    render(path, greys(count), codec="mpeg4", options={"g": "6"})
    data = bytearray(path.read_bytes())
    total = data.index(b"avih") + 8 + 16
    length = data.index(b"strh") + 8 + 32
    for place in (total, length):
        assert int.from_bytes(data[place : place + 4], "little") == count
        data[place : place + 4] = claimed.to_bytes(4, "little")
    path.write_bytes(data)
    return path


def audio_only(path: Path) -> Path:
    """Half a second of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for number in range(8):
            samples = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
