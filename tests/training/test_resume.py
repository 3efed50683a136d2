"""`resume: auto`: stopped and gone on with is the same as run at once; and which run is gone on with."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from same_runs import STEPS, arguments, assert_same_runs, checkpoint
from small import complaint, files_of, motion_folder

from vidprism_cli import main
from vidprism_hf import VidPrismLightningModule
from vidprism_hf.data import VideoDataModule
from vidprism_hf.errors import UserError
from vidprism_hf.training import run as finetune
from vidprism_hf.training.checkpoint import callback as safeguard
from vidprism_hf.training.checkpoint.files import SafeCheckpointIO
from vidprism_hf.training.checkpoint.resume import Start, begin

pytestmark = pytest.mark.slow
TRAINING, VALIDATION = "training_step", "validation_step"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return motion_folder(tmp_path_factory.mktemp("data") / "clips", train=5)


@pytest.fixture(scope="module")
def whole_run(source, tmp_path_factory):
    """Runs that nothing stops, one for each tuple of settings."""
    runs: dict[tuple[str, ...], Path] = {}

    def run(*more: str) -> Path:
        if more not in runs:
            runs[more] = tmp_path_factory.mktemp("whole") / "run"
            assert main(arguments(source, runs[more], *more)) == 0
        return runs[more]

    return run


@pytest.fixture
def stop(monkeypatch):
    """Runs until SIGTERM comes in the middle of a step or a batch of validation."""

    def run(words: list[str], step: str, epoch: int, batch: int) -> None:
        whole, sent = getattr(VidPrismLightningModule, step), []

        def watched(module, examples, batch_idx):
            here = (module.current_epoch, batch_idx) == (epoch, batch) and not module.trainer.sanity_checking
            if here and not sent:
                sent.append(signal.raise_signal(signal.SIGTERM))
            return whole(module, examples, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(VidPrismLightningModule, step, watched)
            with pytest.raises(SystemExit) as ended:
                main(words)
        assert ended.value.code == 128 + signal.SIGTERM

    return run


@pytest.fixture(scope="module")
def stopped_run(source, tmp_path_factory):
    """A run that was stopped in its second epoch: last.ckpt, previous.ckpt, best.ckpt. To be copied."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop.__wrapped__(patch)(arguments(source, output, "--checkpoint.every_n_steps=1"), TRAINING, 1, 1)
    return output


@pytest.fixture
def stopped(stopped_run, tmp_path) -> Path:
    return Path(shutil.copytree(stopped_run, tmp_path / "run"))


def begin_again(output: Path, resume="auto", **changes):
    """What `begin` makes of the folder, the settings being those of the run but for some."""
    settings = yaml.safe_load((output / "config.yaml").read_text())
    for name, value in changes.items():
        section, _, key = name.partition("__")
        settings[section][key] = value
    return begin(output, resume, settings)


ACCUMULATED = "--trainer.accumulate_grad_batches=2"
OFTEN, SELDOM = "--trainer.val_check_interval=0.4", "--trainer.check_val_every_n_epoch=2"
FROZEN = ("--model.freeze_backbone=true", "--data.train_views=1", "--data.mixup_alpha=0")


@pytest.mark.parametrize(
    ("more", "where", "left"),
    [
        ((), (TRAINING, 0, 1), (2, 0, 2)),
        ((), (VALIDATION, 0, 1), (5, 0, 5)),
        ((ACCUMULATED,), (TRAINING, 0, 2), (2, 0, 4)),
        ((OFTEN,), (TRAINING, 0, 1), (2, 0, 2)),
        ((ACCUMULATED, "--trainer.val_check_interval=3"), (VALIDATION, 0, 0), (2, 0, 4)),
        ((SELDOM, "--trainer.max_steps=8"), (TRAINING, 0, 4), (5, 1, 0)),
        (("--data.num_workers=2",), (TRAINING, 1, 1), (7, 1, 2)),
        (FROZEN, (TRAINING, 1, 1), (7, 1, 2)),
    ],
    ids=[
        "step",
        "validation",
        "half a window",
        "step before a validation",
        "validation in half a window",
        "end of an epoch",
        "workers",
        "fixed views",
    ],
)
def test_the_same_command_goes_on(source, whole_run, stop, tmp_path, capsys, more, where, left):
    """With the number of steps, the epoch and the batches of it that were left behind."""
    output = tmp_path / "run"
    words = arguments(source, output, *more)
    stop(words, *where)
    kept = checkpoint(output)
    assert (kept["global_step"], *list(kept["VideoDataModule"].values())[:2]) == left
    assert f"Stopped after step {left[0]}. Go on with: vidprism finetune" in capsys.readouterr().out
    assert not (output / "metrics.json").exists()
    assert main(words) == 0
    assert f"Going on with the run in {output} from step {left[0]}, epoch {left[1] + 1} " in capsys.readouterr().out
    assert_same_runs(whole_run(*more), output)
    assert {path.name for path in (output / "checkpoints").iterdir()} <= {"best.ckpt", "last.ckpt"}


@pytest.mark.parametrize(("owner", "name"), [(VidPrismLightningModule, "test_step"), (finetune, "print_usage")])
def test_a_run_that_ends_after_its_training_is_not_trained_again(source, whole_run, tmp_path, monkeypatch, owner, name):
    """In its evaluation, or when it is about to be published: that may take long."""
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments(source, output))
    trained = checkpoint(output)
    assert main(arguments(source, output)) == 0
    assert checkpoint(output)["global_step"] == trained["global_step"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (output / "metrics.json").read_text() == (whole_run() / "metrics.json").read_text()


def test_the_plain_trainer_goes_on_too(source, tmp_path):
    """Without the command line: the data module finds its place in the checkpoint."""
    import lightning as L

    seen: list[list[int]] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch["clip_index"].tolist())
            if len(seen) == 3:
                trainer.save_checkpoint(tmp_path / "third.ckpt")

    def fit(**more):
        data = VideoDataModule(str(source), processor="tiny", num_frames=8, batch_size=2, num_workers=0)
        module = VidPrismLightningModule(backbone="tiny", id2label=data.id2label, num_frames=8)
        settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(max_epochs=1, callbacks=[Watch()], default_root_dir=tmp_path, **settings)
        trainer.fit(module, datamodule=data, **more)

    fit()
    whole = seen.copy()
    seen.clear()
    fit(ckpt_path=tmp_path / "third.ckpt", weights_only=True)
    assert seen == whole[2:]


# Which run is gone on with


def test_fewer_epochs_than_a_checkpoint_has(stopped, source, capsys):
    before = files_of(stopped)
    content = torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)
    content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] = 2
    torch.save(content, stopped / "checkpoints" / "third.ckpt")
    words = arguments(source, stopped, f"--resume={stopped / 'checkpoints' / 'third.ckpt'}", "--trainer.max_epochs=1")
    assert main(words) == 1
    assert "trainer.max_epochs=1: " in (line := complaint(capsys))
    assert "is already at 2 epochs" in line
    (stopped / "checkpoints" / "third.ckpt").unlink()
    assert files_of(stopped) == before


def test_batches_that_never_end_a_step(source, tmp_path, capsys):
    assert main(arguments(source, tmp_path / "run", "--trainer.accumulate_grad_batches=0")) == 1
    assert complaint(capsys).startswith("vidprism finetune: trainer.accumulate_grad_batches=0: ")


def test_other_settings_are_told_and_not_taken_silently(stopped, source, capsys):
    before = files_of(stopped)
    words = arguments(source, stopped, "--checkpoint.every_n_steps=1", "--model.learning_rate=0.5", "--data.seed=3")
    assert main(words) == 1
    line = complaint(capsys)
    assert "model.learning_rate 0.001, now 0.5; data.seed 0, now 3" in line
    assert f"--resume {stopped / 'checkpoints' / 'last.ckpt'}" in line
    assert files_of(stopped) == before
    # Named, the checkpoint is gone on from with them.
    assert main([*words, f"--resume={stopped / 'checkpoints' / 'last.ckpt'}"]) == 0
    out = capsys.readouterr().out
    assert "Changed settings: model.learning_rate 0.001, now 0.5; data.seed 0, now 3" in out
    assert checkpoint(stopped)["global_step"] == 2 * STEPS
    assert yaml.safe_load((stopped / "config.yaml").read_text())["model"]["learning_rate"] == 0.5
    assert yaml.safe_load((stopped / "config.yaml").read_text())["resume"] == "auto"


def test_settings_that_change_no_training_are_taken(stopped):
    changes = {"data__num_workers": 7, "data__max_bad_fraction": 0.5, "trainer__log_every_n_steps": 3}
    start = begin_again(stopped, **changes)
    assert start.checkpoint == str(stopped / "checkpoints" / "last.ckpt")
    assert start.data.items() >= {"epoch": 1, "batches": 2, "bad": False}.items()
    # The order of a stream depends on its readers.
    with pytest.raises(UserError, match=r"data\.num_workers 0, now 7"):
        begin_again(stopped, data__num_workers=7, data__streaming=True)


def test_a_new_run_keeps_the_stopped_one(stopped, capsys):
    before = files_of(stopped)
    assert begin_again(stopped, "none").checkpoint is None
    assert files_of(Path(f"{stopped}.1")) == before
    assert f"The earlier run in {stopped} is kept as {stopped}.1" in capsys.readouterr().out


def test_a_new_run_goes_on_by_the_command_that_began_it(stopped, source, stop, capsys):
    """As a job does that is put back into the queue."""
    stop([*arguments(source, stopped), "--resume=none"], TRAINING, 0, 0)
    for _ in range(2):
        assert begin_again(stopped, "none").checkpoint == str(stopped / "checkpoints" / "last.ckpt")
        assert f"already started this run; to start another one, rename {stopped} first" in capsys.readouterr().out
    assert not Path(f"{stopped}.2").exists()
    assert begin_again(stopped, "none", data__seed=3).checkpoint is None
    assert Path(f"{stopped}.2").exists()


def test_a_branch_goes_on_by_the_command_that_began_it(stopped, source, stop, capsys):
    checkpoints = stopped / "checkpoints"
    words = [*arguments(source, stopped, "--checkpoint.every_n_steps=1"), f"--resume={checkpoints / 'best.ckpt'}"]
    stop(words, TRAINING, 1, 0)
    out = capsys.readouterr().out
    assert "from step 5, epoch 2 (best.ckpt)" in out
    assert f"Checkpoints after best.ckpt are moved to {checkpoints / 'aside'}" in out
    assert checkpoint(stopped)["global_step"] == 6
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "from step 6, epoch 2 (last.ckpt)" in out
    assert "already started this branch; to start from there again, move last.ckpt and previous.ckpt away" in out
    assert {path.name for path in checkpoints.iterdir()} == {"aside", "best.ckpt", "last.ckpt"}
    kept = {path.name: torch.load(path, weights_only=True)["global_step"] for path in (checkpoints / "aside").iterdir()}
    assert kept == {"last.ckpt": 7, "previous.ckpt": 6}


def test_a_branch_does_not_take_what_came_after_it(stopped, source):
    """Nor its best checkpoint: the next one is the best, however bad; and one branch that was left is kept."""
    checkpoints = stopped / "checkpoints"
    (checkpoints / "aside").mkdir()
    (checkpoints / "aside" / "of_another.ckpt").touch()
    shutil.copy(checkpoints / "last.ckpt", checkpoints / "best.ckpt")
    settings = arguments(source, stopped, "--checkpoint.every_n_steps=1", "--model.learning_rate=1e-9")
    assert main([*settings, f"--resume={checkpoints / 'previous.ckpt'}"]) == 0
    assert {path.name for path in (checkpoints / "aside").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert checkpoint(stopped, "best")["global_step"] == 2 * STEPS


def test_a_finished_run_is_kept(stopped, capsys):
    (stopped / "metrics.json").touch()
    assert begin_again(stopped).checkpoint is None
    assert f"is kept as {stopped}.1 (it is finished)" in capsys.readouterr().out


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_a_run_without_a_checkpoint_begins_again(stopped, capsys, resume):
    """In its folder, however often its job is put back into the queue; with other settings it is kept."""
    shutil.rmtree(stopped / "checkpoints")
    assert begin_again(stopped, resume) == Start(begun=resume)
    assert f"The run in {stopped} was stopped before its first checkpoint; it starts" in capsys.readouterr().out
    assert not Path(f"{stopped}.1").exists()
    assert begin_again(stopped, resume, data__seed=3).checkpoint is None
    why = "it has no checkpoint" if resume == "auto" else "asked for"
    assert f"is kept as {stopped}.1 ({why})" in capsys.readouterr().out


def test_a_finished_run_can_be_made_longer(stopped, capsys):
    (stopped / "metrics.json").touch()
    last = stopped / "checkpoints" / "last.ckpt"
    assert begin_again(stopped, str(last), trainer__max_epochs=9).checkpoint == str(last)
    assert "trainer.max_epochs 2, now 9" in capsys.readouterr().out
    assert not (stopped / "metrics.json").exists(), "it is not finished any more"


def test_a_run_in_the_current_folder(stopped, source, capsys, monkeypatch):
    """It goes on, and is not renamed: what else lies there, by its relative path, would go with it."""
    monkeypatch.chdir(stopped)
    words = arguments(source, Path("."), "--checkpoint.every_n_steps=1")
    assert main(words) == 0
    assert f"Going on with the run in {stopped}" in capsys.readouterr().out
    before = files_of(stopped)
    assert main(words) == 1
    assert complaint(capsys).endswith("; run the command from elsewhere, or choose another output")
    assert files_of(stopped) == before


def test_a_folder_that_cannot_be_renamed(stopped, monkeypatch):
    def busy(path, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(UserError, match=r"cannot be renamed to .*\.1 \(asked for; .* busy\); choose another output"):
        begin_again(stopped, "none")


def test_what_a_kill_leaves_in_a_new_folder_is_no_run(tmp_path):
    for name in (".0.tmp", "writable.tmp", ".lock"):
        (tmp_path / name).touch()
    assert begin(tmp_path, "auto", {}).checkpoint is None
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="exists and is not a run's folder"):
        begin(tmp_path, "auto", {})


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Flips a bit of a weight."""
    content = torch.load(path, mmap=True, weights_only=True)
    weight = content["state_dict"]["model.classifier.weight"].numpy().tobytes()
    whole = bytearray(path.read_bytes())
    whole[whole.index(weight) + 5] ^= 4
    path.write_bytes(whole)


@pytest.mark.parametrize("harm", [cut, flip])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(stopped, capsys, harm):
    harm(stopped / "checkpoints" / "last.ckpt")
    assert begin_again(stopped).checkpoint == str(stopped / "checkpoints" / "previous.ckpt")
    out = capsys.readouterr().out
    told = "is cut or altered" if harm is cut else "is altered (archive/data/"
    assert f"{stopped / 'checkpoints' / 'last.ckpt'} {told}" in out
    assert ": resuming from the one before" in out
    assert "from step 6, epoch 2 (previous.ckpt)" in out


def test_a_run_with_a_damaged_checkpoint_ends_the_same(stopped, source, whole_run):
    cut(stopped / "checkpoints" / "last.ckpt")
    assert main(arguments(source, stopped, "--checkpoint.every_n_steps=1")) == 0
    assert_same_runs(whole_run("--checkpoint.every_n_steps=1"), stopped)


def test_a_damaged_checkpoint_never_takes_the_place_of_a_good_one(stopped, capsys):
    folder = stopped / "checkpoints"
    cut(folder / "last.ckpt")
    begin_again(stopped)
    SafeCheckpointIO().save_checkpoint({"global_step": 7}, folder / "last.ckpt")
    assert [checkpoint(stopped, name)["global_step"] for name in ("last", "previous")] == [7, 6]


def test_the_best_checkpoint_stands_in_for_the_last_ones(stopped, capsys):
    for name in ("last", "previous"):
        cut(stopped / "checkpoints" / f"{name}.ckpt")
    assert begin_again(stopped).checkpoint == str(stopped / "checkpoints" / "best.ckpt")
    assert capsys.readouterr().out.count("resuming from the one before") == 2


def test_nothing_is_begun_where_all_checkpoints_are_damaged(stopped):
    for path in (stopped / "checkpoints").iterdir():
        path.write_bytes(b"no checkpoint")
    before = files_of(stopped)
    with pytest.raises(
        UserError, match=r"last\.ckpt is cut .*previous\.ckpt is cut .*best\.ckpt is cut .* starts fresh"
    ):
        begin_again(stopped)
    assert files_of(stopped) == before


def test_a_named_checkpoint_has_to_be_whole(stopped, tmp_path):
    last = stopped / "checkpoints" / "last.ckpt"
    shutil.copy(last, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="set output to the folder of its run"):
        begin_again(stopped, str(tmp_path / "last.ckpt"))
    flip(last)
    with pytest.raises(UserError, match=r"is altered.*--resume auto finds the last good one"):
        begin_again(stopped, str(last))
    torch.save({"state_dict": {}}, last)
    with pytest.raises(UserError, match="is not a run's checkpoint"):
        begin_again(stopped, str(last))
    with pytest.raises(UserError, match=r"nowhere\.ckpt: is not there"):
        begin_again(stopped, "nowhere.ckpt")


def test_a_damaged_best_checkpoint_is_told(source, tmp_path, capsys, monkeypatch):
    output = tmp_path / "run"
    monkeypatch.setattr(VidPrismLightningModule, "on_fit_end", lambda _: cut(output / "checkpoints" / "best.ckpt"))
    assert main(arguments(source, output)) == 0
    assert "best.ckpt is cut or altered" in capsys.readouterr().out
    assert (output / "export" / "model.safetensors").is_file()


def test_a_run_may_be_moved(stopped, source, whole_run, tmp_path):
    """Its best checkpoint is still known: a worse one does not take its place."""
    moved = stopped.rename(tmp_path / "moved")
    kept = checkpoint(moved, "best")["callbacks"]
    assert main(arguments(source, moved, "--checkpoint.every_n_steps=1")) == 0
    best = checkpoint(moved, "best")
    whole = checkpoint(whole_run("--checkpoint.every_n_steps=1"), "best")
    assert best["global_step"] == whole["global_step"]
    assert kept.keys() == best["callbacks"].keys()


# Divergence


@pytest.mark.parametrize(
    ("late", "more", "steps", "kept"),
    [(False, ["--checkpoint.every_n_steps=1"], 4, 3), (True, ["--checkpoint.every_n_steps=1"], 4, 2), (True, [], 5, 0)],
    ids=["at once", "late, but for a checkpoint", "late"],
)
def test_a_run_that_diverges_ends_with_step_clips_and_last_good_checkpoint(
    source, tmp_path, capsys, monkeypatch, late, more, steps, kept
):
    """On a GPU a step's loss is looked at a step later, or when a checkpoint is due. The fourth is lost."""
    monkeypatch.setattr(safeguard, "reads_late", lambda device: late)
    output, seen = tmp_path / "run", []
    whole = VidPrismLightningModule.training_step

    def step(module, batch, batch_idx):
        names = [module.trainer.datamodule.train_table.name(index) for index in batch["clip_index"]]
        seen.append(names)
        return whole(module, batch, batch_idx) * (float("nan") if len(seen) == 4 else 1)

    monkeypatch.setattr(VidPrismLightningModule, "training_step", step)
    assert main(arguments(source, output, *more)) == 1
    line = complaint(capsys)
    last = output / "checkpoints" / "last.ckpt"
    assert f"step 4: the loss is NaN or infinite; clips of the batch: {', '.join(seen[3])}; " in line
    assert f"last good checkpoint: {f'{last} (step {kept})' if kept else 'none'}; " in line
    assert len(seen) == steps
    if kept:
        found = checkpoint(output)
        assert found["global_step"] == kept
        assert all(torch.isfinite(value).all() for value in found["state_dict"].values())
    else:
        assert not last.exists()


def test_no_checkpoint_holds_weights_that_are_no_numbers(source, tmp_path, capsys, monkeypatch):
    """The loss of the last step is fine, and its gradient is not: nothing but a look at the weights would tell."""
    output = tmp_path / "run"

    def spoil(module):
        if module.global_step == STEPS - 1:
            module.model.classifier.weight.grad.fill_(float("inf"))

    monkeypatch.setattr(VidPrismLightningModule, "on_after_backward", spoil)
    assert main(arguments(source, output, "--trainer.max_epochs=1", "--trainer.limit_val_batches=0")) == 1
    line = complaint(capsys)
    assert "step 5: a weight is NaN or infinite after the step; clips of the batch: train/" in line
    assert "last good checkpoint: none" in line
    assert not list((output).rglob("*.ckpt*"))


def test_settings_that_make_no_sense(source, tmp_path, capsys):
    assert main(arguments(source, tmp_path / "run", "--checkpoint.every_n_steps=0")) == 1
    assert "checkpoint.every_n_steps=0: must be above 0" in complaint(capsys)
    assert not (tmp_path / "run").exists()
