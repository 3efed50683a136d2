"""Atomic checkpoint files: written to a temporary file, then renamed; the previous checkpoint is kept meanwhile.

torch.save writes a zip archive with a CRC-32 of each record. torch.load ignores it (PyTorch builds its reader without
the check), but Python's zipfile checks it, so a truncated or altered file is detected without a separate checksum.
"""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ...errors import UserError, first_line

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
UNFINISHED = ".tmp"  # suffix of a file that is being written


@dataclass
class CheckpointSettings:
    """When last.ckpt is written within an epoch; it is always written at the end of epochs and on a signal.

    Args:
        every_minutes: Minutes between checkpoints; null disables them.
        every_n_steps: Optimiser steps between checkpoints; null disables them.
    """

    every_minutes: float | None = 15.0
    every_n_steps: int | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise UserError(f"checkpoint.{name}={value}: must be above 0, or null for none")


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, with fsync; the old last.ckpt becomes previous.ckpt.

    There is an intact checkpoint at every moment, even if the process or the machine dies.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Raises:
            UserError: If it cannot be written; earlier checkpoints are kept.
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
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError when the disk is full
            beside.unlink(missing_ok=True)
            raise UserError(
                f"{path}: cannot be written ({first_line(error)}); make room, then resume with the same command"
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> dict:
        """Reads a checkpoint, always with `weights_only`: a checkpoint must not run code."""
        return super().load_checkpoint(path, map_location=map_location, weights_only=True)


def _sync_folder(folder: Path) -> None:
    """Brings renames to the disk, where a folder can be opened for that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(path: Path) -> str | None:
    """Describes what is wrong with a checkpoint file; None if it is intact.

    A folder is a strategy's own format, such as DeepSpeed's, and is not checked.
    """
    if path.is_dir():
        return None
    if not path.is_file():
        return "is not there"
    try:
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()
    except Exception as error:  # zipfile may raise anything on damaged files
        return f"is cut or altered ({first_line(error)})"
    return f"is altered ({altered})" if altered else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads an intact checkpoint, memory-mapped: tensors are loaded on access.

    Raises:
        UserError: If it is damaged or not a run's checkpoint; the message has no file name.
    """
    if cause := damage(path):
        raise UserError(cause)
    if path.is_dir():
        return {}
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        content["optimizer_states"], content["loops"]
    except Exception as error:  # torch.load may raise anything on foreign files
        raise UserError(f"is not a run's checkpoint ({type(error).__name__})") from error
    return content


class KeptCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that still finds its files after the run's folder has been moved.

    If the best checkpoint is gone, for example because the run resumed from an earlier one, the next takes its place.
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
