"""Checkpoint files that are whole or not there: written beside, then renamed, the one before kept meanwhile.

torch.save writes a zip archive with a CRC-32 of each record. torch.load does not look at it (PyTorch builds its reader
without the check), but Python's zipfile does: a cut or altered file is found without a second file beside it.
"""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ..errors import UserError, first_line

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
UNFINISHED = ".tmp"  # ends the name of a file that is being written


@dataclass
class CheckpointSettings:
    """When last.ckpt is written, besides the ends of epochs and a stop by a signal.

    Args:
        every_minutes: Minutes between two; null leaves them out.
        every_n_steps: Optimiser steps between two; null leaves them out.
    """

    every_minutes: float | None = 15.0
    every_n_steps: int | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise UserError(f"checkpoint.{name}={value}: must be above 0, or null for none")


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a file beside, brings it to the disk and renames it; what was last.ckpt becomes previous.ckpt.

    At no moment is there no whole checkpoint, whenever the process or the machine ends.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Raises:
            UserError: If it cannot be written; the ones before stay.
        """
        path = Path(path)
        beside = path.with_name(path.name + UNFINISHED)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and path.exists():
                os.replace(path, path.with_name(PREVIOUS))
            os.replace(beside, path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of a full disk
            beside.unlink(missing_ok=True)
            raise UserError(
                f"{path}: cannot be written ({first_line(error)}); make room, then go on by the same command"
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> dict:
        """Reads a checkpoint, and runs nothing that it might hold: `weights_only` is true whatever is asked."""
        return super().load_checkpoint(path, map_location=map_location, weights_only=True)


def _sync_folder(folder: Path) -> None:
    """Brings renames to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file; None if it is whole.

    A folder is a checkpoint in the form of a strategy, such as DeepSpeed's, and is not looked into.
    """
    if path.is_dir():
        return None
    if not path.is_file():
        return "is not there"
    try:
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()
    except Exception as error:  # zipfile raises whatever it stumbles over
        return f"is cut or altered ({first_line(error)})"
    return f"is altered ({altered})" if altered else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a whole checkpoint, mapped into memory; tensors are read when they are looked at.

    Raises:
        UserError: If it is damaged or no run's checkpoint; the message has no file name.
    """
    if cause := damage(path):
        raise UserError(cause)
    if path.is_dir():
        return {}
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        content["optimizer_states"], content["loops"]
    except Exception as error:  # torch.load raises whatever its unpickler meets
        raise UserError(f"is no run's checkpoint ({type(error).__name__})") from error
    return content


class KeptCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint whose run may be moved: what it knows of its files holds for its folder, wherever that is.

    If the best one is not there any more, as where a branch begins before it, the next one is.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return os.path.join(self.dirpath, os.path.basename(path)) if path else path

        known = {here(path): score for path, score in state_dict["best_k_models"].items()}
        paths = {name: here(state_dict[name]) for name in state_dict if name.endswith("_model_path")}
        state = state_dict | paths | {"best_k_models": known, "dirpath": self.dirpath}
        if not os.path.exists(state["best_model_path"]):
            names = ("best_model_path", "best_model_score", "best_k_models", "kth_best_model_path", "kth_value")
            state |= {name: getattr(self, name) for name in names}
        super().load_state_dict(state)
