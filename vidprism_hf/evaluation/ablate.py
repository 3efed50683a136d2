"""`vidprism ablate`: variants of the head on small data, by cross-validation, from the features of a frozen tower.

A sweep trains a head for each row of its grids, each fold and each seed (ablation_sweep.py), and reports what it comes
to (ablation_report.py).
"""

import argparse
import logging
import os
import warnings
from pathlib import Path

from ..errors import UserError
from ..training.recipe import FinetuneCLI, parse
from .ablation_grids import GRIDS, grid_rows
from .ablation_report import summarise, write_report
from .ablation_sweep import OF_TRAINER, Sweep

# What all rows are compared with.
REFERENCES = (("", "the recipe", {}), ("", "linear probe", {"baseline": "probe"}))
# Sections of a recipe of which a cell has nothing, but for OF_TRAINER, the tower's precision, and what follows.
UNUSED = ("trainer", "checkpoint", "export", "evaluation")
OF_SHOWING = (
    "precision",
    "logger",
    "log_every_n_steps",
    "enable_progress_bar",
    "enable_model_summary",
    "enable_checkpointing",
    "default_root_dir",
)


def main(argv: list[str]) -> int:
    """Runs a sweep, or goes on with it, and writes its report.

    Returns:
        The exit status, 0.

    Raises:
        UserError: If an option, the recipe or the source does not fit.
    """
    options, recipe = _parse(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("vidprism ablate trains its cells one after the other: do not launch it with torchrun or srun")
    # A cell takes seconds: what Lightning has to say of each trainer would be all there is to read.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    cli = parse(recipe)
    check_recipe(cli)
    output = Path(cli.config.output)
    try:
        sweep = Sweep(cli, output, options.folds, options.groups)
        rows = grid_rows(options.grid)
        seeds = range(options.seeds)
        if not options.report:
            sweep.run([*REFERENCES, *rows], seeds)
        cells = {(grid, name): sweep.of_row(changes, seeds) for grid, name, changes in rows}
        results = summarise(cells, *(sweep.of_row(changes, seeds) for _, _, changes in REFERENCES))
        for path in write_report(results, sweep.about(options), output):
            print(f"Written to {path}")
    except OSError as error:
        raise UserError(f"output {output}: cannot be written ({error.strerror}); choose another folder") from error
    return 0


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="vidprism ablate",
        description="Trains variants of the head by cross-validation on cached features and compares them in a table; "
        "other options are those of finetune, such as --config recipes/ablations/head.yaml --data.source CLIPS.",
        allow_abbrev=False,
    )
    names = ["all", *GRIDS]
    parser.add_argument("--grid", nargs="+", default=["all"], choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row and fold (default: 3)")
    parser.add_argument("--report", action="store_true", help="train nothing: a report of the cells that are there")
    parser.add_argument("--folds", type=int, help="hold out so many contiguous blocks of each class in turn")
    parser.add_argument("--groups", help="hold out one group in turn: what this regular expression captures in names")
    options, recipe = parser.parse_known_args(argv)
    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: must be at least 1")
    if options.folds is not None and options.groups is not None:
        raise UserError("--folds, --groups: give one of them, or none for the source's own split")
    return options, recipe


def check_recipe(cli: FinetuneCLI) -> None:
    """Looks whether a recipe trains a head from kept features.

    Raises:
        UserError: If it does not.
    """
    if not cli.config.data.feature_cache:
        raise UserError("data.feature_cache: name a folder for the features; recipes/ablations/head.yaml is an example")
    for name in ("checkpoint", "ema_decay", "reference_batch_size"):
        if cli.config.model[name] is not None:
            raise UserError(f"model.{name}: is nothing for an ablation, which trains heads anew; remove it")
    if cli.config.data.shots is not None:
        raise UserError("data.shots: is nothing for an ablation, whose folds take all clips; remove it")
    if cli.config.resume != cli.parser.get_defaults().resume:
        raise UserError("resume: a sweep goes on with the cells that are there; another output folder begins anew")
    if cli.config.trainer.devices not in ("auto", 1, "1"):
        raise UserError("trainer.devices: cells are trained on one device; start several processes to share a sweep")
    _check_unused(cli)


def _check_unused(cli: FinetuneCLI) -> None:
    """What is nothing to a cell is refused rather than ignored, but for what only shows and logs a run."""
    defaults = cli.parser.get_defaults()
    for section in UNUSED:
        for name, value in vars(cli.config[section]).items():
            if name not in {"devices", *OF_TRAINER, *OF_SHOWING} and value != defaults[section].get(name):
                raise UserError(f"{section}.{name}: is nothing for an ablation, whose cells train a head; remove it")
