"""Folders of evaluations: where they are, and which evaluation may be replaced."""

import json
import math
import os
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..util import atomic_write
from .figures import confusion_matrix
from .report import SHORT, Evaluation, Subject

RESULTS, CONFUSION = "evaluation.json", "confusion.png"
ELSEWHERE = "name another folder by --evaluation.output"


def evaluations_of(subject: Subject) -> Path:
    """Returns the folder of a model's evaluations.

    For a run's `export` folder this is `evaluation/` beside it, for other folders a subfolder of that by name, and for
    a model on the Hub a folder below runs/ by commit.
    """
    if not os.path.isdir(subject.model):
        commit = f"-{subject.commit[:SHORT]}" if subject.commit else ""
        return Path("runs") / (subject.model.replace("/", "--") + commit) / "evaluation"
    folder = Path(subject.model)
    if folder.name in ("", ".."):  # also `.`
        folder = folder.resolve()
    kept = folder.parent / "evaluation"
    return kept if folder.name == "export" else kept / folder.name


def check_folder(subject: Subject, output: str | None) -> None:
    """Checks before an evaluation that its results can be written.

    Raises:
        UserError: If the folder is not writable, or has another evaluation.
    """
    folder = Path(output) if output else evaluations_of(subject)
    if output:
        refuse_other(folder, subject.about)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise not_writable(folder, error) from error


def write_evaluation(evaluation: Evaluation, output: str | None = None) -> Path:
    """Writes `confusion.png` and `evaluation.json`.

    Args:
        evaluation: The results.
        output: Folder to write to; None takes one below the model's evaluations. It replaces only an evaluation with
            the same protocol, on the same data and no more videos; otherwise the name gets a number.

    Returns:
        The folder.

    Raises:
        UserError: If the folder is not writable, or `output` has another evaluation.
    """
    folder = Path(output) if output else evaluations_of(evaluation) / evaluation.folder_name
    about, clips = evaluation.about, evaluation.evaluated
    if output:
        refuse_other(folder, about, clips)
    else:
        del about["model"]  # implied by the folder
        names = (f"{folder.name}.{number}" if number else folder.name for number in count())
        folder = next(path for path in map(folder.with_name, names) if not other_content(path, about, clips))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / CONFUSION, confusion_matrix(evaluation.metrics.confusion, evaluation.labels))
        atomic_write(folder / RESULTS, evaluation.to_json().encode())
    except OSError as error:
        raise not_writable(folder, error) from error
    return folder


def not_writable(folder: Path, error: OSError) -> UserError:
    """Returns the error for a folder that cannot be created or written."""
    return UserError(f"{folder}: cannot be written ({error.strerror}); {ELSEWHERE}")


def refuse_other(folder: Path, about: dict[str, Any], evaluated: float = math.inf) -> None:
    """Checks that a folder's evaluation may be replaced.

    Raises:
        UserError: If it is a different one.
    """
    if other := other_content(folder, about, evaluated):
        raise UserError(f"{folder / RESULTS}: is {other}; {ELSEWHERE}")


def other_content(folder: Path, about: dict[str, Any], evaluated: float) -> str | None:
    """Describes how the evaluation in a folder differs; None if it may be replaced or there is none.

    Args:
        folder: Folder of an evaluation.
        about: The fields of `Subject.about` that must be equal.
        evaluated: Number of videos of the new evaluation.
    """
    try:
        there = json.loads((folder / RESULTS).read_bytes())
        clips = there["clips"]["evaluated"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        return "no evaluation"
    differing = [name for name in about if there.get(name) != about[name]]
    if differing:
        return f"that of another {differing[0]}"
    return "one of more clips" if clips > evaluated else None
