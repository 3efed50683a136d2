"""Decode the chosen frames of a video with PyAV: the one decoder of training, evaluation and serving.

Containers lie about how many frames they hold, when these are shown and which way is up, so nothing here
trusts a header: frames are numbered in the order in which a full decode presents them. Where the coded data of
the packets proves that order, only what the wanted frames need is decoded; else everything is.
This file travels to the Hub beside a checkpoint and imports only what a reader has.
"""

import http.client
import io
import os
import signal
import stat
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import Interpolation, VideoReformatter

from .video_packets_vidprism import FrameIndex, IndexBuilder, MissingDataError, find_splices

URL_TIMEOUT_S = 30
# Above this (8K is 33 million pixels) a header is broken or hostile; libav would allocate what it asks for.
MAX_PIXELS = 2**26
# Packets are kept between the look at them and decoding up to this size; those of a longer video are read twice.
KEPT_BYTES = 2**26
# Pixels are at most this much wider than high, or the reverse: a header that says more is broken.
MAX_ASPECT = 4
# Below this nobody sees that pixels are not square; scalers leave such ratios behind when they round a width.
MIN_ASPECT_CHANGE = Fraction(1, 100)
# libav opens these as "video" too: rendered text and single pictures.
NOT_VIDEOS = {"tty": "a text file", "image2": "a still image"}
STILL_BRANDS = {"avif", "heic", "heix", "mif1"}  # of ISO files that hold a picture
# Pillow counts as frames what these hold besides their picture: a second view, layers.
NOT_ANIMATIONS = {"MPO", "PSD"}
# These decoders notice when the end of a picture is missing.
CHECKING_DECODERS = {"h264", "mpeg1video", "mpeg2video"}

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
        num_frames: Count of the frames.
        fps: Mean frame rate that the container declares, in frames per second, None where it declares none.
        height: Height of the returned frames in pixels, after rotation and with square pixels.
        width: Width of the returned frames in pixels, likewise.
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
    source: str | os.PathLike | bytes | BinaryIO | Any,
    sample: Callable[[int], Sequence[int]],
    *,
    short_side: int | None = None,
    threads: int = 1,
    time_limit: float | None = None,
) -> tuple[np.ndarray, VideoInfo]:
    """Decode the frames of a video that `sample` asks for.

    Guaranteed, whatever the container says: frame `i` is the one that a full sequential decode presents as
    its `i`-th, upright (rotation and mirroring applied). Frames that an edit list hides do not count. Where the
    picture size changes within a video, frames are scaled to that of its first. A file with several videos gives
    the one that it marks as default, else the largest; the cover of a song is none.

    Frames look as in a player. Pixels that are not square (by the container's word, else the codec's) are made so by
    stretching the picture: its width where they are wide, its height where they are tall. Ratios beyond 4 count as
    broken, and those within 1 % of a square are left alone. Transparent pixels lie over white.

    An animated picture (GIF, APNG, WebP, AVIF) is a video; a still one is refused. Frames are counted, whatever
    their durations. Pillow reads animated WebP and AVIF, which libav cannot or only without transparency.

    Where the coded data proves which packet holds which frame (H.264 of progressive pictures, MPEG-4 part 2 without
    B pictures, VP8, VP9), decoding starts at the keyframe before each wanted frame and stops after the last; any
    doubt then or later leads to a full decode.

    A video in which libav finds damage on its way to the wanted frames is refused as a whole, since damage spreads
    from frame to frame; a packet that the file cuts off is found wherever it lies. Damage elsewhere is not looked
    for (`check_video` does), and damage that still reads as valid video cannot be told. A file that ends between
    two frames is merely a shorter video. Transport streams that were joined are whole where each part is and starts
    with a keyframe: its frames then are those that it gives by itself.

    Args:
        source: A path, an http(s) URL, the bytes of a file, a binary file object, or an animated picture opened
            with Pillow. A file object is read from its start, and left open at no particular position.
        sample: Maps the count of frames to the wanted indices, in any order and with repeats. Called with
            an estimate, and again if the estimate was wrong; the last call counts.
        short_side: Frames whose shorter side is longer come back shrunk to it, antialiased, in their aspect.
        threads: Threads of the decoder. More than one pays for single large videos only, not in loader workers.
        time_limit: Seconds after which decoding gives up. The clock is looked at between packets: the limit does
            not reach into a call that hangs.

    Returns:
        The RGB frames in the order of the indices, uint8 of shape (T, H, W, 3), and what is known of the
        video.

    Raises:
        VideoDecodeError: If the source is missing, unreadable, no video, damaged, or takes too long.
        ValueError: If `sample` returns no indices or some outside the video.
    """
    with _opened(source) as (file, name), _watched(name, time_limit) as watch:
        picture = _animation(file)
        if picture is not None:
            return _decode_picture(picture, name, sample, short_side, watch)
        with _stream(file, name, threads) as video:
            packets, expected, index = _scan(video, watch)
            indices = _flat(sample(expected))
            if index is None:
                frames, info = _decode_all(video, packets, indices, short_side, watch)
            else:
                found = _decode_some(video, packets, index, indices, short_side, watch)
                if found is not None:
                    return found
                info = None
        if info is None:  # the index was wrong; a decoder that went other ways is no measure
            with _stream(file, name, threads) as video:
                frames, info = _decode_all(video, packets, indices, short_side, watch)
        if info.num_frames != expected:
            indices = _flat(sample(info.num_frames))
        _check_range(indices, info.num_frames)  # only now: the first count was an estimate
        if indices != list(info.indices):
            with _stream(file, name, threads) as video:
                frames, info = _decode_all(video, packets, indices, short_side, watch)
        return frames, info


def check_video(source: str | os.PathLike | bytes | BinaryIO, time_limit: float | None = None) -> VideoInfo:
    """Decode every frame of a video, without converting any, to find out whether it is whole.

    Args:
        source: As for `decode_video`.
        time_limit: Seconds after which decoding gives up.

    Returns:
        What is known of the video; its count of frames is exact, and `indices` is empty.

    Raises:
        VideoDecodeError: If the source is missing, unreadable, no video, damaged anywhere, or takes too long.
    """
    with _opened(source) as (file, name), _watched(name, time_limit) as watch:
        picture = _animation(file)
        if picture is not None:
            return _decode_picture(picture, name, None, None, watch)[1]
        with _stream(file, name) as video:
            return _decode_all(video, None, [], None, watch)[1]


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
    """Yield a seekable binary file for any kind of source (or the opened picture), and the name that errors give it.

    libav never gets a path or a URL: it would read `concat:` and its kin out of a file name, and its messages
    for a missing file and a missing permission are the poorer ones.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = f"<bytes, {memoryview(source).nbytes} bytes>"
        yield _rewound(io.BytesIO(source), name), name
    elif is_animation(source):
        yield source, str(getattr(source, "filename", None) or f"<{source.format} picture>")
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
    try:
        # Looked at before it is opened, which a pipe nobody writes to never returns from.
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise _error(path, "is a folder", "name one video file")
        if not stat.S_ISREG(status.st_mode):
            raise _error(path, "is a pipe, socket or device", "name a file, or pass what it gives as bytes")
        if not status.st_size:  # also of files that the kernel makes up, some of which wait for events
            raise _error(path, "is empty", FETCH_AGAIN)
        return open(path, "rb")
    except VideoDecodeError:
        raise
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


# --- interrupts and time


@contextmanager
def _watched(name: str, time_limit: float | None) -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back while libav runs; yield a function that lets it through and looks at the clock.

    Where an exception arises in PyAV, Python code runs on its way out, and with it the handler of a signal that
    has come meanwhile; the KeyboardInterrupt is then lost without a word. Each end of a file is such an exception.
    """
    end = None if time_limit is None else time.monotonic() + time_limit
    received: list[tuple] = []
    handler = signal.getsignal(signal.SIGINT)
    holds = callable(handler) and threading.current_thread() is threading.main_thread()

    def watch() -> None:
        if received:
            handler(*received.pop())
        if end is not None and time.monotonic() > end:
            raise _error(name, f"takes longer than {time_limit:g} s to decode", "raise the limit or leave it out")

    if holds:
        signal.signal(signal.SIGINT, lambda *signal_and_frame: received.append(signal_and_frame))
    try:
        yield watch
    finally:
        if holds:
            signal.signal(signal.SIGINT, handler)
            if received:
                handler(*received.pop())


# --- packets and frames


@dataclass
class _Video:
    """An open file: what libav calls a container, the moving picture in it, and the name that errors give it.

    Attributes:
        aspect: Width of a pixel by its height.
        splices: Positions of the packets with which parts of a joined transport stream start.
    """

    file: BinaryIO
    name: str
    container: av.container.InputContainer
    stream: av.VideoStream
    aspect: Fraction
    splices: frozenset[int] = frozenset()

    def packets(self) -> Iterator[av.Packet]:
        """The packets that hold something, in the order of the file, from where it is read so far."""
        splices, doubtful = set(self.splices), None
        for number, packet in enumerate(self.container.demux(self.stream)):
            # Empty packets repeat a frame (avi) or end the stream (PyAV); to a decoder each means the end.
            if not packet.size:
                continue
            if packet.pos in splices:
                splices.remove(packet.pos)
                doubtful = None if packet.is_keyframe else number
            # At a splice libav marks one of the two packets before it; whether these are whole, the decoder finds out.
            if packet.is_corrupt and doubtful is None:
                doubtful = number
            if doubtful is not None and (not splices or number - doubtful > 1):
                raise self.incomplete(doubtful)
            yield packet
        if doubtful is not None or splices:
            raise self.incomplete(doubtful)

    def incomplete(self, number: int | None) -> VideoDecodeError:
        place = "a packet" if number is None else f"packet {number}"
        return _error(self.name, f"is cut off or damaged ({place} is incomplete)", FETCH_AGAIN)

    def info(self, num_frames: int, size: tuple[int, int], indices: list[int]) -> VideoInfo:
        fps = self.stream.average_rate  # base_rate, often twice the true rate, is no substitute
        return VideoInfo(num_frames, float(fps) if fps else None, *size, tuple(indices))


@contextmanager
def _stream(file: BinaryIO, name: str, threads: int = 1) -> Iterator[_Video]:
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
        # By default one: clips are short, workers decode side by side, and threads cost more than they save.
        stream.thread_type = "AUTO" if threads > 1 else "NONE"
        stream.codec_context.thread_count = threads
        aspect, splices = _pixel_aspect(stream), frozenset()
        try:
            if container.format.name == "mpegts":
                splices = _splices(file, stream, name)
            yield _Video(file, name, container, stream, aspect, splices)
        except (av.FFmpegError, OSError) as exc:
            raise _error(name, f"is cut off or damaged ({_reason(exc)})", FETCH_AGAIN) from exc


def _reason(exc: Exception) -> str:
    return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__


def _splices(file: BinaryIO, stream: av.VideoStream, name: str) -> frozenset[int]:
    position = file.tell()  # which is libav's
    try:
        checks_ends = stream.codec_context.name in CHECKING_DECODERS
        return frozenset(find_splices(file, stream.id, checks_ends) or ())
    except MissingDataError:
        raise _error(name, "is cut off or damaged (a part of a picture is missing)", FETCH_AGAIN) from None
    finally:
        file.seek(position)


def _pixel_aspect(stream: av.VideoStream) -> Fraction:
    """Width of a pixel by its height: the container's word, or else the codec's."""
    for aspect in (stream.sample_aspect_ratio, stream.codec_context.sample_aspect_ratio):
        if aspect and Fraction(1, MAX_ASPECT) <= aspect <= MAX_ASPECT:
            return aspect if abs(aspect - 1) >= MIN_ASPECT_CHANGE else Fraction(1)
    return Fraction(1)


def _first_video(container: av.container.InputContainer, name: str) -> av.VideoStream:
    kind = NOT_VIDEOS.get(container.format.name)
    still = container.format.name.endswith("_pipe") or container.metadata.get("major_brand") in STILL_BRANDS
    if kind is None and still:
        kind = "a still image"
    if kind is not None:
        raise _error(name, f"is {kind}, not a video", "leave it out")
    cover = av.stream.Disposition.attached_pic  # a song's cover is a video stream of one picture
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
        raise _error(name, f"has no video stream ({', '.join(kinds) or 'nothing'} only)", "leave it out")
    stream = max(streams, key=_prominence)
    if stream.codec_context is None:
        raise _error(name, "is in a codec that this build of libav cannot decode", LEAVE_OUT)
    _check_size(stream.codec_context.width, stream.codec_context.height, name)
    return stream


def _prominence(stream: av.VideoStream) -> tuple[bool, bool, int]:
    """What makes a stream the video of its file: being the default, more than one picture, and its size."""
    size = stream.codec_context.width * stream.codec_context.height if stream.codec_context else 0
    return bool(stream.disposition & av.stream.Disposition.default), stream.frames != 1, size


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise _error(name, f"claims frames of {width}x{height} pixels", LEAVE_OUT)


def _scan(video: _Video, watch: Callable[[], None]) -> tuple[list[av.Packet] | None, int, FrameIndex | None]:
    """Look at all packets without decoding any.

    Returns:
        The packets, None where they are too large to keep; the count of frames that they should become, nearly
        every container having one packet a frame; and the index, None where they leave a doubt.
    """
    packets, held, count = [], 0, 0
    builder = IndexBuilder(video.stream.codec_context)
    for packet in video.packets():
        watch()
        builder.add(packet)
        count += not packet.is_discard
        held += packet.size
        if held <= KEPT_BYTES:
            packets.append(packet)
        else:
            packets.clear()
    if not count:
        raise _error(video.name, "holds no frames", FETCH_AGAIN)
    index = None if video.splices else builder.build()
    return packets if held <= KEPT_BYTES else None, count, index


@contextmanager
def _again(video: _Video, packets: list[av.Packet] | None) -> Iterator[Iterator[av.Packet]]:
    """All packets from the first on: those kept, or read once more."""
    if packets is not None:
        yield iter(packets)
    else:
        with _stream(video.file, video.name) as other:
            yield other.packets()


def _checked(frames: list[av.VideoFrame], first: int, name: str) -> list[av.VideoFrame]:
    for place, frame in enumerate(frames):
        if frame.is_corrupt:
            raise _error(name, f"is cut off or damaged (frame {first + place})", FETCH_AGAIN)
    return frames


def _decode_all(
    video: _Video, packets: list[av.Packet] | None, indices: list[int], short_side: int | None, watch: Callable
) -> tuple[np.ndarray, VideoInfo]:
    """Decode all frames and keep those wanted; a first damaged one is an error.

    Places of indices outside the video stay unfilled, which the caller has to rule out by the count.
    """
    decoder = video.stream.codec_context
    kept, total = _Kept(indices, short_side, video.aspect), 0

    def decoded(packets):
        splices, depth = set(video.splices), decoder.reorder_depth
        for packet in packets:
            watch()
            if packet.pos in splices:  # a part of its own: no picture of it may refer to those before
                splices.remove(packet.pos)
                yield decoder.decode(None)
                decoder.flush_buffers()
                decoder.reorder_depth = depth
            yield decoder.decode(packet)
        yield decoder.decode(None)  # the frames that the decoder held back for reordering

    with _again(video, packets) as packets:
        for frames in decoded(packets):
            for frame in _checked(frames, total, video.name):
                kept.offer(total, frame)
                total += 1
    if not total:
        raise _error(video.name, "holds no frame that decodes", FETCH_AGAIN)
    return kept.images, video.info(total, kept.size, indices)


def _decode_some(
    video: _Video,
    packets: list[av.Packet] | None,
    index: FrameIndex,
    indices: list[int],
    short_side: int | None,
    watch: Callable[[], None],
) -> tuple[np.ndarray, VideoInfo] | None:
    """Decode what the wanted frames need; None where the index or the data proves wrong."""
    total = len(index.packets)
    if min(indices) < 0 or max(indices) >= total:
        return None
    # The first frame tells the size.
    wanted = sorted({index.packets[frame] for frame in {0, *indices}})
    decoder, depth = video.stream.codec_context, video.stream.codec_context.reorder_depth
    kept, latest, due = _Kept(indices, short_side, video.aspect), -1, 0

    def take(frames: list[av.VideoFrame]) -> bool:
        nonlocal latest, due
        for frame in frames:
            place = index.frames.get(frame.pts, -1)
            if place <= latest or frame.is_corrupt:
                return False
            latest, due = place, due - 1
            kept.offer(place, frame)
        return True

    try:
        with _again(video, packets) as packets:
            number = 0  # of the packet that comes next
            for goal in wanted:
                if index.start[goal] > number:
                    if not take(decoder.decode(None)) or due:
                        return None
                    decoder.flush_buffers()
                    decoder.reorder_depth = depth  # which flushing forgets
                    number += sum(1 for _ in islice(packets, index.start[goal] - number))
                for packet in islice(packets, goal + 1 - number):
                    watch()
                    if number == goal or number not in index.spare:
                        due += number not in index.hidden
                        if not take(decoder.decode(packet)):
                            return None
                    number += 1
            if not take(decoder.decode(None)) or due:
                return None
    except av.FFmpegError:
        return None
    return kept.images, video.info(total, kept.size, indices)


class _Kept:
    """The frames wanted, as upright RGB of one size, that of the first frame offered.

    Attributes:
        size: Height and width, known when the first frame is there.
        images: uint8 (T, H, W, 3), likewise.
    """

    def __init__(self, indices: list[int], short_side: int | None, aspect: Fraction = Fraction(1)):
        self.aspect = aspect
        self.reformatter = VideoReformatter()  # one for all frames: it keeps the tables of the conversion
        self.short_side = short_side
        self.size = self.images = None
        self.count = len(indices)
        self.places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            self.places.setdefault(index, []).append(place)

    def offer(self, index: int, frame: av.VideoFrame) -> None:
        """Keep the frame where it is wanted: converting to RGB costs as much as decoding."""
        if self.images is None:
            transpose, _, _ = _orientation(frame)
            height, width = _squared(frame.height, frame.width, self.aspect)
            height, width = (width, height) if transpose else (height, width)
            self.size = _shrunk(height, width, self.short_side)
            self.images = np.empty((self.count, *self.size, 3), np.uint8)
        places = self.places.get(index)
        if places is None:
            return
        self._convert(frame, self.images[places[0]])
        for place in places[1:]:
            self.images[place] = self.images[places[0]]

    def _convert(self, frame: av.VideoFrame, out: np.ndarray) -> None:
        transpose, flip_x, flip_y = _orientation(frame)
        height, width = self.size[::-1] if transpose else self.size
        same = (height, width) == (frame.height, frame.width)
        how = Interpolation.BILINEAR if same else Interpolation.BICUBIC
        kind, channels = ("rgba", 4) if _has_alpha(frame.format.name) else ("rgb24", 3)
        # The default of libswscale, threads started anew for each frame, takes three times as long.
        plane = self.reformatter.reformat(frame, width, height, kind, interpolation=how, threads=1).planes[0]
        image = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)[:, : channels * width]
        image = _over_white(image.reshape(height, width, channels))
        if transpose:
            image = image.swapaxes(0, 1)
        out[:] = image[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


@lru_cache
def _has_alpha(pixel_format: str) -> bool:
    return any(part.is_alpha for part in av.VideoFormat(pixel_format).components)


def _over_white(image: np.ndarray) -> np.ndarray:
    """RGB of an RGB or RGBA picture (H, W, C), uint8."""
    if image.shape[-1] == 3 or image[..., 3].min() == 255:
        return image[..., :3]
    alpha = image[..., 3:].astype(np.uint16)
    return ((image[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _squared(height: int, width: int, aspect: Fraction) -> tuple[int, int]:
    """Height and width with square pixels: one of them grows, so that nothing is lost."""
    return (height, round(width * aspect)) if aspect > 1 else (round(height / aspect), width)


def _shrunk(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """Height and width with the shorter side no longer than `short_side`, rounded as torchvision does."""
    short = min(height, width)
    if short_side is None or short <= short_side:
        return height, width
    return height * short_side // short, width * short_side // short


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How to turn a stored frame upright: whether to transpose it, then to mirror columns, then rows.

    The display matrix ((a, b, u), (c, d, v), ...) shows the stored pixel (x, y) at (a x + c y, b x + d y).
    Only its signs matter: cameras write the eight turns and mirrorings of a rectangle, nothing between.
    """
    for data in frame.side_data:  # no look-up by key, whose miss is an exception in PyAV
        if data.type == SideDataType.DISPLAYMATRIX:
            a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
            transpose = abs(b) + abs(c) > abs(a) + abs(d)
            flip_x, flip_y = (c < 0, b < 0) if transpose else (a < 0, d < 0)
            return transpose, flip_x, flip_y
    return False, False, False


# --- animated pictures, which libav cannot read


def is_animation(source: Any) -> bool:
    """Whether this is a picture of several frames in time, opened with Pillow."""
    return getattr(source, "n_frames", 1) > 1 and getattr(source, "format", None) not in NOT_ANIMATIONS


def _animation(file: BinaryIO | Any) -> Any | None:
    """The picture of several frames that a file holds and Pillow alone can read as it looks; else None."""
    if is_animation(file):
        return file
    file.seek(0)
    head = file.read(12)
    if head[4:] != b"ftypavis" and (head[:4], head[8:]) != (b"RIFF", b"WEBP"):
        return None
    file.seek(0)
    try:
        from PIL import Image

        picture = Image.open(file)
        return picture if is_animation(picture) else None
    except Exception:  # libav says better what is wrong with it
        return None


def _decode_picture(
    picture: Any, name: str, sample: Callable[[int], Sequence[int]] | None, short_side: int | None, watch: Callable
) -> tuple[np.ndarray | None, VideoInfo]:
    """Decode the frames of an animated picture that `sample` asks for; without it, look at all and keep none."""
    _check_size(*picture.size, name)
    first, before = int(bool(picture.info.get("default_image"))), picture.tell()  # an APNG's picture for old readers
    total, (width, height) = picture.n_frames - first, picture.size
    indices = _flat(sample(total)) if sample else []
    _check_range(indices or [0], total)
    height, width = _shrunk(height, width, short_side)
    images = np.empty((len(indices), height, width, 3), np.uint8)
    try:
        for index in sorted(set(indices)) or range(total):
            watch()
            _seek(picture, first + index)
            frame = picture.convert("RGBA")
            frame = frame if frame.size == (width, height) else frame.resize((width, height))
            images[[place for place, wanted in enumerate(indices) if wanted == index]] = _over_white(np.asarray(frame))
    except VideoDecodeError:
        raise
    except Exception as exc:  # Pillow's decoders raise whatever comes up in them
        raise _error(name, f"is cut off or damaged ({_reason(exc)})", FETCH_AGAIN) from exc
    finally:
        with suppress(Exception):
            _seek(picture, before)
    return images, VideoInfo(total, None, height, width, tuple(indices))


def _seek(picture: Any, index: int) -> None:
    if index < picture.tell() and picture.format == "PNG":
        picture.seek(picture.n_frames - 1)  # Pillow finds the way back from the end of an APNG only
        picture.load()
    picture.seek(index)
