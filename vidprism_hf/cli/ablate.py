"""`vidprism ablate`: compares variants of the head on small data, from a recipe of finetune."""

import argparse
import logging
import os
from dataclasses import fields

from ..ablation.grids import GRIDS
from ..data.tables import DataError
from ..errors import UserError
from ..quiet import quiet_lightning
from ..training.checks import check_trainer
from .recipe import FinetuneCLI, parse
from .trust import HELP

# Settings of a recipe's trainer that change no weight of a head, and so are accepted and ignored.
WITHOUT_EFFECT = {
    *("precision", "devices", "check_val_every_n_epoch", "val_check_interval", "num_sanity_val_steps", "logger"),
    *("log_every_n_steps", "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "default_root_dir"),
}


def main(argv: list[str]) -> int:
    """Runs or resumes a study and writes its report.

    Returns:
        The exit status, 0.

    Raises:
        UserError: If an option, the recipe or the source does not fit, or scikit-learn is missing.
    """
    options, recipe = _parse(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("vidprism ablate runs its trials one after the other: do not launch it with torchrun or srun")
    try:
        from ..ablation.study import Study
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("sklearn", "scipy"):
            raise
        raise UserError('needs scikit-learn: pip install "vidprism_hf[ablate]"') from error
    with quiet_lightning(logging.ERROR):
        settings = study_settings(_parse_recipe(recipe, options.folds is not None or options.groups is not None))
    try:
        study = Study(**settings, folds=options.folds, groups=options.groups)
        if not options.report:
            study.run(options.grid, options.seeds)
        for path in study.report(options.grid, options.seeds):
            print(f"Written to {path}")
    except OSError as error:
        place, reason = error.filename or f"output {settings['output']}", error.strerror or error
        raise UserError(f"{place}: cannot be read or written ({reason}); fix that or choose another output") from error
    return 0


def study_settings(cli: FinetuneCLI) -> dict:
    """Returns the arguments of `Study` that a parsed recipe gives.

    Raises:
        UserError: If the recipe asks for something that a study does not do.
    """
    from ..ablation.heads import TrainerSettings

    trainer, defaults = cli.config.trainer, cli.parser.get_defaults()
    check_trainer(vars(trainer))
    if cli.config.resume != defaults.resume:
        raise UserError("resume: a study always resumes; choose another output to start fresh")
    if trainer.devices not in ("auto", 1, "1"):
        raise UserError("trainer.devices: trials run on one device; start several processes to share a study")
    names = {field.name for field in fields(TrainerSettings)}
    for name, value in vars(trainer).items():
        if name not in names | WITHOUT_EFFECT and value != defaults.trainer.get(name):
            raise UserError(f"trainer.{name}: is not supported in an ablation; remove it")
    return {
        "data": cli.datamodule,
        "model": cli.model,
        "output": cli.config.output,
        "trainer": TrainerSettings(**{name: trainer[name] for name in names}),
        "precision": trainer.precision,
    }


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
    parser.add_argument("--seeds", type=int, default=3, help="trainings per row and fold (default: 3)")
    parser.add_argument("--report", action="store_true", help="train nothing: report the finished trials")
    parser.add_argument("--folds", type=int, help="number of contiguous blocks of each class to hold out in turn")
    parser.add_argument("--groups", help="regular expression: hold out the groups that it captures in names in turn")
    options, recipe = parser.parse_known_args(argv)
    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: must be at least 1")
    return options, recipe


def _parse_recipe(recipe: list[str], own_folds: bool) -> FinetuneCLI:
    """Builds data and model; without the recipe's validation split if the study makes its own folds."""
    if not own_folds:
        return parse(recipe)
    if typed := next((word for word in recipe if word.startswith("--data.val_")), None):
        raise UserError(f"{typed.partition('=')[0][2:]}: conflicts with --folds and --groups; remove it")
    any_rule = ("--data.val_list=null", "--data.val_pattern=null", "--data.val_fraction=0.5")  # the study ignores it
    try:
        return parse([*recipe, *any_rule])
    except DataError as error:
        raise DataError(f"{error} (--folds and --groups need a folder with one subfolder per class)") from error
