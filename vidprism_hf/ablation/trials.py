"""Finished trials of a study: one line of trials.jsonl for each trained and tested head."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Trial:
    """One trained and tested head.

    Attributes:
        correct: For each validation video, whether its class was predicted.
        parameters: Number of trainable parameters.
        seconds: Duration of training and testing.
    """

    correct: list[bool]
    parameters: int
    seconds: float

    @property
    def top1(self) -> float:
        """Accuracy on the validation videos, from 0 to 1."""
        return sum(self.correct) / len(self.correct)


Trials = dict[int | None, list[Trial]]  # seed (None where nothing is random) to one trial per fold


def read_trials(path: Path) -> dict[str, Trial]:
    """Returns the finished trials by key; skips a line that a killed process left incomplete."""
    trials = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            trial = json.loads(line)
            correct = [digit == "1" for digit in trial["correct"]]
            trials[trial["key"]] = Trial(correct, trial["parameters"], trial["seconds"])
    return trials


def append_trial(path: Path, key: str, trial: Trial) -> None:
    """Appends a finished trial in one write, on a line of its own."""
    correct = "".join(str(int(value)) for value in trial.correct)
    line = json.dumps(
        {"key": key, "correct": correct, "parameters": trial.parameters, "seconds": trial.seconds}, allow_nan=False
    )
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "ab") as file:
        file.write(b"\n" * torn + line.encode() + b"\n")
