"""`vidprism finetune --help`, read from the source of the settings: no import, so it answers at once.

The console script loads this file by its path, without the package. Nothing here may import from it.
"""

import ast
import difflib
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1]
# Section of the recipe -> (title, file, class whose arguments or fields are its keys).
SECTIONS = {
    "model": ("the classifier and its optimiser", "training/module.py", "VidPrismLightningModule"),
    "data": ("videos, splits, views and loaders", "data/datamodule.py", "VideoDataModule"),
    "checkpoint": ("checkpoints of a run", "training/checkpoint/files.py", "CheckpointSettings"),
    "export": ("the published weights", "training/exporting.py", "ExportSettings"),
    "evaluation": ("the final test", "evaluation/testing.py", "EvaluationSettings"),
}
TOP = ("config", "output", "resume", "seed_everything", "collective_timeout")
LINKED = {"model.id2label", "data.processor", "data.num_frames"}  # taken from the data, or from the model
USAGE = """usage: vidprism finetune [CLIPS] [--config RECIPE] [--KEY VALUE ...]

Trains by a recipe, evaluates the best checkpoint on the validation split and exports it. The same command resumes a
run that was stopped.

  CLIPS                       a folder of videos or a dataset of the Hub, as data.source
  --config RECIPE             a YAML file, or the name of one that comes with the package (vidprism recipes)
  --print_config              print all settings as a recipe, and stop
  --seed_everything N         seed of the initial weights and of training (0)
  --output FOLDER             folder of the run (runs/finetune)
  --resume auto|none|FILE     auto resumes a stopped run; none starts a fresh one and keeps the folder as FOLDER.1; a
                              checkpoint of the folder resumes from there (auto)
  --collective_timeout N      seconds that a rank waits for another one in a step before all end (900)
  --help=trainer              the keys of Lightning's Trainer: devices, strategy, precision, callbacks, ...

A recipe may name classes of Lightning and of this package. With --trust-recipe it may name any that is installed: then
it is code, so run those of people you trust.
"""


class Key(NamedTuple):
    """A key of a recipe."""

    name: str
    default: str
    text: str


def keys(section: str) -> list[Key]:
    """Returns the keys of a section, in the order of the source."""
    _, file, name = SECTIONS[section]
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    (kind,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    texts = dict(_arguments(ast.get_docstring(kind) or ""))
    found = [Key(f"{section}.{key}", default, texts.get(key, "")) for key, default in _defaults(kind)]
    return [key for key in found if key.name not in LINKED]


def _defaults(kind: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Yields the name and default of each argument of a class, or field of a dataclass."""
    for node in kind.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = node.args.args[1:]
            for argument, default in zip(arguments, node.args.defaults, strict=True):
                yield argument.arg, _yaml(default)
            return
    for node in kind.body:
        if isinstance(node, ast.AnnAssign):
            yield node.target.id, _yaml(node.value)


def _yaml(default: object) -> str:
    """Returns a default, as the source's expression or as a value, as a recipe has it."""
    text = ast.unparse(default) if isinstance(default, ast.expr) else str(default)
    return {"None": "null", "True": "true", "False": "false"}.get(text, text.strip("'"))


def _arguments(docstring: str) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each argument that a docstring describes."""
    _, _, block = docstring.partition("Args:\n")
    block = re.split(r"\n\S", block)[0]
    for match in re.finditer(r"^    (\w+): (.*(?:\n(?: {8}.*)?)*)", block, re.MULTILINE):
        yield match[1], " ".join(match[2].split())


def suggestion(name: str, section: str = "") -> str:
    """Returns `; did you mean ...?` for a misspelt key, nothing where no key is close.

    Args:
        name: As it was typed, with or without its section.
        section: Where it was typed, if the name does not say.
    """
    known = [key.name for each in SECTIONS for key in keys(each)] + [
        "output",
        "resume",
        "seed_everything",
        "config",
        "collective_timeout",
    ]
    close = difflib.get_close_matches(f"{section}.{name}" if section else name, known, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def finetune_help() -> str:
    """Returns the help: usage, then our keys in groups."""
    lines = [USAGE]
    for section, (title, _, _) in SECTIONS.items():
        lines += [f"{section}: {title}", *described(keys(section)), ""]
    return "\n".join(lines)


def trainer_help() -> str:
    """Returns the keys of Lightning's Trainer, which this imports."""
    from lightning.pytorch import Trainer

    texts = dict(_arguments(inspect.getdoc(Trainer.__init__)))
    found = inspect.signature(Trainer).parameters.values()
    lines = described([Key(f"trainer.{each.name}", _yaml(each.default), texts.get(each.name, "")) for each in found])
    return "\n".join(["trainer: Lightning's Trainer; null takes Lightning's default", *lines, ""])


def described(keys: list[Key]) -> list[str]:
    """Returns a line or two for each key: its first sentence and its default."""
    width, lines = max(80, min(shutil.get_terminal_size().columns, 120)), []
    for key in keys:
        text = f"--{key.name:<31} {first_sentence(key.text)} ({key.default})"
        lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent=" " * 36)
    return lines


def first_sentence(text: str) -> str:
    """Returns the first sentence of a description, or its first part, not ending within parentheses."""
    parts = re.split(r"(?<=[^.]{3})([.;]) ", text)
    sentence = parts[0]
    for mark, more in zip(parts[1::2], parts[2::2], strict=True):
        if sentence.count("(") == sentence.count(")"):
            break
        sentence += f"{mark} {more}"
    return sentence.rstrip(".")
