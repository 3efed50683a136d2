"""Pushing during training: the best weights, in the background, and no failure that stops or slows the run."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from hub_server import Hub
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from vidprism_hf.training.callbacks.push import PushFailed, PushProcess, PushToHub, push_open
from vidprism_hf.training.exporting import ExportedCheckpoint

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
            self.fail = 99
            self.gate.set()


def written(folder: Path, epoch: str) -> Path:
    """An export that knows its epoch."""
    folder.mkdir(parents=True)
    (folder / "epoch").write_text(epoch)
    return folder


def write_epoch(trainer, module, folder: Path):
    written(folder, str(trainer.current_epoch))


def trainer_of(tmp_path, epochs, callbacks, **settings):
    settings = {"enable_checkpointing": False} | settings
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def callback_of(pushes, export=write_epoch, **settings):
    callback = PushToHub("org/m", export=export, **settings)
    callback.push = pushes
    return callback


def fit(tmp_path, scores, pushes, callbacks=(), **settings):
    trainer = trainer_of(tmp_path, len(scores), [*callbacks, callback_of(pushes, **settings)])
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
    assert not (tmp_path / "push").exists()
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
    assert not (tmp_path / "push").exists()


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


def test_a_failure_for_ever_leaves_the_export(tmp_path, caplog, capsys):
    pushes = Pushes(fail=99)
    trainer = fit(tmp_path, [0.2, 0.1, 0.1], pushes)
    assert trainer.state.finished
    assert len(pushes.tried) == 2
    folder = tmp_path / "push" / "epoch-0-step-2"
    assert (folder / "epoch").read_text() == "0"
    said = f"Not pushed: the Hub fails at the commit; push it by hand: vidprism push {folder} --repo org/m"
    assert capsys.readouterr().out.splitlines() == [said]
    assert caplog.text.count("the Hub fails at the commit") == 1


def test_a_failed_push_is_superseded_and_its_cause_told_once(tmp_path, caplog):
    pushes = Pushes(fail=2)
    fit(tmp_path, [0.1, 0.2, 0.3], pushes, callbacks=[Until(lambda epoch: len(pushes.tried) == epoch)])
    assert pushes.tried == ["0", "1", "2"]
    assert not (tmp_path / "push").exists()
    assert caplog.text.count("Not pushed") == 1


def full_disk(*_):
    raise OSError(28, "No space left on device")


def mistake(*_):
    {}["licence"]


@pytest.mark.parametrize(
    ("export", "said"),
    [(full_disk, r"\[Errno 28\] No space left on device$"), (mistake, r"Traceback(.|\n)*KeyError: 'licence'$")],
)
def test_an_export_that_fails_does_not_stop_the_run(tmp_path, export, said):
    """What a person can mend is one line; a mistake of ours brings its traceback."""
    pushes = Pushes()
    kept = ExportedCheckpoint(export, dirpath=tmp_path, filename="best")
    callbacks = [kept, callback_of(pushes, export)]
    trainer = trainer_of(tmp_path, 2, callbacks, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=" not exported") as warned:
        trainer.fit(Scored([0.1, 0.2]))
    assert trainer.state.finished
    assert pushes.tried == []
    assert (tmp_path / "best.ckpt").is_file()
    messages = [str(warning.message) for warning in warned if " not exported" in str(warning.message)]
    for start in (r".*best\.ckpt is kept, but not exported: ", r".*epoch-0-step-2: not exported for a push: "):
        assert [text for text in messages if re.match(start + said, text)]


def test_an_export_that_fails_without_being_expected_fails_a_test(tmp_path):
    """So that a mistake in what an export holds is not lost among the warnings of a run (setup.cfg)."""
    with pytest.raises(UserWarning, match="KeyError: 'licence'"):
        fit(tmp_path, [0.1], Pushes(), export=mistake)


def test_after_an_export_that_failed_the_next_need_not_beat_it(tmp_path):
    def fails_once(trainer, module, folder):
        if trainer.current_epoch == 1:
            full_disk()
        write_epoch(trainer, module, folder)

    pushes = Pushes()
    until = Until(lambda epoch: len(pushes.done) == {0: 0, 3: 2, 4: 2}.get(epoch, 1))
    with pytest.warns(UserWarning, match="epoch-1-step-4: not exported"):
        fit(tmp_path, [0.1, 0.9, 0.4, 0.3], pushes, export=fails_once, callbacks=[until])
    assert pushes.done == ["0", "2"]


@pytest.mark.parametrize("scores", [[float("nan")], [float("nan"), float("nan")]])
def test_what_is_no_number_is_not_the_best(tmp_path, scores):
    pushes = Pushes()
    fit(tmp_path, scores, pushes)
    assert pushes.tried == []


def test_a_metric_that_is_not_there_is_told(tmp_path, caplog):
    fit(tmp_path, [0.1], Pushes(), monitor="val/other")
    assert "no metric val/other" in caplog.text


def left(tmp_path, caplog) -> list[str]:
    """Epochs whose exports wait; there is no push any more, and for the last one it was said how to push it."""
    for thread in threading.enumerate():
        if thread.name == "push to the Hub":
            thread.join(WAIT)
            assert not thread.is_alive()
    folders = sorted((tmp_path / "push").iterdir())
    assert f"push it by hand: vidprism push {folders[-1]} --repo org/m" in caplog.text
    return [(folder / "epoch").read_text() for folder in folders]


def test_a_run_that_is_stopped_ends_the_push(tmp_path, caplog):
    pushes = Pushes(gate=threading.Event())

    class Fail(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                assert pushes.started.wait(WAIT)
                raise RuntimeError("out of memory")

    until = Until(lambda epoch: not epoch or pushes.tried)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path, [0.1, 0.2, 0.3], pushes, callbacks=[until, Fail()])
    assert pushes.tried == ["0"]
    assert left(tmp_path, caplog) == ["1"]


def test_the_final_export_is_pushed_behind_the_training_and_stays(tmp_path, capsys):
    pushes = Pushes(fail=1)
    trainer = trainer_of(tmp_path, 1, [callback_of(pushes)])
    with push_open(trainer) as publish:
        trainer.fit(Scored([0.1]))
        assert pushes.started.wait(WAIT)
        publish(written(tmp_path / "export", "whole"))
    assert pushes.done == ["whole"]
    assert capsys.readouterr().out.splitlines()[-1] == "Pushed: https://hub/org/m whole"
    assert (tmp_path / "export" / "epoch").is_file()
    assert not (tmp_path / "push").exists()


def test_a_failure_behind_the_training_ends_the_push(tmp_path, caplog):
    pushes = Pushes(gate=threading.Event())
    trainer = trainer_of(tmp_path, 1, [callback_of(pushes)])

    def whole_run():
        with push_open(trainer):
            trainer.fit(Scored([0.1]))
            assert pushes.started.wait(WAIT)
            full_disk()

    with pytest.raises(OSError, match="No space left"):
        whole_run()
    assert left(tmp_path, caplog) == ["0"]


def test_ctrl_c_while_the_end_waits_for_the_push(tmp_path, caplog):
    pushes = Pushes(gate=threading.Event())
    trainer = trainer_of(tmp_path, 1, [callback_of(pushes, export=lambda *_: full_disk())])

    def press():
        assert pushes.started.wait(WAIT)
        time.sleep(0.05)  # not while the lines of the test run
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with push_open(trainer) as publish:
        with pytest.warns(UserWarning, match="not exported"):
            trainer.fit(Scored([0.1]))
        threading.Thread(target=press).start()
        with pytest.raises(SystemExit) as ended:
            publish(written(tmp_path / "export", "whole"))
    assert ended.value.code == 1
    assert f"vidprism push {tmp_path / 'export'} --repo org/m" in caplog.text
    assert (tmp_path / "export" / "epoch").is_file()


def test_a_resumed_run_pushes_only_what_is_better_than_before(tmp_path):
    def run(scores, pushes, resume=None):
        last = ModelCheckpoint(dirpath=tmp_path / "checkpoints", filename="last", enable_version_counter=False)
        trainer = trainer_of(tmp_path, len(scores), [last, callback_of(pushes)], enable_checkpointing=True)
        trainer.fit(Scored(scores), ckpt_path=resume, weights_only=True)

    before, after = Pushes(), Pushes()
    run([0.5], before)
    run([0.5, 0.3, 0.5, 0.6, 0.4], after, resume=tmp_path / "checkpoints" / "last.ckpt")
    assert (before.done, after.done) == (["0"], ["3"])
    written(tmp_path / "push" / "epoch-9-step-9", "left")  # by a run that was killed
    last = Pushes()
    run([0.5, 0.3, 0.5, 0.6, 0.4, 0.1], last, resume=tmp_path / "checkpoints" / "last.ckpt")
    assert last.done == ["left"]


def test_settings_that_make_no_sense(tmp_path):
    for wrong in ({"mode": "best"}, {"every_n_epochs": 0}):
        with pytest.raises(MisconfigurationException, match="PushToHub"):
            PushToHub("org/m", **wrong)
    with pytest.raises(MisconfigurationException, match="export is not set"):
        fit(tmp_path, [0.1], Pushes(), export=None)


def test_a_resumed_run_takes_over_what_a_killed_one_left(tmp_path, caplog):
    def left_behind():
        for number, epoch in enumerate(("1", "2")):
            os.utime(written(tmp_path / "push" / f"epoch-{epoch}-step-{epoch}", epoch), (number, number))

    def run(scores, best):
        pushes = Pushes()
        callback = callback_of(pushes)
        if best is not None:
            callback.load_state_dict({"best": best})
        trainer_of(tmp_path, len(scores), [callback]).fit(Scored(scores))
        return pushes.done

    left_behind()
    assert run([0.1], best=0.5) == ["2"]
    assert not (tmp_path / "push").exists()
    assert f"Not pushed before: {tmp_path / 'push' / 'epoch-2-step-2'}; tried again at the end" in caplog.text
    left_behind()
    assert run([0.6], best=0.5) == ["0"]  # which is newer
    assert not (tmp_path / "push").exists()
    left_behind()
    assert run([0.6], best=None) == ["0"]  # a run of its own lets them lie
    assert sorted(path.name for path in (tmp_path / "push").iterdir()) == ["epoch-1-step-1", "epoch-2-step-2"]


def test_commits_tell_the_epoch_and_the_score(tmp_path, monkeypatch):
    commands = []

    class Answered:
        returncode = 0

        def __init__(self, command, **_):
            commands.append(command)

        def communicate(self, timeout):
            return "https://hub/org/m 1", ""

    monkeypatch.setattr("vidprism_hf.training.callbacks.push.subprocess.Popen", Answered)
    callback = PushToHub("org/m", export=write_epoch)
    trainer = trainer_of(tmp_path, 2, [callback, Until(lambda epoch: len(commands) == epoch)])
    with push_open(trainer) as publish:
        trainer.fit(Scored([0.25, 0.5]))
        trainer.callback_metrics["test/top1"] = torch.tensor(0.75)
        publish(written(tmp_path / "export", "whole"))
    messages = [command[command.index("--message") + 1] for command in commands]
    first, *_, last = messages
    assert first == "Epoch 1, step 2: val/top1 0.2500"
    assert last == "Final export: held-out top-1 0.7500"
    assert set(messages[1:-1]) <= {"Epoch 2, step 4: val/top1 0.5000"}


def test_no_token_is_told_at_the_start(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("vidprism_hf.training.callbacks.push.get_token", lambda: None)
    callback = PushToHub("org/m", export=write_epoch)
    callback.on_fit_start(L.Trainer(default_root_dir=tmp_path, logger=False), None)
    assert "No token" in caplog.text


@pytest.mark.slow
def test_a_process_without_an_end_is_ended(exported, tmp_path, monkeypatch):
    with Hub() as hub:
        for name, value in hub.environment(tmp_path / "home", hub.user("alice")).items():
            monkeypatch.setenv(name, value)
        hub.fault("any", hang=True, times=None)
        with pytest.raises(PushFailed, match="not done within 1 s"):
            PushProcess(["--repo", "alice/m"], limit=1.0)(exported)


@pytest.mark.slow
def test_what_a_push_notes_is_told_once(exported, tmp_path, monkeypatch, caplog):
    """Of a repository with a person's README: the new weights stand under a card that is not theirs."""
    there = tmp_path / "there"
    there.mkdir()
    (there / "README.md").write_text("# All my own\n")
    with Hub() as hub:
        for name, value in hub.environment(tmp_path / "home", hub.user("alice")).items():
            monkeypatch.setenv(name, value)
        hub.add_model("alice/m", there)
        push = PushProcess(["--repo", "alice/m"], limit=300)
        assert [push(exported), push(exported)] == [f"{hub.url}/alice/m {hub_head(hub)}"] * 2
    (told,) = (record.message for record in caplog.records if "note" in record.message)
    assert "a person's on the Hub, and stays as it is" in told


def hub_head(hub):
    return hub.repositories["model", "alice/m"].commit("main").oid
