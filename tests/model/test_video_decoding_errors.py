"""The decoder's errors: what cannot be decoded is refused by one line that names the file and the cause."""

import io
import os
import pickle

import av
import clips
import numpy as np
import pytest
import torch
from PIL import Image

from vidprism_hf.model.video_decoding_vidprism import VideoDecodeError, decode_video, segment_centers
from vidprism_hf.workers import CONTEXT


def every(total):
    return range(total)


@pytest.fixture
def clip(tmp_path):
    return clips.b_frames(tmp_path / "clip.mp4")


def refused(source, cause):
    """Decode what cannot be; check the form of the error, and return it."""
    with pytest.raises(VideoDecodeError, match=cause) as caught:
        decode_video(source, every)
    error = caught.value
    assert "\n" not in str(error)
    assert str(error).startswith(f"{error.source}: {error.cause}, ")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.source, copy.cause) == (
        VideoDecodeError,
        str(error),
        error.source,
        error.cause,
    )
    return error


def test_no_file(tmp_path):
    assert refused(tmp_path / "none.mp4", "no such file").source == str(tmp_path / "none.mp4")
    refused(tmp_path, "is a folder")
    refused("a\0b", "cannot be opened")
    refused("", "no such file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(clip):
    clip.chmod(0)
    refused(clip, "may not be read")


def test_empty_and_nameless_sources(tmp_path):
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", "is empty")
    assert refused(b"", "is empty").source == "<bytes, 0 bytes>"
    assert refused(b"x" * 1234, "is not a video").source == "<bytes, 1234 bytes>"
    assert refused(io.BytesIO(b"x" * 1234), "is not a video").source == "<BytesIO>"
    with open(tmp_path / "empty.mp4", "rb") as file:
        assert refused(file, "is empty").source == str(tmp_path / "empty.mp4")


def test_text_mode_and_closed_files(tmp_path, clip):
    (tmp_path / "text.mp4").write_text("hello")
    with open(tmp_path / "text.mp4") as file:
        refused(file, "is opened as text")
    refused(file, "cannot be read")


def test_what_is_no_video(tmp_path):
    refused(clips.audio_only(tmp_path / "audio.m4a"), r"no video stream \(audio only\)")
    text = tmp_path / "notes.txt"
    text.write_text("hello world\n" * 50)
    refused(text, "is a text file")
    refused(text.rename(tmp_path / "notes.mp4"), "is not a video")
    for suffix in ("png", "jpg"):
        Image.fromarray(clips.marked()).save(tmp_path / f"still.{suffix}")
        refused(tmp_path / f"still.{suffix}", "is a still image")


def test_playlists_cannot_name_other_files(tmp_path):
    clip = clips.b_frames(tmp_path / "clip.ts")
    lists = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clip}\n#EXT-X-ENDLIST\n",
        "list.txt": f"ffconcat version 1.0\nfile {clip}\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        refused(tmp_path / name, "is not a video")


def test_a_cover_picture_is_no_video(tmp_path):
    audio = clips.audio_only(tmp_path / "audio.m4a")
    with av.open(str(audio)) as source, av.open(str(tmp_path / "song.mp4"), "w") as song:
        sound = song.add_stream_from_template(source.streams.audio[0])
        cover = song.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        song.mux(cover.encode(av.VideoFrame.from_ndarray(clips.marked(), format="rgb24")))
        song.mux(cover.encode(None))
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = sound
                song.mux(packet)
    with av.open(str(tmp_path / "song.mp4")) as container:
        assert len(container.streams.video) == 1
    refused(tmp_path / "song.mp4", "no video stream")


def busy_clip(path, **kwargs):
    """A clip of coarse noise, whose pictures need so many bytes that damage hits pictures."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 12, 16, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    return clips.render(path, list(images), **kwargs)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi"])
def test_damage_is_refused(tmp_path, name):
    path = busy_clip(tmp_path / name, codec="libx264" if name.endswith("mp4") else "mpeg4")
    data = path.read_bytes()
    assert decode_video(data, every)[1].num_frames == 20
    for place in (2, 3, 4):
        start = len(data) * place // 6
        refused(data[:start] + b"\xa5" * 400 + data[start + 400 :], "damaged")


def test_a_cut_file_is_refused_or_shorter(tmp_path):
    # The index of this mp4 lies at its end, ...
    data = busy_clip(tmp_path / "clip.mp4").read_bytes()
    refused(data[: len(data) // 2], "its head or end is missing")
    # ... that of this one at its start, so that the cut falls into a frame.
    fast = {"container_options": {"movflags": "faststart"}}
    data = busy_clip(tmp_path / "fast.mp4", **fast).read_bytes()
    refused(data[: len(data) // 2], "is cut off")
    # A decoder may well make a picture of half a frame.
    data = busy_clip(tmp_path / "clip.mov", codec="mjpeg", pix_fmt="yuvj420p", **fast).read_bytes()
    refused(data[: len(data) // 2], "incomplete")
    # Matroska drops a cut block: what is left are whole frames.
    path = clips.render(tmp_path / "clip.mkv", clips.greys(30), options={"bf": "0", "g": "5"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    frames, info = decode_video(path, every)
    assert [clips.index_of(frame) for frame in frames] == list(range(info.num_frames))
    assert 0 < info.num_frames < 30


def test_absurd_sizes_are_refused(tmp_path):
    path = clips.render(tmp_path / "clip.avi", clips.greys(2), codec="ffv1")
    data, size = path.read_bytes(), (64).to_bytes(4, "little") + (48).to_bytes(4, "little")
    assert size in data
    huge = (16000).to_bytes(4, "little") * 2
    refused(data.replace(size, huge), "16000x16000 pixels")


class _Clips(torch.utils.data.Dataset):
    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return decode_video(self.paths[index], lambda total: segment_centers(total, 4))[0]


def test_errors_keep_their_class_across_loader_workers(clip, tmp_path):
    worker = {"num_workers": 1, "multiprocessing_context": CONTEXT}
    good = torch.utils.data.DataLoader(_Clips([clip, clip]), batch_size=2, **worker)
    assert next(iter(good)).shape == (2, 4, 48, 64, 3)
    bad = torch.utils.data.DataLoader(_Clips([tmp_path / "none.mp4"]), **worker)
    with pytest.raises(VideoDecodeError, match=r"none\.mp4: no such file"):
        next(iter(bad))
