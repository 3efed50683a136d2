"""`vidprism finetune`: from a recipe to a trained, evaluated and exported model."""

import shlex

from ..training.run import run
from .help import trainer_help
from .recipe import parse, plan_of

DESCRIPTION = "Trains by a recipe, evaluates the best checkpoint on the validation split and exports it."


def main(argv: list[str]) -> int:
    """Runs a recipe."""
    if "--help=trainer" in argv:
        print(trainer_help(), end="")
        return 0
    run(plan_of(parse(argv, DESCRIPTION), command=f"vidprism finetune {shlex.join(argv)}"))
    return 0
