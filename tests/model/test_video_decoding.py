"""The decoder: the right frames of every kind of file, or one clear error."""

import functools
import http.server
import io
import os
import tempfile
import threading
from fractions import Fraction

import av
import clips
import numpy as np
import pytest

from vidprism_hf.model.video_decoding_vidprism import VideoDecodeError, decode_video, segment_centers


def every(total):
    return range(total)


def shown(path):
    """Which frames of a grey clip decoding shows, and what it knows of the file."""
    frames, info = decode_video(path, every)
    assert info.num_frames == len(frames)
    assert info.indices == tuple(range(len(frames)))
    assert (info.height, info.width) == frames.shape[1:3]
    return [clips.index_of(frame) for frame in frames], info


def sequential(path):
    """The plain full decode that every sampled one must equal."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)])


def render_ordinary(path, **kwargs):
    return clips.render(path, clips.greys(20), **kwargs)


KINDS = {
    "b_frames.mp4": clips.b_frames,
    "b_frames.mkv": clips.b_frames,  # states no count
    "b_frames.ts": clips.b_frames,
    "b_frames.h264": clips.b_frames,  # states no timestamps either
    "variable_rate.mp4": clips.variable_rate,
    "variable_rate.mkv": clips.variable_rate,
    "late_start.mp4": clips.late_start,
    "late_start.ts": clips.late_start,
    "two_frames_a_packet.webm": clips.packets_with_two_frames,
    "two_frames_a_packet.mp4": clips.packets_with_two_frames,
    "vp9.webm": functools.partial(render_ordinary, codec="libvpx-vp9", options={"cpu-used": "8"}),
    "gif.gif": functools.partial(render_ordinary, codec="gif", pix_fmt="rgb8"),
    "odd.mkv": lambda path: clips.render(path, clips.greys(20, 49, 63), codec="ffv1"),
    "one.mp4": lambda path: clips.render(path, clips.greys(1)),
    "gaps.avi": lambda path: clips.render(path, clips.greys(5), codec="mjpeg", pix_fmt="yuvj420p", pts=[0, 1, 4, 8, 9]),
}


# --- which frames


def test_segment_centers_are_the_middles_of_the_segments():
    assert segment_centers(8, 8).tolist() == list(range(8))
    assert segment_centers(100, 4).tolist() == [12, 37, 62, 87]
    assert segment_centers(3, 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert segment_centers(1, 3).tolist() == [0, 0, 0]
    for total in range(1, 40):
        for count in range(1, 40):
            exact = [int((Fraction(i) + Fraction(1, 2)) * total / count) for i in range(count)]
            assert segment_centers(total, count).tolist() == exact


@pytest.mark.parametrize(("total", "count"), [(0, 4), (4, 0), (-1, 4)])
def test_segment_centers_refuse_nothing(total, count):
    with pytest.raises(ValueError, match="at least one"):
        segment_centers(total, count)


@pytest.mark.parametrize("name", KINDS)
def test_frames_equal_a_sequential_decode(tmp_path, name):
    path = KINDS[name](tmp_path / name)
    frames, info = decode_video(path, every)
    expected = sequential(path)
    np.testing.assert_array_equal(frames, expected)
    indices, _ = shown(path)
    assert indices == list(range(info.num_frames))  # and they are those that were put in, in their order
    some = segment_centers(info.num_frames, 7)
    np.testing.assert_array_equal(decode_video(path, lambda total: some)[0], expected[some])


@pytest.mark.parametrize("claimed", [0, 5, 99])
def test_the_count_of_the_header_does_not_matter(tmp_path, claimed):
    path = clips.avi_with_claimed_length(tmp_path / "clip.avi", claimed)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == claimed
    assert shown(path)[1].num_frames == 12


def test_frames_that_are_never_shown_do_not_count(tmp_path):
    assert shown(clips.packets_without_frame(tmp_path / "clip.webm"))[0] == [0, 1, 3, 4, 6, 7, 9, 10]
    assert shown(clips.hidden_start(tmp_path / "clip.mp4", count=20, hidden=5))[0] == list(range(5, 20))


def test_sample_gets_the_true_count_last(tmp_path):
    fewer = clips.packets_without_frame(tmp_path / "fewer.webm")
    more = clips.packets_with_two_frames(tmp_path / "more.webm")
    hidden = clips.hidden_start(tmp_path / "hidden.mp4", count=20, hidden=5)
    for path, totals, shows in ((fewer, [12, 8], 10), (more, [6, 12], 11), (hidden, [15], 19)):
        seen = []

        def last(total, seen=seen):
            seen.append(total)
            return [total - 1]

        frames, info = decode_video(path, last)
        assert seen == totals
        assert info.indices == (totals[-1] - 1,)
        assert clips.index_of(frames[0]) == shows


def test_any_order_and_repeats(tmp_path):
    path = clips.b_frames(tmp_path / "clip.mp4")
    frames, info = decode_video(path, lambda total: np.array([7, 0, 29, 7, 3]))
    assert [clips.index_of(frame) for frame in frames] == [7, 0, 29, 7, 3]
    assert info.indices == (7, 0, 29, 7, 3)
    assert frames.dtype == np.uint8
    assert frames.flags.c_contiguous


@pytest.mark.parametrize("indices", [[30], [-1], [], [0.5], [[0, 1]], None])
def test_indices_outside_the_video_are_refused(tmp_path, indices):
    path = clips.b_frames(tmp_path / "clip.mp4", count=30)
    with pytest.raises(ValueError, match=r"[Ii]ndices") as caught:
        decode_video(path, lambda total: indices)
    assert not isinstance(caught.value, VideoDecodeError)


def test_frame_rate(tmp_path):
    assert decode_video(clips.b_frames(tmp_path / "clip.mp4"), every)[1].fps == 25.0
    path = clips.render(tmp_path / "one.ts", clips.greys(1))
    assert decode_video(path, every)[1].fps is None  # the container gives no mean rate for one frame


# --- which way up, how large


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize("hflip", [False, True])
def test_frames_are_upright(tmp_path, degrees, hflip):
    path = clips.turned(tmp_path / "clip.mp4", degrees, hflip)
    frames, info = decode_video(path, every)
    expected = np.rot90(clips.marked(), degrees // 90)
    expected = expected[:, ::-1] if hflip else expected
    assert (info.height, info.width) == expected.shape[:2]
    for frame in frames:
        np.testing.assert_allclose(frame.astype(int), expected.astype(int), atol=3)


def test_a_change_of_size_is_scaled_to_the_first(tmp_path):
    parts = [
        clips.render(tmp_path / f"{size}.h264", clips.greys(3, size, size), options={"bf": "0"}) for size in (48, 96)
    ]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    indices, info = shown(path)
    assert indices == [0, 1, 2, 0, 1, 2]
    assert (info.height, info.width) == (48, 48)
    # Also where no frame before the change is wanted.
    assert decode_video(path, lambda total: [5])[0].shape == (1, 48, 48, 3)


# --- kinds of source


@pytest.fixture
def clip(tmp_path):
    return clips.b_frames(tmp_path / "clip.mp4")


def test_paths_bytes_and_file_objects_give_the_same_frames(clip):
    expected = sequential(clip)
    data = clip.read_bytes()

    class Pipe:
        """A file object that can only be read."""

        def __init__(self):
            self.file = io.BytesIO(data)

        def read(self, size=-1):
            return self.file.read(size)

    with open(clip, "rb") as file, tempfile.TemporaryFile() as nameless:
        nameless.write(data)
        file.seek(1000)
        for source in (str(clip), clip, data, bytearray(data), io.BytesIO(data), file, nameless, Pipe()):
            np.testing.assert_array_equal(decode_video(source, every)[0], expected)
        assert not file.closed
    with pytest.raises(TypeError, match="int"):
        decode_video(3, every)


@pytest.fixture
def server(tmp_path):
    """A file server on the loopback; yields its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path.startswith("/short"):  # promises more than it sends
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                self.wfile.write(b"\0" * 100)
            else:
                super().do_GET()

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_urls(server, clip):
    np.testing.assert_array_equal(decode_video(f"{server}/clip.mp4?key=secret", every)[0], sequential(clip))
    with pytest.raises(VideoDecodeError, match="404") as caught:
        decode_video(f"{server}/none.mp4?key=secret", every)
    assert caught.value.source == f"{server}/none.mp4"
    assert "secret" not in str(caught.value)
    for url in (f"{server}/short.mp4", "http://[broken/clip.mp4", "http://127.0.0.1:1/clip.mp4"):
        with pytest.raises(VideoDecodeError, match="cannot be downloaded"):
            decode_video(url, every)


def test_names_that_libav_would_read_as_protocols(tmp_path, clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mp4", "a%03d.mp4", "caf\u00e9 \u2603.mp4"):
        os.link(clip, name)
        assert decode_video(name, every)[1].num_frames == 30


def test_titles_in_any_encoding(tmp_path):
    with av.open(str(tmp_path / "clip.avi"), "w") as container:
        container.metadata["title"] = "cafX title"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = 64, 48
        container.mux(stream.encode(av.VideoFrame.from_ndarray(clips.grey(3), format="rgb24")))
        container.mux(stream.encode(None))
    data = (tmp_path / "clip.avi").read_bytes()
    assert b"cafX title" in data
    frames, _ = decode_video(data.replace(b"cafX title", b"caf\xe9 title"), every)
    assert clips.index_of(frames[0]) == 3


def test_containers_and_files_are_closed(clip, monkeypatch):
    opened, real_open = [], av.open

    def recording_open(*args, **kwargs):
        opened.append((args[0], real_open(*args, **kwargs)))
        return opened[-1][1]

    monkeypatch.setattr(av, "open", recording_open)
    decode_video(clip, every)
    clips_audio = clips.audio_only(clip.with_name("audio.m4a"))
    with pytest.raises(VideoDecodeError):
        decode_video(clips_audio, every)
    readers = [(file, container) for file, container in opened if hasattr(file, "read")]
    assert len(readers) == 2  # one opening each
    for file, container in readers:
        assert file.closed
        with pytest.raises(AssertionError, match="not open"):
            container.size  # noqa: B018


# --- real clips


def check_real(path):
    expected = sequential(path)
    frames, info = decode_video(path, every)
    assert np.array_equal(frames, expected), path
    indices = segment_centers(info.num_frames, 16)
    sampled, _ = decode_video(path, lambda total: segment_centers(total, 16))
    assert np.array_equal(sampled, expected[indices]), path


def real_clips(shared):
    paths = sorted(path for path in (shared / "data").rglob("*") if path.suffix in (".mp4", ".avi"))
    assert paths, f"no clips in {shared / 'data'}"
    return paths


def test_some_real_clips(shared):
    for path in real_clips(shared)[::47]:
        check_real(path)


@pytest.mark.slow
def test_every_real_clip(shared):
    for path in real_clips(shared):
        check_real(path)
