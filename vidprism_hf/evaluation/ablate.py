"""`vidprism ablate`: variants of the head on small data, by cross-validation, from the features of a frozen tower.

A sweep trains a head for each row of its grids, each fold and each seed (ablation_sweep.py), and reports what it comes
to (ablation_report.py).
"""

import argparse
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..data.tables import DataError
from ..errors import UserError
from ..training.checks import check_trainer
from ..training.recipe import FinetuneCLI, parse
from ..training.trust import HELP
from .ablation_grids import GRIDS, grid_rows
from .ablation_report import summarise, write_report
from .ablation_sweep import OF_TRAINER, Sweep

# What all rows are compared with.
REFERENCES = (("", "the recipe", {}), ("", "linear probe", {"baseline": "probe"}))
# What a recipe's trainer may say beside OF_TRAINER: the tower's precision, one device, and what changes no weight.
OF_RUN = (
    "precision",
    "devices",
    "check_val_every_n_epoch",
    "val_check_interval",
    "num_sanity_val_steps",
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
    with _quiet_lightning():
        return _sweep(options, recipe)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """A cell takes seconds: what Lightning has to say of each trainer would be all there is to read."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        logger.setLevel(level)


def _sweep(options: argparse.Namespace, recipe: list[str]) -> int:
    cli = _parse_recipe(recipe, options.folds is not None or options.groups is not None)
    check_recipe(cli)
    output = Path(cli.config.output)
    try:
        sweep = Sweep(cli, output, options.folds, options.groups)
        grids, seeds = grid_rows(options.grid), range(options.seeds)
        rows = [*REFERENCES, *grids]
        if not options.report:
            sweep.run(rows, seeds)
        cells = {(grid, name): sweep.of_row(changes, seeds) for grid, name, changes in grids}
        results = summarise(cells, *(sweep.of_row(changes, seeds) for _, _, changes in REFERENCES))
        for path in write_report(results, sweep.about(options, rows, seeds), output):
            print(f"Written to {path}")
    except OSError as error:
        place, reason = error.filename or f"output {output}", error.strerror or error
        raise UserError(
            f"{place}: cannot be read or written ({reason}); see to it, or choose another output"
        ) from error
    return 0


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="vidprism ablate",
        description="Trains variants of the head by cross-validation on cached features and compares them in a table; "
        "other options are those of finetune, such as --config recipes/ablations/head.yaml --data.source CLIPS. "
        + HELP,
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


def _parse_recipe(recipe: list[str], own_folds: bool) -> FinetuneCLI:
    """Data and model of a recipe; one whose clips a sweep holds out itself needs no rule of its own."""
    if not own_folds:
        return parse(recipe)
    if typed := next((word for word in recipe if word.startswith("--data.val_")), None):
        raise UserError(f"{typed.partition('=')[0][2:]}: --folds and --groups say what is held out; remove it")
    no_rule = ("--data.val_list=null", "--data.val_pattern=null", "--data.val_fraction=0.5")  # one that nothing follows
    try:
        return parse([*recipe, *no_rule])
    except DataError as error:
        raise DataError(f"{error} (--folds and --groups take a folder with a folder for each class)") from error


def check_recipe(cli: FinetuneCLI) -> None:
    """Looks whether a recipe trains a head from kept features.

    Raises:
        UserError: If it does not.
    """
    data, defaults = cli.config.data, cli.parser.get_defaults()
    if not data.feature_cache:
        raise UserError("data.feature_cache: name a folder for the features; recipes/ablations/head.yaml is an example")
    for name in ("checkpoint", "ema_decay", "reference_batch_size"):
        if cli.config.model[name] is not None:
            raise UserError(f"model.{name}: is nothing for an ablation, which trains heads anew; remove it")
    check_trainer(cli.config.trainer)
    if data.shots is not None:
        raise UserError("data.shots: is nothing for an ablation, whose folds take all clips; remove it")
    if cli.config.resume != defaults.resume:
        raise UserError("resume: a sweep goes on with the cells that are there; another output folder begins anew")
    if cli.config.trainer.devices not in ("auto", 1, "1"):
        raise UserError("trainer.devices: cells are trained on one device; start several processes to share a sweep")
    if (data.test_clips, data.test_crops) != (1, 1):
        raise UserError("data.test_clips, data.test_crops: cells are tested in a single view; set both to 1")
    for name, value in vars(cli.config.trainer).items():
        if name not in {*OF_TRAINER, *OF_RUN} and value != defaults.trainer.get(name):
            raise UserError(f"trainer.{name}: is nothing for an ablation, whose cells are trained whole; remove it")
