"""Which stream of a file is the video, in what shape, joined from which parts, and what is no file at all."""

import os
import socket
from fractions import Fraction

import av
import clips
import numpy as np
import pytest

from vidprism_hf.model.video_decoding_vidprism import VideoDecodeError, check_video, decode_video


def indices(source):
    return [clips.index_of(frame) for frame in decode_video(source, range)[0]]


# --- several streams


def two_streams(path, first, second, default=(False, False), codec="libx264"):
    """Grey clips of the sizes and lengths given, interleaved."""
    with av.open(str(path), "w") as container:
        streams = []
        for number, (count, height, width) in enumerate((first, second)):
            cover = codec == "mjpeg" and number == 0
            stream = container.add_stream(codec if number == 0 else "libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuvj420p" if cover else "yuv420p"
            stream.codec_context.time_base = Fraction(1, 25)
            stream.disposition = av.stream.Disposition.default if default[number] else av.stream.Disposition(0)
            if cover:
                stream.disposition = av.stream.Disposition.attached_pic
            streams.append((stream, clips.greys(count, height, width)))
        for stream, images in streams:
            for number, image in enumerate(images):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


SMALL, LARGE = (4, 32, 32), (6, 48, 64)


@pytest.mark.parametrize(
    ("suffix", "first", "second", "default", "shape"),
    [
        ("mkv", SMALL, LARGE, (False, True), LARGE),
        ("mkv", LARGE, SMALL, (False, True), SMALL),
        ("mkv", SMALL, LARGE, (True, False), SMALL),
        ("mkv", SMALL, LARGE, (False, False), LARGE),
        ("mkv", LARGE, SMALL, (False, False), LARGE),
        ("mkv", SMALL, LARGE, (True, True), LARGE),
        ("mp4", SMALL, LARGE, (False, True), LARGE),
        ("mp4", LARGE, SMALL, (False, True), SMALL),
        ("ts", SMALL, LARGE, (False, False), LARGE),
        ("ts", LARGE, SMALL, (False, False), LARGE),
        ("mkv", (4, 48, 64), LARGE, (False, False), (4, 48, 64)),  # of equals the first
    ],
)
def test_the_default_stream_is_the_video_else_the_largest(tmp_path, suffix, first, second, default, shape):
    path = two_streams(tmp_path / f"clip.{suffix}", first, second, default)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    frames, _ = decode_video(path, range)
    assert frames.shape == (*shape, 3)
    assert (check_video(path).num_frames, check_video(path).width) == (shape[0], shape[2])


def test_a_cover_is_never_the_video(tmp_path):
    path = two_streams(tmp_path / "clip.mp4", (1, 96, 128), SMALL, codec="mjpeg")
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    assert decode_video(path, range)[0].shape == (*SMALL, 3)


# --- pixels that are not square


def shaped(path, aspect, container_aspect=None, **kwargs):
    """A marked clip of 48 x 64 pixels, with another ratio in the header of the mp4 where one is given."""

    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = aspect
        if "degrees" in kwargs:
            stream.set_display_rotation(kwargs["degrees"])

    clips.render(path, [clips.marked()] * 6, options={"qp": "0"}, pix_fmt="yuv444p", prepare=prepare)
    if container_aspect is not None:
        data = path.read_bytes()
        place = data.index(b"pasp") + 4
        parts = b"".join(part.to_bytes(4, "big") for part in container_aspect)
        path.write_bytes(data[:place] + parts + data[place + 8 :])
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "h264"])
@pytest.mark.parametrize(
    ("aspect", "size"),
    [((16, 9), (48, 114)), ((2, 1), (48, 128)), ((8, 9), (54, 64)), ((1, 2), (96, 64)), ((12, 11), (48, 70))],
)
def test_frames_have_square_pixels(tmp_path, suffix, aspect, size):
    path = shaped(tmp_path / f"clip.{suffix}", Fraction(*aspect))
    frames, info = decode_video(path, range)
    assert frames.shape == (6, *size, 3)
    assert (info.height, info.width) == size
    assert (check_video(path).height, check_video(path).width) == size
    # The mark still fills the top left quarter of each side.
    white = (frames[0] > 160).all(-1)
    np.testing.assert_allclose(white[2].sum(), size[1] / 4, atol=2)
    np.testing.assert_allclose(white[:, 2].sum(), size[0] / 4, atol=2)
    short = decode_video(path, range, short_side=24)[0].shape[1:3]
    assert min(short) == 24
    assert max(short) == max(size) * 24 // min(size)


@pytest.mark.parametrize(
    ("container", "size"),
    [
        ((4, 3), (48, 85)),  # the container's word before the codec's
        ((1, 1), (48, 64)),
        ((0, 1), (48, 128)),
        ((1, 0), (48, 128)),
        ((1, 1000), (48, 128)),  # no pixel looks like this: the codec is asked
        ((1000, 1), (48, 128)),
        ((2**31, 2**31 - 1), (48, 128)),
    ],
)
def test_the_container_decides_unless_it_is_absurd(tmp_path, container, size):
    path = shaped(tmp_path / "clip.mp4", Fraction(2, 1), container)
    assert decode_video(path, range)[0].shape == (6, *size, 3)


@pytest.mark.parametrize("aspect", [(1, 1000), (1000, 1), (5, 1), (100, 101)])
def test_absurd_and_invisible_ratios_change_nothing(tmp_path, aspect):
    path = shaped(tmp_path / "clip.mkv", Fraction(*aspect))
    plain = shaped(tmp_path / "plain.mkv", Fraction(1))
    np.testing.assert_array_equal(decode_video(path, range)[0], decode_video(plain, range)[0])


@pytest.mark.parametrize(("degrees", "size"), [(90, (128, 48)), (180, (48, 128)), (-90, (128, 48))])
def test_the_ratio_is_that_of_the_stored_picture(tmp_path, degrees, size):
    frames, _ = decode_video(shaped(tmp_path / "clip.mp4", Fraction(2), degrees=degrees), range)
    assert frames.shape == (6, *size, 3)
    upright = np.rot90(clips.marked().repeat(2, axis=1), degrees // 90)
    assert np.abs(frames[0].astype(int) - upright).mean() < 3


# --- joined files

CODECS = {
    "h264": {"options": {"bf": "2", "x264-params": "keyint=8:scenecut=0"}},
    "no_b": {"options": {"bf": "0"}},
    "hevc": {"codec": "libx265", "options": {"x265-params": "keyint=8:log-level=none:pools=1"}},
    "mpeg2": {"codec": "mpeg2video", "options": {"bf": "2", "g": "6", "qmax": "2"}},
}
M2TS = {"container_options": {"mpegts_m2ts_mode": "1"}, "container_format": "mpegts"}


def noise(count, seed):
    images = np.random.default_rng(seed).integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)
    return list(images.repeat(4, axis=1).repeat(4, axis=2))


def parts(folder, suffix, lengths=(12, 9, 17), **kwargs):
    made = []
    for number, length in enumerate(lengths):
        path = clips.render(folder / f"{number}.{suffix}", noise(length, number), **kwargs)
        made.append(path.read_bytes())
    return made


def frames_of(data):
    return decode_video(data, range)[0]


@pytest.mark.parametrize("suffix", ["ts", "m2ts"])
@pytest.mark.parametrize("codec", CODECS)
def test_joined_transport_streams_give_the_frames_of_their_parts(tmp_path, suffix, codec):
    made = parts(tmp_path, suffix, **CODECS[codec], **(M2TS if suffix == "m2ts" else {}))
    joined = b"".join(made)
    expected = np.concatenate([frames_of(part) for part in made])
    assert len(expected) == 38
    frames, _ = decode_video(joined, range)
    np.testing.assert_array_equal(frames, expected)
    for index in range(0, 38, 5):
        np.testing.assert_array_equal(decode_video(joined, lambda total, index=index: [index])[0][0], expected[index])
    assert check_video(joined).num_frames == 38


def test_a_part_may_be_one_picture_and_any_number_be_joined(tmp_path):
    made = parts(tmp_path, "ts", lengths=(1, 1, 2, 1, 6), **CODECS["h264"])
    joined = b"".join(made * 3)
    expected = np.concatenate([frames_of(part) for part in made] * 3)
    np.testing.assert_array_equal(frames_of(joined), expected)


def test_large_joined_streams_are_read_twice(tmp_path, monkeypatch):
    from vidprism_hf.model import video_decoding_vidprism as decoding
    from vidprism_hf.model import video_packets_vidprism as packets

    joined = b"".join(parts(tmp_path, "ts", **CODECS["h264"]))
    expected = frames_of(joined)
    monkeypatch.setattr(decoding, "KEPT_BYTES", 1000)
    monkeypatch.setattr(packets, "TRANSPORT_BLOCK", 3)
    np.testing.assert_array_equal(frames_of(joined), expected)


def transport_packets(data):
    return [data[start : start + 188] for start in range(0, len(data), 188)]


def is_video(packet):
    return (packet[1] & 31) << 8 | packet[2] == 256


def starts_picture(packet):
    return bool(packet[1] & 0x40)


def announced(packet):
    """The packet with the discontinuity indicator set; it must have room for it."""
    assert packet[3] & 0x20
    assert packet[4] > 0
    return packet[:5] + bytes([packet[5] | 0x80]) + packet[6:]


@pytest.mark.parametrize("codec", CODECS)
def test_announced_jumps_are_no_damage(tmp_path, codec):
    made = parts(tmp_path, "ts", lengths=(12, 9), **CODECS[codec])
    second = transport_packets(made[1])
    first = next(place for place, packet in enumerate(second) if is_video(packet))
    second[first] = announced(second[first])
    expected = np.concatenate([frames_of(part) for part in made])
    np.testing.assert_array_equal(frames_of(made[0] + b"".join(second)), expected)
    # Also where nothing jumps.
    np.testing.assert_array_equal(frames_of(b"".join(second)), frames_of(made[1]))


@pytest.mark.parametrize("codec", CODECS)
def test_a_stream_that_lost_data_is_refused(tmp_path, codec):
    """Whichever packet within a picture is lost: also the last before a keyframe or a join."""
    made = parts(tmp_path, "ts", lengths=(9, 9), **CODECS[codec])
    packets = transport_packets(b"".join(made))
    within = [place for place, packet in enumerate(packets) if is_video(packet) and not starts_picture(packet)]
    last = within[-1]
    for place in within[:: max(1, len(within) // 40)]:
        damaged = b"".join(packets[:place] + packets[place + 1 :])
        if place == last:
            continue  # a file that ends early
        with pytest.raises(VideoDecodeError, match="damaged"):
            frames_of(damaged)


def test_a_stream_that_lost_a_picture_within_a_group_is_refused(tmp_path):
    (data,) = parts(tmp_path, "ts", lengths=(20,), options={"bf": "0", "x264-params": "keyint=8:scenecut=0"})
    packets = transport_packets(data)
    starts = [place for place, packet in enumerate(packets) if is_video(packet) and starts_picture(packet)]
    for number in (1, 3, 12):
        lost = packets[: starts[number]] + packets[starts[number + 1] :]
        if sum(map(is_video, packets[starts[number] : starts[number + 1]])) % 16 == 0:
            continue  # the counter has come round
        with pytest.raises(VideoDecodeError, match="damaged"):
            frames_of(b"".join(lost))


def test_packets_marked_as_damaged_are_refused(tmp_path):
    packets = transport_packets(b"".join(parts(tmp_path, "ts", **CODECS["h264"])))
    places = [place for place, packet in enumerate(packets) if is_video(packet)]
    for place in places[:: len(places) // 7]:
        packet = packets[place]
        marked = packet[:1] + bytes([packet[1] | 0x80]) + packet[2:]
        with pytest.raises(VideoDecodeError, match="damaged"):
            frames_of(b"".join([*packets[:place], marked, *packets[place + 1 :]]))


def test_a_cut_part_is_refused(tmp_path):
    first, second = parts(tmp_path, "ts", lengths=(9, 9), **CODECS["h264"])
    packets = transport_packets(first)
    video = [place for place, packet in enumerate(packets) if is_video(packet)]
    for cut in (video[-2], video[-3], video[len(video) // 2]):
        if not starts_picture(packets[cut]):
            with pytest.raises(VideoDecodeError, match="damaged"):
                frames_of(b"".join(packets[:cut]) + second)


def test_a_part_that_does_not_start_with_a_keyframe_is_refused(tmp_path):
    first, second = parts(tmp_path, "ts", lengths=(9, 20), **CODECS["no_b"])
    packets = transport_packets(second)
    starts = [place for place, packet in enumerate(packets) if is_video(packet) and starts_picture(packet)]
    with pytest.raises(VideoDecodeError, match="damaged"):
        frames_of(first + b"".join(packets[starts[2] :]))


def test_the_wrap_of_timestamps_changes_nothing(tmp_path):
    """Timestamps have 33 bits: they start anew every 26 hours."""
    start = (2**33 - 5 * 3600) * 25 // 90000

    def late(packets):
        for packet in packets:
            shift = int(start / 25 / packet.time_base)
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            yield packet

    for codec in ("h264", "no_b"):
        path = clips.render(tmp_path / "wrap.ts", clips.greys(30), rewrite=late, **CODECS[codec])
        assert indices(path) == list(range(30))
        assert [clips.index_of(frame) for frame in decode_video(path, lambda total: [3, 20, 29])[0]] == [3, 20, 29]


RESTARTING = {
    "mpg": {"codec": "mpeg2video", "options": {"bf": "0", "g": "6", "qmax": "2"}},
    "h264.mpg": {"codec": "libx264"},
    "mkv": {},
    "webm": {"codec": "libvpx"},
    "avi": {"codec": "mpeg4", "options": {"qmax": "2"}},
    "h264": {},
}


@pytest.mark.parametrize("suffix", RESTARTING)
def test_where_timestamps_restart_the_order_is_that_of_the_file(tmp_path, suffix):
    first = clips.render(tmp_path / f"a.{suffix}", clips.greys(12), **RESTARTING[suffix]).read_bytes()
    second = clips.render(tmp_path / f"b.{suffix}", clips.greys(30)[12:], **RESTARTING[suffix]).read_bytes()
    assert indices(first + second) == list(range(30))
    some, _ = decode_video(first + second, lambda total: [2, 13, 29])
    assert [clips.index_of(frame) for frame in some] == [2, 13, 29]


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "avi", "mov"])
def test_a_negative_start_hides_nothing_but_what_an_edit_list_does(tmp_path, suffix):
    pts = [number - 4 for number in range(20)]
    path = clips.render(tmp_path / f"clip.{suffix}", clips.greys(20), pts=pts, codec="mpeg4", options={"qmax": "2"})
    found = indices(path)
    assert found == list(range(20))[-len(found) :]
    assert len(found) in (16, 20)


# --- what is no file


def refused_at_once(path, cause):
    for call in (lambda: decode_video(path, range), lambda: check_video(path)):
        with pytest.raises(VideoDecodeError, match=cause) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(path))


def test_what_is_no_file_is_never_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link.mp4").symlink_to("pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "gone.mp4").symlink_to("nothing.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with socket.socket(socket.AF_UNIX) as listener, monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        listener.bind("socket.mp4")
        patch.setattr("builtins.open", lambda path, *args, **kwargs: pytest.fail(f"{path} was opened"))
        for name in ("pipe.mp4", "link.mp4", "socket.mp4", "/dev/zero", "/dev/null", "/dev/tty"):
            refused_at_once(name, "is a pipe, socket or device" if os.path.exists(name) else "no such file")
        refused_at_once("folder.mp4", "is a folder")
        refused_at_once("loop.mp4", "cannot be opened")
        refused_at_once("gone.mp4", "no such file")
        refused_at_once("/proc/kmsg" if os.path.exists("/proc/kmsg") else "/proc/self/status", "is empty")


def test_links_to_files_are_files(tmp_path):
    clip = clips.b_frames(tmp_path / "clip.mp4")
    (tmp_path / "a.mp4").symlink_to("clip.mp4")
    (tmp_path / "b.mp4").symlink_to("a.mp4")
    assert indices(tmp_path / "b.mp4") == indices(clip)


# --- files from the field


def test_field_files(shared):
    folder = shared / "faults" / "files"
    assert decode_video(folder / "h264_yuv420p.mp4", range)[0].shape == (30, 96, 128, 3)
    data = (folder / "cat_pcrjump.ts").read_bytes()
    joined = frames_of(data)
    assert joined.shape == (60, 96, 128, 3)
    for half in (data[: len(data) // 2], data[len(data) // 2 :]):
        np.testing.assert_array_equal(frames_of(half), joined[:30])
    np.testing.assert_array_equal(joined[30:], joined[:30])
    two, _ = decode_video(folder / "two_video_default2.mp4", range)
    assert two.shape == (30, 96, 128, 3)
    wide, info = decode_video(folder / "sar16_9.mp4", range)
    assert wide.shape == (15, 96, 128, 3)
    assert (info.height, info.width) == (96, 128)
