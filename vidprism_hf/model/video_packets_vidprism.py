"""Read off the packets of a video which frame each one holds, so that a few frames can be decoded by themselves.

Timestamps and keyframe flags of containers are often wrong. What decides here is the coded data: the order in
which H.264 (ITU-T H.264, sections 7.3 and 8.2.1), MPEG-4 part 2 (ISO/IEC 14496-2, section 6.2.5), VP8 (RFC 6386,
section 9.1) and VP9 (bitstream specification, section 6.2 and annex B) say that their pictures are shown. Where
that and the timestamps differ, or anything is unusual, there is no index, and the video has to be decoded whole.
Also, where a transport stream was joined from parts (ISO/IEC 13818-1, section 2.4.3).
This file travels to the Hub beside a checkpoint and imports only what a reader has.
"""

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO, NamedTuple

import av
import numpy as np

# libav takes an MPEG-4 packet up to this size for one that repeats a picture.
MPEG4_NO_PICTURE = 19
# Parameter sets are shorter than this; of larger units the head suffices.
UNIT_HEAD = 4096
# Size of a transport packet, and where its sync byte lies: bare, after a time stamp (m2ts), before a checksum.
TRANSPORT_PACKETS = ((188, 0), (192, 4), (204, 0))
SYNC = 0x47
TRANSPORT_BLOCK = 2**15  # packets looked at together


class NoIndexError(Exception):
    """The packets do not tell which frames they hold."""


class Picture(NamedTuple):
    """What one packet holds.

    Attributes:
        starts: Whether decoding can start here: neither this picture nor any later one needs an earlier one.
        needed: Whether another picture may be predicted from this one.
        place: Sorting key of the order in which pictures are shown.
    """

    starts: bool
    needed: bool
    place: int


@dataclass
class FrameIndex:
    """Which packet holds which frame.

    Attributes:
        packets: Number of the packet of each frame, frames in the order in which they are shown.
        frames: The frame with each timestamp.
        start: For each packet, the last one at or before it where decoding can start.
        spare: Packets that no other one needs.
        hidden: Packets whose pictures are not shown.
    """

    packets: list[int]
    frames: dict[int, int]
    start: list[int]
    spare: set[int]
    hidden: set[int]


class IndexBuilder:
    """Gathers the index of a video from its packets, in the order of the file.

    Args:
        codec_context: The decoder's context, as opening the file left it.
    """

    def __init__(self, codec_context: av.VideoCodecContext):
        self._depth = codec_context.reorder_depth
        self._pictures: list[Picture] = []
        self._times: list[int | None] = []
        self._hidden: set[int] = set()
        try:
            self._read = READERS[codec_context.codec.canonical_name](codec_context)
        except (KeyError, IndexError, ValueError, NoIndexError):
            self._read = None

    def add(self, packet: av.Packet) -> None:
        """Take note of the next packet."""
        if self._read is None:
            return
        try:
            self._pictures.append(self._read(bytes(packet)))
        except (IndexError, ValueError, NoIndexError):  # data that ends too early
            self._read = None
            return
        if packet.is_discard:
            self._hidden.add(len(self._times))
        self._times.append(packet.pts)

    def build(self) -> FrameIndex | None:
        """The index, None where the packets leave a doubt."""
        pictures, times, hidden = self._pictures, self._times, self._hidden
        if self._read is None or not pictures or not pictures[0].starts or None in times:
            return None
        order = sorted(range(len(times)), key=times.__getitem__)
        places = [pictures[number].place for number in order]
        in_order = all(first < second for first, second in pairwise(places))
        if len(set(times)) < len(times) or not in_order or order[0] != 0:
            return None
        if _reordering(order) > self._depth:
            return None  # a decoder that learns of the order on its way drops frames
        start, last = [], 0
        for number, picture in enumerate(pictures):
            last = number if picture.starts else last
            start.append(last)
        shown = [number for number in order if number not in hidden]
        frames = {times[number]: frame for frame, number in enumerate(shown)}
        spare = {number for number, picture in enumerate(pictures) if not picture.needed}
        return FrameIndex(shown, frames, start, spare, hidden)


def _reordering(order: list[int]) -> int:
    """The most pictures that precede another in the file and follow it on the screen."""
    if all(first < second for first, second in pairwise(order)):
        return 0
    rank = {number: rank for rank, number in enumerate(order)}
    before, most = [], 0
    for number in range(len(order)):
        at = bisect(before, rank[number])
        most = max(most, len(before) - at)
        before.insert(at, rank[number])
        del before[:-64]  # far more than any decoder can hold back
    return most


# --- H.264


class _Bits:
    """Reads the bits of a payload, most significant first."""

    def __init__(self, data: bytes):
        data = data.replace(b"\0\0\3", b"\0\0")  # emulation prevention
        self.bits = bin(int.from_bytes(b"\1" + data, "big"))[3:]
        self.at = 0

    def u(self, count: int) -> int:
        self.at += count
        if self.at > len(self.bits):
            raise IndexError
        return int(self.bits[self.at - count : self.at] or "0", 2)

    def ue(self) -> int:
        """An unsigned Exp-Golomb code."""
        zeros = self.bits.index("1", self.at) - self.at
        self.at += zeros
        return self.u(zeros + 1) - 1

    def se(self) -> int:
        """A signed Exp-Golomb code."""
        code = self.ue()
        return (code + 1) // 2 if code % 2 else -(code // 2)


class _H264:
    """Reads H.264 access units of progressive pictures under one sequence parameter set."""

    def __init__(self, context: av.VideoCodecContext):
        extra = context.extradata or b""
        self.length_size = (extra[4] & 3) + 1 if extra[:1] == b"\1" else 0
        units = list(_avcc_units(extra)) if self.length_size else list(_start_code_units(extra))
        self.parameters = set(units)
        sequences = {unit for unit in units if unit[0] & 31 == 7}
        if len(sequences) != 1:
            raise NoIndexError
        self._read_sequence(_Bits(sequences.pop()[1:]))
        self.first = True
        # Each restart begins a period of picture order counts; the last count of all, and of a reference picture.
        self.start = self.last = self.reference = 0

    def _read_sequence(self, bits: _Bits) -> None:
        profile = bits.u(8)
        bits.u(16)
        bits.ue()
        self.separate_planes = False
        if profile not in (66, 77, 88):
            chroma = bits.ue()
            self.separate_planes = chroma == 3 and bits.u(1) == 1
            bits.ue(), bits.ue(), bits.u(1)
            if bits.u(1):
                for size in [16] * 6 + [64] * (2 if chroma != 3 else 6):
                    self._skip_scaling_list(bits, size)
        self.frame_number_bits = bits.ue() + 4
        self.order_type = bits.ue()
        if self.order_type == 1:
            raise NoIndexError  # an arithmetic that nobody uses
        self.order_bits = bits.ue() + 4 if self.order_type == 0 else 0
        bits.ue(), bits.u(1), bits.ue(), bits.ue()
        if not bits.u(1):
            raise NoIndexError  # fields: two packets may hold one frame

    @staticmethod
    def _skip_scaling_list(bits: _Bits, size: int) -> None:
        if not bits.u(1):
            return
        last = following = 8
        for _ in range(size):
            if following:
                following = (last + bits.se()) % 256
            last = following or last

    def __call__(self, data: bytes) -> Picture:
        header = None
        for unit in _length_units(data, self.length_size) if self.length_size else _start_code_units(data):
            kind = unit[0] & 31
            if kind in (1, 5):
                if unit[1] & 0x80:  # the first slice of a picture
                    if header is not None:
                        raise NoIndexError
                    header = unit
            elif kind in (7, 8):
                self._check_parameters(unit)
            elif kind not in (6, 9, 10, 11, 12):
                raise NoIndexError
        if header is None:
            raise NoIndexError
        self.first = False
        return self._picture(header)

    def _check_parameters(self, unit: bytes) -> None:
        """Parameters may be repeated; those of pictures may be stated by the first packet."""
        if unit not in self.parameters:
            if not self.first or unit[0] & 31 == 7:
                raise NoIndexError
            self.parameters.add(unit)

    def _picture(self, unit: bytes) -> Picture:
        restart, needed = unit[0] & 31 == 5, unit[0] & 0x60 != 0
        bits = _Bits(unit[1:24])
        bits.ue(), bits.ue(), bits.ue()
        bits.u(self.frame_number_bits + 2 * self.separate_planes)
        if restart:
            bits.ue()
            self.start, self.reference = self.last + 1, 0
        if self.order_type == 2:
            self.last += 1
            return Picture(restart, needed, self.last)
        # The low bits are stored; the rest follows from the last reference picture, which is near.
        cycle = 1 << self.order_bits
        count = self.reference + cycle // 2 - (self.reference - bits.u(self.order_bits) + cycle // 2) % cycle
        if needed:
            self.reference = count
        self.last = max(self.last, self.start + count)
        return Picture(restart, needed, self.start + count)


def _length_units(data: bytes, length_size: int) -> Iterator[bytes]:
    """The units of a packet, each after its length. Only their heads matter: of large ones no more is copied."""
    at = 0
    while at < len(data):
        start = at + length_size
        at = start + int.from_bytes(data[at:start], "big")
        if at > len(data) or at == start:
            raise NoIndexError
        yield data[start : min(at, start + UNIT_HEAD)]


def _start_code_units(data: bytes) -> Iterator[bytes]:
    """The units of a packet, each after the bytes 0, 0, 1."""
    start = data.find(b"\0\0\1")
    if start < 0 or any(data[:start]):
        raise NoIndexError
    while start >= 0:
        end = data.find(b"\0\0\1", start + 3)
        unit = data[start + 3 : end if end >= 0 else len(data)][:UNIT_HEAD].rstrip(b"\0")  # zeros may follow one
        if not unit:
            raise NoIndexError
        yield unit
        start = end


def _avcc_units(extra: bytes) -> Iterator[bytes]:
    """The parameter sets of the header that mp4 and Matroska keep apart from the packets."""
    at = 5
    for mask in (31, 255):  # sequence, then picture parameter sets
        count, at = extra[at] & mask, at + 1
        for _ in range(count):
            start = at + 2
            at = start + int.from_bytes(extra[at:start], "big")
            if at > len(extra):
                raise NoIndexError
            yield extra[start:at][:UNIT_HEAD]


# --- codecs that show pictures in the order of the file


class _InOrder:
    """Counts pictures that are shown in the order of their packets."""

    def __init__(self, context: av.VideoCodecContext):
        self.number = 0

    def __call__(self, data: bytes) -> Picture:
        self.number += 1
        return Picture(self.starts(data), True, self.number)


class _Mpeg4(_InOrder):
    def starts(self, data: bytes) -> bool:
        picture = data.find(b"\0\0\1\xb6")
        # Old avi files pack two pictures into one packet, and leave an empty one in the place of the second.
        if picture < 0 or data.find(b"\0\0\1\xb6", picture + 4) >= 0 or len(data) <= MPEG4_NO_PICTURE:
            raise NoIndexError
        kind = data[picture + 4] >> 6
        if kind == 2:
            raise NoIndexError  # a B picture
        return kind == 0


class _Vp8(_InOrder):
    def starts(self, data: bytes) -> bool:
        if not data[0] & 0x10:
            raise NoIndexError  # never shown
        return not data[0] & 1


class _Vp9(_InOrder):
    def starts(self, data: bytes) -> bool:
        headers = [self._header(frame) for frame in self._frames(data)]
        if [shown for shown, _ in headers].count(True) != 1:
            raise NoIndexError
        return headers[0][1]

    @staticmethod
    def _frames(data: bytes) -> list[bytes]:
        """The frames of a superframe, or the one frame."""
        mark = data[-1]
        count, size = (mark & 7) + 1, (mark >> 3 & 3) + 1
        index = len(data) - 2 - count * size
        if mark & 0xE0 != 0xC0 or index < 0 or data[index] != mark:
            return [data]
        frames, at = [], 0
        for place in range(index + 1, len(data) - 1, size):
            end = at + int.from_bytes(data[place : place + size], "little")
            if end > index:
                raise NoIndexError
            frames, at = [*frames, data[at:end]], end
        return frames

    @staticmethod
    def _header(frame: bytes) -> tuple[bool, bool]:
        """Whether a frame is shown, and whether it is a keyframe."""
        bits = _Bits(frame[:2])
        if bits.u(2) != 2:
            raise NoIndexError
        if bits.u(1) + 2 * bits.u(1) == 3:
            bits.u(1)
        if bits.u(1):  # one of the frames before
            return True, False
        inter, shown = bits.u(1), bits.u(1)
        return bool(shown), not inter


READERS = {"h264": _H264, "mpeg4": _Mpeg4, "vp8": _Vp8, "vp9": _Vp9}


# --- transport streams


class MissingDataError(Exception):
    """Packets of a transport stream are damaged, or missing in the middle of a picture."""


def find_splices(file: BinaryIO, pid: int, checks_ends: bool) -> set[int] | None:
    """Find where a transport stream was joined from parts: its continuity counter jumps between two pictures.

    Jumps that the stream announces are none: it says that nothing is missing.

    Args:
        file: The file, which is read from its start and left at its end.
        pid: Number of the video in the stream.
        checks_ends: Whether the decoder notices a picture whose end is missing. Where it does not, the last packet
            before a jump must be stuffed, as that of a whole picture is unless it happens to fill the packet.

    Returns:
        Positions of the transport packets at which a part starts; None where the packets are out of step.

    Raises:
        MissingDataError: If a packet is marked as damaged, or the counter jumps within a picture.
    """
    file.seek(0)
    head = file.read(TRANSPORT_PACKETS[-1][0] * 16)
    size, sync = next(((size, at) for size, at in TRANSPORT_PACKETS if set(head[at::size]) == {SYNC}), (0, 0))
    if not size:
        return None
    file.seek(0)
    splices, start, rest, last = set(), 0, b"", None
    while block := file.read(size * TRANSPORT_BLOCK):
        block = rest + block  # a file object may give less than asked for
        whole = len(block) // size * size
        rest = block[whole:]
        packets = np.frombuffer(block[:whole], np.uint8).reshape(-1, size)[:, sync : sync + 6].astype(int)
        if (packets[:, 0] != SYNC).any():
            return None
        places = np.flatnonzero(((packets[:, 1] & 31) << 8 | packets[:, 2] == pid) & (packets[:, 3] & 16 > 0))
        if places.size:
            found = packets[places]
            before = np.vstack([found[:1] if last is None else last, found[:-1]])
            jumps = (found[:, 3] - before[:, 3] - 1) & 15 > 0
            jumps[0] &= last is not None
            jumps &= ~((found[:, 3] & 32 > 0) & (found[:, 4] > 0) & (found[:, 5] & 0x80 > 0))  # announced
            ends = (before[:, 3] & 32 > 0) & (before[:, 4] > 7)  # more than a clock reference needs
            if (found[:, 1] & 0x80).any() or (jumps & ((found[:, 1] & 0x40 == 0) | ~(ends | checks_ends))).any():
                raise MissingDataError
            splices.update((start + size * places[jumps]).tolist())
            last = found[-1:]
        start += whole
    return splices
