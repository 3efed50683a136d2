"""The folders in which evaluations are kept: which is whose, and what may be replaced there."""

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
    """Where evaluations of a model are kept: in `evaluation/` beside its folder, there below its name unless that is
    `export`, as the one of a run is called; of a commit of one on the Hub below runs/.
    """
    if not os.path.isdir(subject.model):
        commit = f"-{subject.commit[:SHORT]}" if subject.commit else ""
        return Path("runs") / (subject.model.replace("/", "--") + commit) / "evaluation"
    folder = Path(subject.model)
    if folder.name in ("", ".."):  # `.`, too
        folder = folder.resolve()
    kept = folder.parent / "evaluation"
    return kept if folder.name == "export" else kept / folder.name


def check_folder(subject: Subject, output: str | None) -> None:
    """Looks whether what will be found can be kept, before there is work that would be lost.

    Raises:
        UserError: If the folder cannot be written, or holds another evaluation.
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
        evaluation: What was found.
        output: Folder to write into; None takes one of its own among those of the model. What is replaced there is
            an evaluation by the same protocol on the same data, of no more clips: else the name gets a number.

    Returns:
        The folder.

    Raises:
        UserError: If the folder cannot be written, or `output` holds another evaluation.
    """
    folder = Path(output) if output else evaluations_of(evaluation) / evaluation.folder_name
    about, clips = evaluation.about, evaluation.evaluated
    if output:
        refuse_other(folder, about, clips)
    else:
        del about["model"]  # the folder tells it
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
    """What to say of a folder that cannot be made or written."""
    return UserError(f"{folder}: cannot be written ({error.strerror}); {ELSEWHERE}")


def refuse_other(folder: Path, about: dict[str, Any], evaluated: float = math.inf) -> None:
    """Lets pass a folder whose evaluation may be replaced.

    Raises:
        UserError: If it holds another one.
    """
    if other := other_content(folder, about, evaluated):
        raise UserError(f"{folder / RESULTS}: is {other}; {ELSEWHERE}")


def other_content(folder: Path, about: dict[str, Any], evaluated: float) -> str | None:
    """By what the evaluation in a folder is another one; None if it is the same or there is none.

    Args:
        folder: Of evaluations.
        about: Of `Subject`, as far as it is to be the same.
        evaluated: How many clips the new one is of.
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
