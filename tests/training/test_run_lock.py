"""One run at a time in a folder."""

import errno
import fcntl
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from small import complaint, run_arguments

from vidprism_hf.cli import main
from vidprism_hf.errors import UserError
from vidprism_hf.training import run_lock
from vidprism_hf.training.run_lock import lock_path, only_run


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.1)


@contextmanager
def held(path: Path):
    """The lock as another process has it."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_second_run_leaves_the_folder_alone(motion_clips, tmp_path, capsys):
    output = tmp_path / "run"
    with held(tmp_path / "run.lock"):
        assert main(run_arguments(motion_clips, output)) == 1
        expected = f"output {output}: another run is writing it; wait for it, or choose another output"
        assert complaint(capsys) == f"vidprism finetune: {expected}"
        assert not output.exists()
        assert (tmp_path / "run.lock").exists()


def test_the_lock_goes_with_the_run_and_a_killed_ones_is_taken_over(tmp_path):
    (tmp_path / "run.lock").touch()
    for _ in range(2):
        with only_run(tmp_path / "run"), pytest.raises(UserError, match="another run"), only_run(tmp_path / "run"):
            pass
        assert not list(tmp_path.iterdir())


def test_processes_that_a_run_has_started_do_not_keep_it(tmp_path):
    """Loaders live on for seconds when their run is killed."""
    with only_run(tmp_path / "run"):
        process = subprocess.Popen(["sleep", "60"])
    try:
        with only_run(tmp_path / "run"):
            pass
    finally:
        process.kill()
        process.wait()


def test_one_folder_has_one_lock(tmp_path, monkeypatch):
    """Under all its names; in the folder where it is fixed in its place."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path / "run")
    paths = [Path("."), tmp_path / "run", tmp_path / "link", Path("../run")]
    assert {lock_path(path) for path in paths} == {tmp_path / "run.lock"}
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "run")
    assert {lock_path(path) for path in paths} == {tmp_path / "run" / ".lock"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EACCES])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys, number):
    def refuse(lock):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    if number == errno.EACCES:
        with pytest.raises(UserError, match="cannot be written"), only_run(tmp_path / "run"):
            pass
    else:
        with only_run(tmp_path / "run"):
            assert "no locks on this file system" in capsys.readouterr().out
