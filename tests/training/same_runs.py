"""Runs that are compared: what they logged, what their last checkpoints hold, what they found."""

import csv
from pathlib import Path
from typing import Any

import torch
from small import run_arguments

# What tells one run from another although they are the same: places, times, and Lightning's count of validation batches
# begun, which a validation that was begun twice adds to.
OWN = ("seconds", "dirpath", "_model_path", "best_k_models", "current_score", "val_loop.batch_progress")
STEPS = 5  # in an epoch of `arguments`


def arguments(source: Path, output: Path, *more: str) -> list[str]:
    """A run with everything random: two epochs of five batches; `source` has five training clips a class."""
    settings = ("--data.batch_size=2", "--data.mixup_alpha=0.4", "--model.config.head_dropout=0.5")
    quiet = ("--trainer.log_every_n_steps=1", "--trainer.enable_model_summary=false")
    return run_arguments(source, output, *settings, *quiet, *more)


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def logged(run: Path) -> dict[tuple[int, str], str]:
    """All that was logged, by step and name; what was logged twice has to be equal."""
    found: dict[tuple[int, str], str] = {}
    for file in sorted((run / "logs").glob("csv*/metrics.csv")):
        with open(file) as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if value and name not in ("epoch", "step"):
                        assert found.setdefault((int(row["step"]), name), value) == value, (file, name)
    return found


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two nested values are not equal bit for bit."""
    if any(name in place for name in OWN):
        return []
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{place}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, pair in pairs for found in differences(*pair, f"{place}/{index}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [place]
    return [] if one == other else [f"{place}: {one!r:.80} and {other!r:.80}"]


def assert_same_runs(one: Path, other: Path) -> None:
    """Compares two finished runs: parameters, optimiser, schedule, counters, callbacks; losses; metrics."""
    found = differences(checkpoint(one), checkpoint(other))
    assert not found, found
    lines = sorted(set(logged(one).items()) ^ set(logged(other).items()))
    assert not lines, lines[:9]
    assert (one / "metrics.json").read_text() == (other / "metrics.json").read_text(), other
