"""Pushing during training: the best weights, in the background, and no failure that stops or slows the run."""

import threading
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from hub_server import Hub
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small import files_of, tiny_export

from vidprism_hf.training.push_callback import PushFailed, PushToHub

WAIT = 30


class Scored(BoringModel):
    """A model whose metric in each epoch is given."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(2, 32)))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[0], batch_idx)

    val_dataloader = train_dataloader

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.log("val/top1", torch.tensor(self.scores[self.current_epoch]))


class Pushes:
    """In place of the process that pushes: notes the epoch exported in the folder, and fails when asked."""

    def __init__(self, fail=0, gate=None):
        self.done, self.tried, self.fail, self.gate = [], [], fail, gate
        self.started = threading.Event()

    def __call__(self, folder):
        epoch = (folder / "epoch").read_text()
        self.tried.append(epoch)
        self.started.set()
        if self.gate is not None:
            assert self.gate.wait(WAIT)
        if len(self.tried) <= self.fail:
            raise PushFailed("the Hub fails at the commit")
        self.done.append(epoch)
        return f"https://hub/org/m {epoch}"

    def stop(self):
        if self.gate is not None:
            self.gate.set()


def write_epoch(trainer, module, folder: Path):
    folder.mkdir(parents=True)
    (folder / "epoch").write_text(str(trainer.current_epoch))


def fit(tmp_path, scores, pushes, export=write_epoch, callbacks=(), **settings):
    callback = PushToHub("org/m", export=export, **settings)
    callback.push = pushes
    trainer = L.Trainer(
        max_epochs=len(scores),
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[*callbacks, callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Scored(scores))
    return trainer


class Until(L.Callback):
    """Holds each epoch up until something has come, so that a test does not race with the thread."""

    def __init__(self, reached):
        self.reached = reached

    def on_train_epoch_start(self, trainer, pl_module):
        end = time.monotonic() + WAIT
        while not self.reached(trainer.current_epoch):
            assert time.monotonic() < end
            time.sleep(0.005)


def test_each_improvement_is_pushed(tmp_path, capsys):
    pushes = Pushes()
    wanted = {1: 1, 2: 2, 3: 2, 4: 3}
    fit(
        tmp_path,
        [0.1, 0.3, 0.2, 0.4],
        pushes,
        callbacks=[Until(lambda epoch: len(pushes.done) == wanted.get(epoch, 0))],
    )
    assert pushes.done == ["0", "1", "3"]
    assert list((tmp_path / "push").iterdir()) == []
    assert "Pushed: https://hub/org/m 3" in capsys.readouterr().out


def test_lower_may_be_better(tmp_path):
    pushes = Pushes()
    fit(tmp_path, [0.3, 0.4], pushes, mode="min")
    assert pushes.done == ["0"]


def test_a_slow_push_holds_nothing_up_and_the_newest_wins(tmp_path):
    gate = threading.Event()
    pushes = Pushes(gate=gate)

    class Open(L.Callback):
        def on_train_end(self, trainer, pl_module):
            gate.set()  # all epochs are over: nothing has waited for the first push

    fit(tmp_path, [0.1, 0.2, 0.3, 0.4], pushes, callbacks=[Until(lambda epoch: not epoch or pushes.tried), Open()])
    assert pushes.done == ["0", "3"]
    assert list((tmp_path / "push").iterdir()) == []


def test_the_best_of_some_epochs_is_pushed_at_their_end(tmp_path):
    pushes = Pushes()
    fit(
        tmp_path,
        [0.1, 0.3, 0.2, 0.1, 0.4],
        pushes,
        every_n_epochs=3,
        callbacks=[Until(lambda epoch: epoch < 3 or pushes.done)],
    )
    assert pushes.done == ["1", "4"]


def test_a_failure_is_told_and_tried_again_at_the_end(tmp_path, caplog):
    pushes = Pushes(fail=1)
    trainer = fit(tmp_path, [0.2, 0.1, 0.1], pushes)
    assert trainer.current_epoch == 3
    assert pushes.tried == ["0", "0"]
    assert pushes.done == ["0"]
    assert "tried again at the end" in caplog.text
    assert "the Hub fails at the commit" in caplog.text


def test_a_failure_for_ever_leaves_the_export(tmp_path, caplog):
    pushes = Pushes(fail=99)
    trainer = fit(tmp_path, [0.2, 0.1, 0.1], pushes)
    assert trainer.state.finished
    assert len(pushes.tried) == 2
    folder = tmp_path / "push" / "epoch-0"
    assert (folder / "epoch").read_text() == "0"
    assert f"the export stays: vidprism push {folder}" in caplog.text


def test_a_failed_push_is_superseded(tmp_path):
    pushes = Pushes(fail=1)
    fit(tmp_path, [0.1, 0.2], pushes, callbacks=[Until(lambda epoch: len(pushes.tried) == epoch)])
    assert pushes.tried == ["0", "1"]
    assert list((tmp_path / "push").iterdir()) == []


def test_an_export_that_fails_does_not_stop_the_run(tmp_path, caplog):
    def full_disk(trainer, module, folder):
        raise OSError(28, "No space left on device")

    pushes = Pushes()
    assert fit(tmp_path, [0.1, 0.2], pushes, export=full_disk).state.finished
    assert pushes.tried == []
    assert "No space left" in caplog.text


@pytest.mark.parametrize("scores", [[float("nan")], [float("nan"), float("nan")]])
def test_what_is_no_number_is_not_the_best(tmp_path, scores):
    pushes = Pushes()
    fit(tmp_path, scores, pushes)
    assert pushes.tried == []


def test_a_metric_that_is_not_there_is_told(tmp_path, caplog):
    fit(tmp_path, [0.1], Pushes(), monitor="val/other")
    assert "no metric val/other" in caplog.text


def test_a_run_that_is_stopped_ends_the_push(tmp_path, caplog):
    pushes = Pushes(fail=99, gate=threading.Event())

    class Fail(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                assert pushes.started.wait(WAIT)
                raise RuntimeError("out of memory")

    started = time.monotonic()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path, [0.1, 0.2, 0.3], pushes, callbacks=[Fail()])
    assert time.monotonic() - started < WAIT
    assert not [thread for thread in threading.enumerate() if thread.name == "push to the Hub"]
    assert "vidprism push" in caplog.text


def test_a_resumed_run_knows_its_best():
    callback, other = PushToHub("org/m"), PushToHub("org/m")
    callback.best = 0.5
    other.load_state_dict(callback.state_dict())
    assert other.best == 0.5


def test_a_resumed_run_pushes_what_waited_for_its_turn(tmp_path, monkeypatch):
    (tmp_path / "push" / "epoch-7").mkdir(parents=True)
    (tmp_path / "push" / "epoch-7" / "epoch").write_text("7")
    pushes, init = Pushes(), PushToHub.__init__

    def resumed(callback, *args, **settings):
        init(callback, *args, **settings)
        callback.load_state_dict({"best": 0.5, "ready": "epoch-7"})

    monkeypatch.setattr(PushToHub, "__init__", resumed)
    fit(tmp_path, [0.1, 0.2], pushes, every_n_epochs=2)
    assert pushes.done == ["7"]


def test_settings_that_make_no_sense(tmp_path):
    for wrong in ({"mode": "best"}, {"every_n_epochs": 0}):
        with pytest.raises(MisconfigurationException, match="PushToHub"):
            PushToHub("org/m", **wrong)
    with pytest.raises(MisconfigurationException, match="export is not set"):
        fit(tmp_path, [0.1], Pushes(), export=None)


def test_no_token_is_told_at_the_start(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("vidprism_hf.training.push_callback.get_token", lambda: None)
    callback = PushToHub("org/m", export=write_epoch)
    trainer = L.Trainer(default_root_dir=tmp_path, logger=False)
    callback.on_fit_start(trainer, None)
    callback._uploader.close()
    assert callback._uploader.join(WAIT)
    assert "No token" in caplog.text


# The process that pushes


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """The test Hub, and this process's environment set to it."""
    with Hub() as hub:
        for name, value in hub.environment(tmp_path / "home", hub.user("alice")).items():
            monkeypatch.setenv(name, value)
        yield hub


def fit_and_push(tmp_path, scores, repo, **settings):
    """A run that exports a tiny model of another seed each epoch."""

    def export(trainer, module, folder):
        tiny_export(folder, seed=trainer.current_epoch)

    callback = PushToHub(repo, export=export, **settings)
    trainer = L.Trainer(
        max_epochs=len(scores),
        accelerator="cpu",
        default_root_dir=tmp_path / "run",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Scored(scores))
    return callback


@pytest.mark.slow
def test_the_best_weights_come_to_the_hub(environment, tmp_path):
    environment.fault("commit", status=500)
    fit_and_push(tmp_path, [0.1, 0.4, 0.2], "alice/m", private=True)
    repo = environment.repositories["model", "alice/m"]
    files = {path: content.read() for path, content in repo.commit("main").files.items()}
    assert files["model.safetensors"] == files_of(tiny_export(tmp_path / "same", seed=1))["model.safetensors"]
    assert repo.private


@pytest.mark.slow
def test_a_push_that_is_refused(environment, tmp_path, caplog):
    fit_and_push(tmp_path, [0.1], "org/m")
    assert "Not pushed: org/m: the token of alice may not create it" in caplog.text
    assert (tmp_path / "run" / "push" / "epoch-0" / "config.json").is_file()


@pytest.mark.slow
def test_a_push_without_an_end_is_ended(environment, tmp_path, caplog):
    environment.fault("commit", hang=True, times=None)
    fit_and_push(tmp_path, [0.1], "alice/m", limit=12.0)
    assert "not done within 12 s" in caplog.text
