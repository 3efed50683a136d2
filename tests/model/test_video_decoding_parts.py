"""Decoding a few frames only: the same frames as a full decode gives, whatever the container says."""

import io
import itertools
import signal
import threading
from pathlib import Path

import av
import clips
import numpy as np
import pytest

from vidprism_hf.model import video_decoding_vidprism as decoding
from vidprism_hf.model.video_decoding_vidprism import VideoDecodeError, check_video, decode_video


def sequential(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)])


def h264(path, params="keyint=8:scenecut=0", bf="3", count=30, **kwargs):
    options = {"bf": bf, "b_strategy": "0", "x264-params": params}
    return clips.render(path, moving(count), options=options, **kwargs)


def moving(count, height=48, width=64):
    """Frames that need their predecessors: noise that drifts, so that a wrong reference shows."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    return [
        np.roll(noise, (index, 2 * index), (0, 1)) // 2 + clips.grey(index, height, width) // 3
        for index in range(count)
    ]


def changed(change):
    """A `rewrite` for clips.render: `change` gets the list of packets."""

    def rewrite(packets):
        packets = list(packets)
        change(packets)
        yield from packets

    return rewrite


def swap_times(packets):
    first, second = sorted((packet for packet in packets), key=lambda packet: packet.pts)[12:14]
    first.pts, second.pts = second.pts, first.pts


def repeat_time(packets):
    packets[17].pts = packets[16].pts


def all_keyframes(packets):
    for packet in packets:
        packet.is_keyframe = True


def no_keyframes_later(packets):
    for packet in packets[1:]:
        packet.is_keyframe = False


def first_packets_missing(packets):
    del packets[:3]


def join_two(packets):
    packets[16:18] = [clips._like(packets[16], bytes(packets[16]) + bytes(packets[17]))]


def empty_picture(packets):
    packets[17] = clips._like(packets[17], b"\0\0\1\xb6\x40\x00\x00\x00")  # how avi files repeat a picture


def hide(packets):
    for packet in packets:
        packet.pts -= 5 * int(1 / (25 * packet.time_base))
        packet.dts -= 5 * int(1 / (25 * packet.time_base))


ORDINARY = {
    "closed.mp4": {},
    "closed.mkv": {},
    "closed.ts": {},
    "closed.flv": {},
    "no_b.mp4": {"bf": "0"},
    "sliced.mp4": {"params": "keyint=8:scenecut=0:slices=4"},
    "pyramid.mp4": {"params": "keyint=12:scenecut=0:b-pyramid=normal"},
    "references.mp4": {"params": "keyint=20:scenecut=0:ref=6:weightp=2"},
    "hidden.mp4": {"bf": "0", "rewrite": changed(hide)},
}
AWKWARD = {
    "open.mp4": {"params": "keyint=8:scenecut=0:open-gop=1"},
    "open.ts": {"params": "keyint=8:scenecut=0:open-gop=1"},
    "refreshed.mp4": {"params": "keyint=8:scenecut=0:intra-refresh=1", "bf": "0"},
    "fields.ts": {"params": "keyint=8:scenecut=0:interlaced=1"},
    "swapped.mp4": {"rewrite": changed(swap_times)},
    "swapped.mkv": {"rewrite": changed(swap_times)},
    "repeated.mkv": {"rewrite": changed(repeat_time)},
    "all_keyframes.mkv": {"rewrite": changed(all_keyframes), "bf": "0"},
    "no_keyframes.mkv": {"rewrite": changed(no_keyframes_later), "bf": "0"},
    "joined.mkv": {"rewrite": changed(join_two)},
    "joined.ts": {"rewrite": changed(join_two), "bf": "0"},
    "no_start.ts": {"rewrite": changed(first_packets_missing)},
    "bare.h264": {},
}
OTHERS = {
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "6", "qmin": "1", "qmax": "1"}},
    "joined.avi": {"codec": "mpeg4", "options": {"g": "6"}, "rewrite": changed(join_two)},
    "empty_picture.avi": {"codec": "mpeg4", "options": {"g": "6"}, "rewrite": changed(empty_picture)},
    "mpeg4_b.avi": {"codec": "mpeg4", "options": {"g": "6", "bf": "2"}},
    "mpeg4_b.mp4": {"codec": "mpeg4", "options": {"g": "6", "bf": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "6", "bf": "2"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "6", "bf": "2"}},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "6", "deadline": "realtime"}},
    "vp8_hidden.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "10"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "6", "cpu-used": "8"}},
    "vp9_hidden.webm": {
        "codec": "libvpx-vp9",
        "options": {"auto-alt-ref": "1", "lag-in-frames": "12", "cpu-used": "4", "g": "20"},
    },
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=8:log-level=none:pools=1"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "flv1.flv": {"codec": "flv", "options": {"g": "6"}},
    "wmv2.wmv": {"codec": "wmv2", "options": {"g": "6"}},
    "wmv2.avi": {"codec": "wmv2", "options": {"g": "6"}},
}


def make(path: Path) -> Path:
    known = {**ORDINARY, **AWKWARD}
    if path.name in known:
        return h264(path, **known[path.name])
    return clips.render(path, moving(30), **OTHERS[path.name])


def check_parts(path):
    """Every frame by itself, some pairs, and all of them."""
    expected = sequential(path)
    total = len(expected)
    pairs = [(first, second) for first, second in itertools.product(range(0, total, 7), repeat=2)]
    for indices in [*((index,) for index in range(total)), *pairs, range(total)]:
        frames, info = decode_video(path, lambda total, indices=indices: indices)
        np.testing.assert_array_equal(frames, expected[list(indices)], err_msg=f"{path.name}: {indices}")
        assert info.num_frames == total


@pytest.mark.parametrize("name", [*ORDINARY, *AWKWARD, *OTHERS])
def test_each_frame_alone_equals_that_of_a_full_decode(tmp_path, name):
    check_parts(make(tmp_path / name))


def decoded_packets(monkeypatch, path, indices):
    """How many frames the decoder had to make."""
    count, offer = 0, decoding._Kept.offer

    def counting(self, index, frame):
        nonlocal count
        count += 1
        offer(self, index, frame)

    with monkeypatch.context() as patch:
        patch.setattr(decoding._Kept, "offer", counting)
        decode_video(path, lambda total: indices)
    return count


@pytest.mark.parametrize("name", [*ORDINARY, "mpeg4.avi", "vp8.webm", "vp9.webm"])
def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch, name):
    path = make(tmp_path / name)
    assert decoded_packets(monkeypatch, path, [24]) < 14
    assert decoded_packets(monkeypatch, path, [1]) < 6


def test_a_wrong_index_leads_to_a_full_decode(tmp_path, monkeypatch):
    """Whatever the index says, what the decoder gives is checked against it."""
    path = make(tmp_path / "closed.mp4")
    expected, build = sequential(path), decoding.IndexBuilder.build

    def shifted(self):
        index = build(self)
        index.frames = {time + 1: frame for time, frame in index.frames.items()}
        return index

    def wrong_start(self):
        index = build(self)
        index.start = list(range(len(index.start)))
        return index

    def wrong_spare(self):
        index = build(self)
        index.hidden = {3}
        return index

    for wrong in (shifted, wrong_start, wrong_spare):
        monkeypatch.setattr(decoding.IndexBuilder, "build", wrong)
        for index in range(5, 30, 6):
            np.testing.assert_array_equal(decode_video(path, lambda total, index=index: [index])[0][0], expected[index])


def test_packets_too_large_to_keep_are_read_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "KEPT_BYTES", 1000)
    check_parts(make(tmp_path / "closed.mp4"))
    check_parts(make(tmp_path / "hevc.mp4"))


def test_threads_change_no_frame(tmp_path):
    path = make(tmp_path / "closed.mp4")
    expected = sequential(path)
    for indices in ([3], [20, 4], range(30)):
        frames, _ = decode_video(path, lambda total, indices=indices: indices, threads=3)
        np.testing.assert_array_equal(frames, expected[list(indices)])


# --- sizes


@pytest.mark.parametrize(("degrees", "size"), [(0, (24, 32)), (90, (32, 24))])
def test_frames_are_shrunk_to_a_short_side(tmp_path, degrees, size):
    path = clips.turned(tmp_path / "clip.mp4", degrees)
    frames, info = decode_video(path, range, short_side=24)
    assert frames.shape == (3, *size, 3)
    assert (info.height, info.width) == size
    whole, _ = decode_video(path, range)
    for larger in (48, 100):
        np.testing.assert_array_equal(decode_video(path, range, short_side=larger)[0], whole)
    means = whole.reshape(3, size[0], 2, size[1], 2, 3).mean((2, 4))
    assert np.abs(frames - means).mean() < 2


# --- checks, time, interrupts


def test_check_video(tmp_path):
    path = make(tmp_path / "hidden.mp4")
    info = check_video(path)
    assert (info.num_frames, info.height, info.width, info.indices) == (25, 48, 64, ())
    with pytest.raises(VideoDecodeError, match="no such file"):
        check_video(tmp_path / "none.mp4")


def test_a_time_limit_ends_decoding(tmp_path):
    path = make(tmp_path / "closed.mp4")
    assert len(decode_video(path, range, time_limit=60)[0]) == 30
    for call in (lambda: decode_video(path, range, time_limit=0), lambda: check_video(path, time_limit=0)):
        with pytest.raises(VideoDecodeError, match="takes longer than 0 s"):
            call()


class Interrupting(io.BytesIO):
    """A file during whose n-th call Ctrl-C is pressed."""

    def __init__(self, data, at):
        super().__init__(data)
        self.left = at

    def _count(self):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)

    def read(self, *args):
        self._count()
        return super().read(*args)

    def seek(self, *args):
        self._count()
        return super().seek(*args)


def test_no_interrupt_is_lost(tmp_path):
    data = make(tmp_path / "closed.mp4").read_bytes()
    handler = signal.getsignal(signal.SIGINT)
    calls = 1
    while True:
        file = Interrupting(data, calls)
        try:
            decode_video(file, lambda total: [3])
        except KeyboardInterrupt:
            calls += 1
        else:
            break
    assert file.left > 0  # the last one came through only because it was never pressed
    assert calls > 5
    assert signal.getsignal(signal.SIGINT) is handler


def test_other_threads_leave_signals_alone(tmp_path):
    path = make(tmp_path / "closed.mp4")
    found = []
    thread = threading.Thread(target=lambda: found.append(decode_video(path, range)[1].num_frames))
    thread.start()
    thread.join()
    assert found == [30]
