"""A stopped epoch that is gone on with in other batches, by other processes, or with other clips."""

import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from same_runs import STEPS, arguments, checkpoint, logged
from small import complaint, motion_folder

from vidprism_cli import main
from vidprism_hf import VidPrismLightningModule
from vidprism_hf.data.loading import dataset
from vidprism_hf.data.loading.dataset import ClipSampler
from vidprism_hf.data.loading.position import go_on

CLIPS = 2 * STEPS


def keys(clips: int, rank: int, world: int, batch_size: int, start: int = 0, end: int | None = None, epoch: int = 3):
    """The clips that a process gets of an epoch's batches from start to end, but those that do not count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "rank_and_world", lambda: (rank, world))
        sampler = ClipSampler(clips, training=True, batch_size=batch_size)
        sampler.begin(epoch, start * batch_size)
        found = list(sampler)[: None if end is None else (end - start) * batch_size]
        return [key[1] for key in found if len(key) == 2]


@settings(deadline=None, max_examples=200)
@given(st.integers(4, 40), *[st.integers(1, 4)] * 4, st.floats(0, 1))
def test_every_clip_of_the_epoch_is_trained_on(clips, world, batch_size, now_world, now_batch_size, share):
    """Once, wherever that is said, but for the few that come again at the end of an epoch."""
    of_each = -(-clips // world)
    batches = round(share * -(-of_each // batch_size))
    before = {"processes": world, "batch_size": batch_size, "seed": 0}
    now = {"processes": now_world, "batch_size": now_batch_size, "seed": 0}
    left_out, said, exact = go_on(batches, before, now, clips, ("processes", "batch_size"))
    assert bool(said) == (batches > 0 and before != now)
    had = [key for rank in range(world) for key in keys(clips, rank, world, batch_size, end=batches)]
    rest = [key for rank in range(now_world) for key in keys(clips, rank, now_world, now_batch_size, left_out)]
    assert set(had) | set(rest) == set(range(clips))
    again = len(had) + len(rest) - clips
    assert exact == (again == 0)
    if not exact:
        assert f"so that {again} of" in said
        assert again < now_world * now_batch_size


def test_another_order_is_said():
    before, now = {"processes": 1, "batch_size": 2, "seed": 0}, {"processes": 1, "batch_size": 2, "seed": 3}
    batches, said, exact = go_on(2, before, now, 10, ("processes", "batch_size"))
    assert (batches, exact) == (2, False)
    assert "after 4 of the epoch's 10 videos, but in another order" in said
    assert said.endswith("(data.seed 0, now 3)")
    assert go_on(0, before, now, 10, ()) == (0, "", True)


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A run that was stopped after two batches of its second epoch, and its clips: `run` and `clips` of a folder."""
    folder = tmp_path_factory.mktemp("stopped")
    source, whole = motion_folder(folder / "clips", train=CLIPS // 2), VidPrismLightningModule.training_step

    def step(module, batch, batch_idx):
        if (module.current_epoch, batch_idx) == (1, 1):
            signal.raise_signal(signal.SIGTERM)
        return whole(module, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VidPrismLightningModule, "training_step", step)
        with pytest.raises(SystemExit):
            main(arguments(source, folder / "run"))
    return folder


@pytest.fixture
def stopped(stopped_run, tmp_path) -> Path:
    return Path(shutil.copytree(stopped_run, tmp_path / "stopped"))


@pytest.fixture
def seen(monkeypatch):
    """The clips of each training batch."""
    found, whole = [], VidPrismLightningModule.training_step

    def step(module, batch, batch_idx):
        found.append(batch["clip_index"].tolist())
        return whole(module, batch, batch_idx)

    monkeypatch.setattr(VidPrismLightningModule, "training_step", step)
    return found


def order() -> list[int]:
    """The clips of the second epoch."""
    return keys(CLIPS, 0, 1, 1, epoch=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "begins", "words"),
    [
        (1, 4, "Resuming after 4 of the epoch's 10 videos, divided differently (data.batch_size 2, now 1)"),
        (3, 3, "Resuming after 3 of the epoch's 10 videos, so that 1 of them are repeated (data.batch_size 2, now 3)"),
    ],
    ids=["smaller", "larger"],
)
def test_other_batches_go_on_at_the_same_clip(stopped, seen, capsys, recwarn, batch_size, begins, words):
    run = stopped / "run"
    last = f"--resume={run / 'checkpoints' / 'last.ckpt'}"
    before = checkpoint(run)["global_step"]
    words_of_run = arguments(stopped / "clips", run, last, f"--data.batch_size={batch_size}")
    assert main(words_of_run) == 0
    said = capsys.readouterr().out.splitlines() + [str(warning.message) for warning in recwarn]
    assert words in said
    rest = order()[begins:]
    assert seen == [rest[start : start + batch_size] for start in range(0, len(rest), batch_size)]
    after = checkpoint(run)
    assert after["global_step"] == before + len(seen)
    assert after["VideoDataModule"]["epoch"] == 2
    assert (after["global_step"] - 1, "val/top1") in logged(run), "the end of the epoch was validated"


@pytest.mark.slow
def test_other_clips_and_labels_are_one_line(stopped, capsys):
    words = arguments(stopped / "clips", stopped / "run", f"--resume={stopped / 'run' / 'checkpoints' / 'last.ckpt'}")
    growing, source = stopped / "clips" / "train" / "growing", f"data.source {stopped / 'clips'}: "
    advice = "restore them to resume, or start fresh with --resume none, which keeps the folder"
    (growing / "0.mp4").rename(growing / "new.mp4")
    assert main(words) == 1
    line = complaint(capsys)
    assert f"{source}the training videos (the same number) have changed since the run stopped; {advice}" in line
    shutil.copy(growing / "new.mp4", growing / "0.mp4")
    assert main(words) == 1
    assert f"{source}the training videos (10, now 11) have changed" in complaint(capsys)
    (growing / "new.mp4").unlink()
    for split in ("train", "val"):
        shutil.copytree(stopped / "clips" / split / "growing", stopped / "clips" / split / "waving")
    assert main(words) == 1
    assert f"{source}the labels (new: waving) have changed" in complaint(capsys)


def test_the_place_in_a_stream():
    """Its order is another for other readers."""
    before = {"processes": 2, "batch_size": 4, "seed": 0, "num_workers": 2}
    batches, said, exact = go_on(3, before, before | {"processes": 1, "num_workers": 3}, 100, ())
    assert (batches, exact) == (6, False)
    assert said.endswith("(processes 2, now 1, data.num_workers 2, now 3)")
    assert go_on(3, before, before, 100, ()) == (3, "", True)
