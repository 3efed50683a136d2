"""Checkpoint files: whole or not there, the one before kept, every altered byte found, nothing run on reading."""

import pickle
import random
import resource
from pathlib import Path

import pytest
import torch

from vidprism_hf.errors import UserError
from vidprism_hf.training.checkpoint.files import SafeCheckpointIO, damage, read_checkpoint


def content(step: int = 1) -> dict:
    weights = {"w": torch.arange(40.0) + step, "bad \udce9 name": torch.ones(2)}
    return {"state_dict": weights, "optimizer_states": [{"lr": 0.1}], "loops": {}, "global_step": step}


def save(folder: Path, step: int, name: str = "last.ckpt") -> Path:
    SafeCheckpointIO().save_checkpoint(content(step), folder / name)
    return folder / name


def step_of(path: Path) -> int:
    return read_checkpoint(path)["global_step"]


def same(found: dict) -> bool:
    tensors = (found.pop("state_dict"), content()["state_dict"])
    plain = {name: value for name, value in content().items() if name != "state_dict"}
    return found == plain and all(torch.equal(*pair) for pair in zip(*(each.values() for each in tensors), strict=True))


def test_the_one_before_is_kept(tmp_path):
    last = save(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    for step in (2, 3):
        save(tmp_path, step)
        assert (step_of(last), step_of(tmp_path / "previous.ckpt")) == (step, step - 1)
    save(tmp_path, 4, "best.ckpt")
    save(tmp_path, 5, "best.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_each_altered_byte_is_found_or_changes_nothing(tmp_path):
    """zip archives have bytes that nobody reads: padding, dates."""
    path, draw, found = save(tmp_path, 1), random.Random(0), 0
    whole = path.read_bytes()
    for place in range(draw.randrange(6), len(whole), 6):
        altered = bytearray(whole)
        altered[place] ^= 1 << draw.randrange(8)
        path.write_bytes(altered)
        try:
            assert same(read_checkpoint(path)), place
        except UserError:
            found += 1
    assert found > len(whole) / 18


def test_each_cut_is_found(tmp_path):
    path = save(tmp_path, 1)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert damage(path).startswith("is cut or altered")


def test_a_file_that_cannot_be_written_leaves_the_others(tmp_path):
    last = save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        with pytest.raises(UserError, match=r"last\.ckpt: cannot be written .*make room"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert step_of(last) == 1


class Trap:
    def __reduce__(self):
        return (print, ("run",))


def test_nothing_is_run(tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    torch.save(content() | {"trap": Trap()}, path)
    with pytest.raises(UserError, match="is not a run's checkpoint"):
        read_checkpoint(path)
    for weights_only in (None, False, True):
        with pytest.raises(pickle.UnpicklingError):
            SafeCheckpointIO().load_checkpoint(path, weights_only=weights_only)
    assert capsys.readouterr().out == ""
