"""Decode the chosen frames of a video with PyAV: the one decoder of training, evaluation and serving.

Containers lie about how many frames they hold, when these are shown and which way is up, so nothing here
trusts a header: frames are numbered in the order in which a full decode presents them, and the total is
what decodes. This file travels to the Hub beside a checkpoint and imports only what a reader has.
"""

import http.client
import io
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter

URL_TIMEOUT_S = 30
# Above this (8K is 33 million pixels) a header is broken or hostile; libav would allocate what it asks for.
MAX_PIXELS = 2**26
# libav opens these as "video" too: rendered text and single pictures.
NOT_VIDEOS = {"tty": "a text file", "image2": "a still image"}

FETCH_AGAIN = "copy or download it again, or leave it out"
LEAVE_OUT = "convert it with ffmpeg or leave it out"


class VideoDecodeError(ValueError):
    """A video that cannot be decoded; the message is one line, `<file>: <cause>, <what to do>`.

    Attributes:
        source: The file as the message names it: a path, a URL without its query, or a description of bytes.
        cause: What is wrong with it.
    """

    def __init__(self, message: str, source: str | None = None, cause: str | None = None):
        # The message alone must do: a DataLoader rebuilds a worker's exception from its text.
        super().__init__(message)
        self.source = source
        self.cause = cause

    def __reduce__(self):
        return type(self), (str(self), self.source, self.cause)


@dataclass(frozen=True)
class VideoInfo:
    """What decoding found out about a video.

    Attributes:
        num_frames: Exact count of the frames that decode.
        fps: Mean frame rate that the container declares, in frames per second, None where it declares none.
        height: Height of the returned frames in pixels, after rotation.
        width: Width of the returned frames in pixels, after rotation.
        indices: Index of each returned frame in the full sequence.
    """

    num_frames: int
    fps: float | None
    height: int
    width: int
    indices: tuple[int, ...]


def segment_centers(total: int, num_frames: int) -> np.ndarray:
    """Indices of the frames at the centres of equal segments of a video.

    Args:
        total: Frames in the video.
        num_frames: Segments, and so frames wanted. Where there are fewer frames than that, frames repeat.

    Returns:
        Non-decreasing int64 indices below `total`, shape (num_frames,).

    Raises:
        ValueError: If either count is below 1.
    """
    if total < 1 or num_frames < 1:
        raise ValueError(f"Need at least one frame and one segment, got total={total}, num_frames={num_frames}.")
    # Integers throughout: the float form rounds differently at some lengths.
    return (2 * np.arange(num_frames, dtype=np.int64) + 1) * total // (2 * num_frames)


def decode_video(
    source: str | os.PathLike | bytes | BinaryIO, sample: Callable[[int], Sequence[int]]
) -> tuple[np.ndarray, VideoInfo]:
    """Decode the frames of a video that `sample` asks for.

    Guaranteed, whatever the container says: frame `i` is the one that a full sequential decode presents as
    its `i`-th, upright (rotation and mirroring applied), and the count is that of the frames that decode.
    Every call decodes the video to its end, because only that proves the count. Frames that an edit list
    hides do not count. Where the picture size changes within a video, frames are scaled to that of its first.

    A stream in which libav finds damage is refused as a whole, since damage spreads from frame to frame;
    damage that still reads as valid video cannot be told. A file that ends between two frames is merely a
    shorter video.

    Args:
        source: A path, an http(s) URL, the bytes of a file, or a binary file object. A file object is read
            from its start, and left open at no particular position.
        sample: Maps the count of frames to the wanted indices, in any order and with repeats. Called with
            an estimate, and again if the estimate was wrong; the last call counts.

    Returns:
        The RGB frames in the order of the indices, uint8 of shape (T, H, W, 3), and what is known of the
        video.

    Raises:
        VideoDecodeError: If the source is missing, unreadable, no video, or damaged.
        ValueError: If `sample` returns no indices or some outside the video.
    """
    with _opened(source) as (file, name):
        expected = _count_packets(file, name)
        indices = _flat(sample(expected))
        frames, info = _decode(file, name, indices)
        if info.num_frames != expected:
            indices = _flat(sample(info.num_frames))
        _check_range(indices, info.num_frames)  # only now: the first count was an estimate
        if indices != list(info.indices):
            frames, info = _decode(file, name, indices)
        return frames, info


def _error(name: str, cause: object, advice: str) -> VideoDecodeError:
    cause = " ".join(str(cause).split())
    return VideoDecodeError(f"{name}: {cause}, {advice}", name, cause)


def _flat(indices: Sequence[int]) -> list[int]:
    array = np.asarray(indices)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"Frame indices must be a non-empty flat sequence of integers, got {indices!r}.")
    return array.tolist()


def _check_range(indices: list[int], total: int) -> None:
    if min(indices) < 0 or max(indices) >= total:
        raise ValueError(f"Frame indices {min(indices)} to {max(indices)} leave the video's range 0 to {total - 1}.")


# --- where the bytes come from


@contextmanager
def _opened(source) -> Iterator[tuple[BinaryIO, str]]:
    """Yield a seekable binary file for any kind of source, and the name that errors give it.

    libav never gets a path or a URL: it would read `concat:` and its kin out of a file name, and its messages
    for a missing file and a missing permission are the poorer ones.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = f"<bytes, {memoryview(source).nbytes} bytes>"
        yield _rewound(io.BytesIO(source), name), name
    elif hasattr(source, "read"):
        name = str(getattr(source, "name", None) or f"<{type(source).__name__}>")
        yield _rewound(source, name), name
    elif isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        # A query may carry a signature, which has no place in a log.
        name = source.partition("?")[0]
        yield _rewound(io.BytesIO(_download(source, name)), name), name
    elif isinstance(source, (str, os.PathLike)):
        name = os.fsdecode(source)
        with _open_path(name) as file:
            yield _rewound(file, name), name
    else:
        raise TypeError(f"A video is a path, URL, bytes or binary file object, got {type(source).__name__}.")


def _open_path(path: str) -> BinaryIO:
    if os.path.isdir(path):
        raise _error(path, "is a folder", "name one video file")
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise _error(path, "no such file", "check the path") from None
    except PermissionError:
        raise _error(path, "may not be read", "change its permissions") from None
    except (OSError, ValueError) as exc:
        raise _error(path, f"cannot be opened ({exc})", "check the path") from exc


def _rewound(file: BinaryIO, name: str) -> BinaryIO:
    """A file that is binary, can seek and holds something: the one given, or else its whole content."""
    try:
        seekable = getattr(file, "seekable", None)
        if not hasattr(file, "seek") or not hasattr(file, "tell") or (seekable and not seekable()):
            content = file.read()  # two passes need two starts
            file = io.BytesIO(content) if isinstance(content, bytes) else io.StringIO(content)
        file.seek(0)
        first = file.read(1)
    except (OSError, ValueError) as exc:  # ValueError: a closed file, or text that does not decode
        raise _error(name, f"cannot be read ({exc})", "open it again") from exc
    if isinstance(first, str):
        raise _error(name, "is opened as text", 'open it in mode "rb"')
    if not first:
        raise _error(name, "is empty", FETCH_AGAIN)
    return file


def _download(url: str, name: str) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "vidprism_hf"})
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT_S) as response:
            return response.read()
    except urllib.error.HTTPError as exc:
        raise _error(name, f"the server answers {exc.code} {exc.reason}", "check the address") from None
    except (OSError, ValueError, http.client.HTTPException) as exc:
        reason = getattr(exc, "reason", exc)
        raise _error(name, f"cannot be downloaded ({reason})", "check the address and the network") from exc


# --- packets and frames


@contextmanager
def _stream(file: BinaryIO, name: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open the first moving picture of a file, turning what libav raises into a VideoDecodeError.

    libav itself stays silent: PyAV drops its log unless an application turns it on.
    """
    file.seek(0)
    try:
        # Old AVI files hold titles in any encoding. No protocol is open to a file that names others.
        container = av.open(file, "r", metadata_errors="replace", options={"protocol_whitelist": "none"})
    except (av.FFmpegError, OSError, ValueError) as exc:
        raise _error(name, f"is not a video, or its head or end is missing ({_reason(exc)})", FETCH_AGAIN) from exc
    with closing(container):  # an open one keeps its buffers until collected: a worker's memory grows
        stream = _first_video(container, name)
        # One thread: clips are short, workers decode side by side, and threads cost more than they save.
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        try:
            yield container, stream
        except (av.FFmpegError, OSError) as exc:
            raise _error(name, f"is cut off or damaged ({_reason(exc)})", FETCH_AGAIN) from exc


def _reason(exc: Exception) -> str:
    return getattr(exc, "strerror", None) or str(exc)


def _first_video(container: av.container.InputContainer, name: str) -> av.VideoStream:
    kind = NOT_VIDEOS.get(container.format.name)
    if kind is None and container.format.name.endswith("_pipe"):
        kind = "a still image"
    if kind is not None:
        raise _error(name, f"is {kind}, not a video", "leave it out")
    cover = av.stream.Disposition.attached_pic  # a song's cover is a video stream of one picture
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
        raise _error(name, f"has no video stream ({', '.join(kinds) or 'nothing'} only)", "leave it out")
    stream = streams[0]
    if stream.codec_context is None:
        raise _error(name, "is in a codec that this build of libav cannot decode", LEAVE_OUT)
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        size = f"{stream.codec_context.width}x{stream.codec_context.height}"
        raise _error(name, f"claims frames of {size} pixels", LEAVE_OUT)
    return stream


def _packets(container: av.container.InputContainer, stream: av.VideoStream, name: str) -> Iterator[av.Packet]:
    for number, packet in enumerate(container.demux(stream)):
        # Empty packets repeat a frame (avi) or end the stream (PyAV); to a decoder each means the end.
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise _error(name, f"is cut off or damaged (packet {number} is incomplete)", FETCH_AGAIN)
        yield packet


def _count_packets(file: BinaryIO, name: str) -> int:
    """Count what should become frames, without decoding: nearly every container has one packet a frame."""
    with _stream(file, name) as (container, stream):
        count = sum(not packet.is_discard for packet in _packets(container, stream, name))
    if not count:
        raise _error(name, "holds no frames", FETCH_AGAIN)
    return count


def _frames(container: av.container.InputContainer, stream: av.VideoStream, name: str) -> Iterator[av.VideoFrame]:
    """Every frame of the stream in presentation order, or an error at the first one that is damaged."""

    def decoded():
        for packet in _packets(container, stream, name):
            yield from stream.decode(packet)
        yield from stream.decode(None)  # the frames that the decoder held back for reordering

    for index, frame in enumerate(decoded()):
        if frame.is_corrupt:
            raise _error(name, f"is cut off or damaged (frame {index})", FETCH_AGAIN)
        yield frame


def _decode(file: BinaryIO, name: str, indices: list[int]) -> tuple[np.ndarray, VideoInfo]:
    """Decode all frames and keep those wanted.

    Places of indices outside the video stay unfilled, which the caller has to rule out by the count.
    """
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    images, total = None, 0
    with _stream(file, name) as (container, stream):
        rgb = _RgbConverter()
        for index, frame in enumerate(_frames(container, stream, name)):
            total += 1
            if index not in places and images is not None:
                continue  # converting to RGB costs as much as decoding
            image = rgb(frame)
            if images is None:
                images = np.empty((len(indices), *image.shape), np.uint8)
            if index in places:
                images[places[index]] = image
        if images is None:
            raise _error(name, "holds no frame that decodes", FETCH_AGAIN)
        fps = stream.average_rate  # base_rate, often twice the true rate, is no substitute
    height, width = images.shape[1:3]
    return images, VideoInfo(total, float(fps) if fps else None, height, width, tuple(indices))


class _RgbConverter:
    """Turns decoded frames into upright RGB arrays of one size, that of the first frame converted."""

    def __init__(self):
        self.reformatter = VideoReformatter()  # one for all frames: it keeps the tables of the conversion
        self.height = self.width = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Convert one frame to a uint8 array (H, W, 3)."""
        transpose, flip_x, flip_y = _orientation(frame)
        height, width = (frame.width, frame.height) if transpose else (frame.height, frame.width)
        if self.height is None:
            self.height, self.width = height, width
        height, width = (self.width, self.height) if transpose else (self.height, self.width)
        # The default of libswscale, threads started anew for each frame, takes three times as long.
        image = self.reformatter.reformat(frame, width, height, "rgb24", threads=1).to_ndarray()
        if transpose:
            image = image.swapaxes(0, 1)
        return image[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How to turn a stored frame upright: whether to transpose it, then to mirror columns, then rows.

    The display matrix ((a, b, u), (c, d, v), ...) shows the stored pixel (x, y) at (a x + c y, b x + d y).
    Only its signs matter: cameras write the eight turns and mirrorings of a rectangle, nothing between.
    """
    matrix = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    transpose = abs(b) + abs(c) > abs(a) + abs(d)
    flip_x, flip_y = (c < 0, b < 0) if transpose else (a < 0, d < 0)
    return transpose, flip_x, flip_y
