"""The demo: real clips, reproducible, and told apart by the order of their frames alone."""

import numpy as np
import pytest

from vidprism_hf.data import DEMO_CLASSES, DataError, demo_folder, render_demo, scan_folder
from vidprism_hf.data.sources.demo import DEMO_PAIRS, HEIGHT, WIDTH, demo_frames, write_clip
from vidprism_hf.model import decode_video

TRAIN, VAL = 40, 24


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Decoded frames of a rendered demo: {(split, label): [(T, H, W, 3), ...]}."""
    root = tmp_path_factory.mktemp("demo") / "clips"
    render_demo(root, seed=0, train_per_class=TRAIN, val_per_class=VAL)
    splits = scan_folder(root)
    decoded = {}
    for split, table in (("train", splits.train), ("val", splits.val)):
        for index in range(len(table)):
            frames, _ = decode_video(table.video(index), range)
            decoded.setdefault((split, splits.id2label[int(table.labels[index])]), []).append(frames)
    return decoded


def test_layout_and_shapes(clips):
    assert {label for _, label in clips} == set(DEMO_CLASSES)
    assert {len(clips[key]) for key in clips if key[0] == "train"} == {TRAIN}
    assert {len(clips[key]) for key in clips if key[0] == "val"} == {VAL}
    shapes = {frames.shape for videos in clips.values() for frames in videos}
    assert {shape[1:] for shape in shapes} == {(HEIGHT, WIDTH, 3)}
    assert 16 <= min(shape[0] for shape in shapes) < max(shape[0] for shape in shapes) <= 28


def test_classes_are_sorted_pairs():
    assert len(DEMO_CLASSES) == 2 * len(DEMO_PAIRS) >= 8
    assert list(DEMO_CLASSES) == sorted(DEMO_CLASSES)


def test_coding_keeps_the_pictures(clips):
    drawn = demo_frames("growing", seed=0, split="train", number=3)
    coded = clips["train", "growing"][3]
    assert np.abs(coded.mean(axis=(1, 2)) - drawn.mean(axis=(1, 2))).max() < 3


def test_coding_does_not_mark_the_direction_of_time(tmp_path):
    frames = demo_frames("moving_right", seed=0, split="train", number=0)
    write_clip(tmp_path / "forth.mp4", frames, 25)
    write_clip(tmp_path / "back.mp4", frames[::-1], 25)
    forth, _ = decode_video(tmp_path / "forth.mp4", range)
    back, _ = decode_video(tmp_path / "back.mp4", range)
    np.testing.assert_array_equal(forth, back[::-1])


def track(frames):
    """Centre x, centre y and spread of what differs from the clip's median picture, (T, 3)."""
    video = frames[:, ::2, ::2].astype(np.float32)
    moving = np.abs(video - np.median(video, axis=0)).sum(-1) > 60
    area = moving.sum((1, 2)) + 1e-3
    y, x = 2 * np.mgrid[0 : video.shape[1], 0 : video.shape[2]]
    return np.stack([(moving * x).sum((1, 2)) / area, (moving * y).sum((1, 2)) / area, np.sqrt(area)], axis=1)


def contrast(frames):
    """How far the pixels of each frame are from the frame's usual colour, (T,): more for a larger object."""
    pixels = frames[:, ::2, ::2].reshape(len(frames), -1, 3).astype(np.float32)
    return np.linalg.norm(pixels - np.median(pixels, axis=1, keepdims=True), axis=2).mean(1)


def bag_features(frames):
    """What a bag of frames tells: pictures and tracks under statistics that no order enters."""
    cells = frames.reshape(len(frames), 8, HEIGHT // 8, 8, WIDTH // 8, 3)
    small = cells.mean(axis=(2, 4, 5)).reshape(len(frames), -1)
    values = np.concatenate([small / 32, track(frames) / 8, contrast(frames)[:, None] / 32], axis=1)
    return np.concatenate([values.mean(0), values.std(0), values.min(0), values.max(0)])


def order_features(frames):
    """What the order tells: where the object goes, which way it turns, whether it grows."""
    x, y, _ = (track(frames) - track(frames).mean(0)).T
    time = np.linspace(-1, 1, len(frames))
    turning = (x[:-1] * y[1:] - x[1:] * y[:-1]).mean()
    growing = (time * contrast(frames)).mean()
    return np.array([(time * x).mean() / 5, (time * y).mean() / 5, turning / 20, growing / 5])


def pair_accuracy(clips, features):
    """Held-out accuracy of ridge classifiers between opposite classes, one value a pair."""
    accuracies = []
    for pair in DEMO_PAIRS:
        x, y = {}, {}
        for split in ("train", "val"):
            rows = [(features(f), sign) for label, sign in zip(pair, (-1, 1), strict=True) for f in clips[split, label]]
            x[split] = np.stack([np.append(row, 1) for row, _ in rows])
            y[split] = np.array([sign for _, sign in rows])
        gram = x["train"].T @ x["train"] + 10 * np.eye(x["train"].shape[1])
        weights = np.linalg.solve(gram, x["train"].T @ y["train"])
        accuracies.append(np.mean(np.sign(x["val"] @ weights) == y["val"]))
    return accuracies


def test_a_bag_of_frames_does_not_tell_opposite_motions(clips):
    accuracies = pair_accuracy(clips, bag_features)
    # 192 clips: three standard errors of a coin are 0.11.
    assert abs(np.mean(accuracies) - 0.5) < 0.11, accuracies


def test_the_order_of_frames_tells_opposite_motions(clips):
    accuracies = pair_accuracy(clips, order_features)
    assert min(accuracies) > 0.9, accuracies


def test_seed_reproduces_the_files(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        render_demo(tmp_path / name, seed=seed, train_per_class=1, val_per_class=1)
    names = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*.mp4"))]
    assert len(names) == 2 * len(DEMO_CLASSES)
    first, same, other = ([(tmp_path / n / name).read_bytes() for name in names] for n in "abc")
    assert first == same
    assert not set(first) & set(other)
    assert len(set(first)) == len(first)  # the splits share no clip


def test_more_clips_leave_the_first_ones_as_they_are(tmp_path):
    render_demo(tmp_path / "few", train_per_class=1, val_per_class=0)
    render_demo(tmp_path / "more", train_per_class=2, val_per_class=0)
    for path in (tmp_path / "few").rglob("*.mp4"):
        assert path.read_bytes() == (tmp_path / "more" / path.relative_to(tmp_path / "few")).read_bytes()


def test_demo_folder_renders_once_per_content(tmp_path):
    folder = demo_folder(tmp_path, seed=0, train_per_class=1, val_per_class=1)
    marker = folder / "train" / "growing" / "000.mp4"
    time = marker.stat().st_mtime_ns
    assert demo_folder(tmp_path, seed=0, train_per_class=1, val_per_class=1) == folder
    assert marker.stat().st_mtime_ns == time
    assert demo_folder(tmp_path, seed=1, train_per_class=1, val_per_class=1) != folder
    assert demo_folder(tmp_path, seed=0, train_per_class=2, val_per_class=1) != folder
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vidprism_hf.data.sources.demo.write_clip", fail)
    with pytest.raises(KeyboardInterrupt):
        demo_folder(tmp_path)
    assert list((tmp_path / "demo_clips").iterdir()) == []


def test_unwritable_root_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/demo_clips.*cannot be written.*data\.root"):
        demo_folder(tmp_path / "file")


def test_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(DataError, match="exists already"):
        render_demo(tmp_path)
