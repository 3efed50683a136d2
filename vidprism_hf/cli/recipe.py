"""Recipes: from a YAML file and command-line overrides to data, model and trainer.

Keys are those of `vidprism finetune --help`; evaluate and ablate read recipes in the same way.
"""

import re
import warnings
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningCLI

from ..data import VideoDataModule, load_processor
from ..data.open import source_kind
from ..errors import UserError, first_line
from ..evaluation.testing import EvaluationSettings
from ..hub.licenses import check_license
from ..quiet import quiet_lightning
from ..stalls import COLLECTIVE_TIMEOUT, check_timeout
from ..training.checkpoint.files import CheckpointSettings
from ..training.checkpoint.resume import AUTO
from ..training.exporting import ExportSettings
from ..training.module import VidPrismLightningModule, check_frozen
from ..training.plan import TRAINER_DEFAULTS, RunPlan
from ..training.whitening import check_whitening
from .help import suggestion
from .recipes import find_recipe
from .trust import HELP, RecipeParser, check_places, check_publishing, check_recipes, reading, refusal, take_trust


class FinetuneCLI(LightningCLI):
    """LightningCLI with the run's folder and the links between data and model.

    Args:
        trusted: Whether the recipe may name any class and folder.
    """

    def __init__(self, *args: Any, trusted: bool = False, **settings: Any):
        self.trusted, self.typed = trusted, settings.get("args") or []
        with reading(trusted):
            super().__init__(*args, **settings)

    def add_arguments_to_parser(self, parser):
        parser.add_argument("--output", type=str, default="runs/finetune", help="Folder of the run.")
        parser.add_argument(
            "--resume",
            type=str,
            default=AUTO,
            help="auto resumes a stopped run in the output folder; none starts fresh and keeps the folder as "
            "<folder>.1; a checkpoint in the folder resumes from there, with different settings if given. Repeating "
            "the command resumes.",
        )
        parser.add_argument(
            "--collective_timeout",
            type=float,
            default=COLLECTIVE_TIMEOUT,
            help="Seconds that a rank waits for another one in a step before all are stopped, printing where each is; "
            "twice as long while checkpoints and exports are written.",
        )
        parser.add_class_arguments(CheckpointSettings, "checkpoint")
        parser.add_class_arguments(ExportSettings, "export")
        parser.add_class_arguments(EvaluationSettings, "evaluation")
        parser.link_arguments("model.num_frames", "data.num_frames")
        parser.link_arguments(
            ("model.backbone", "model.checkpoint"),
            "data.processor",
            compute_fn=lambda backbone, checkpoint: checkpoint or backbone,
        )
        parser.link_arguments("data.id2label", "model.id2label", apply_on="instantiate")

    def parse_arguments(self, parser, args) -> None:
        """Parses the arguments and checks those that are used before anything is built."""
        super().parse_arguments(parser, args)
        seed = self.config.seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything={seed}: must be from 0 to {2**32 - 1}")
        if not self.trusted:
            check_places(self.config.trainer)
            check_publishing(self.config.trainer, self.typed)

    def before_instantiate_classes(self) -> None:
        """Checks licence and backbone before downloading data, which may be hundreds of gigabytes."""
        check_license("export.license", self.config.export.license)
        check_timeout(self.config.collective_timeout)
        data = self.config.data
        if data.feature_cache:
            check_frozen(self.config.model.freeze_backbone)
        check_whitening(self.config.model.config, data.feature_cache)
        if source_kind(data.source) in ("benchmark", "hub"):
            load_processor(data.processor, data.num_frames)

    def instantiate_classes(self) -> None:
        """Builds data, model and the recipe's classes for the trainer.

        Raises:
            UserError: If a class of the trainer rejects its arguments.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            if not str(error).startswith("Does not validate"):  # jsonargparse's prefix to the class's own error
                raise
            raise UserError(f"trainer: {first_line(error.__cause__ or error)}") from error

    def instantiate_trainer(self, **settings) -> None:
        """Builds no trainer: the run builds its own."""


def parse(argv: list[str], description: str | None = None) -> FinetuneCLI:
    """Parses a recipe and overrides, and builds data and model.

    Args:
        argv: `--config recipes/X.yaml`, any `--key value`, and --trust-recipe if the recipe may name any class.
        description: Text of `--help` above the keys.

    Raises:
        UserError: With jsonargparse's message on one line, if a key does not exist or a value is invalid.
    """
    trusted, argv = take_trust(argv)
    argv = expand(argv)
    check_recipes(argv)
    try:
        with quiet_lightning():
            # LightningCLI warns of its own arguments where the process has some too, which are the same here.
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            return FinetuneCLI(
                VidPrismLightningModule,
                VideoDataModule,
                args=argv,
                trusted=trusted,
                parser_class=RecipeParser,
                run=False,
                seed_everything_default=0,
                save_config_callback=None,
                trainer_defaults=TRAINER_DEFAULTS,
                auto_configure_optimizers=False,
                parser_kwargs={
                    "exit_on_error": False,
                    "allow_abbrev": False,  # a misspelt key is an error, not the beginning of another one
                    "prog": "vidprism finetune",
                    "description": f"{description or ''} {HELP}".strip(),
                },
            )
    except ArgumentError as error:
        message = " ".join(str(error).split())
        raise UserError(refusal(error) or message + did_you_mean(message)) from error


# jsonargparse's messages for a key that does not exist.
UNKNOWN = re.compile(
    r"unrecognized arguments: --(?P<typed>[\w.]+)|Group '(?P<section>\w+)' does not accept option '(?P<option>\w+)'"
    r"|Option '(?P<other>[\w.]+)' is not accepted"
)


def did_you_mean(message: str) -> str:
    """Returns a suggestion to append to jsonargparse's message about an unknown key."""
    if (found := UNKNOWN.search(message)) is None:
        return ""
    return suggestion(found["typed"] or found["option"] or found["other"], found["section"] or "")


def expand(argv: list[str]) -> list[str]:
    """Expands the shorthands of a command line.

    A first argument that is not an option is the source, with `folder` as the default recipe. Recipes are given by
    path or name.
    """
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv[0] = f"--data.source={argv[0]}"
        if not any(word.partition("=")[0] in ("--config", "-c") for word in argv):
            argv.insert(0, "--config=folder")
    for place, word in enumerate(argv):
        option, _, value = word.partition("=")
        if option in ("--config", "-c") and value:
            argv[place] = f"--config={find_recipe(value)}"
        elif option in ("--config", "-c") and place + 1 < len(argv):
            argv[place + 1] = str(find_recipe(argv[place + 1]))
    return argv


def plan_of(cli: FinetuneCLI, command: str) -> RunPlan:
    """Returns the run of a recipe.

    Args:
        cli: What `parse` returned.
        command: Command that resumes the run.
    """
    config, built = cli.config, cli.config_init
    return RunPlan(
        cli.model,
        cli.datamodule,
        config.output,
        str(config.resume),  # jsonargparse accepts null
        config.seed_everything,
        built.checkpoint,
        built.export,
        built.evaluation,
        trainer=trainer_settings(cli),
        trainer_recipe=trainer_recipe(cli),
        collective_timeout=config.collective_timeout,
        command=command,
    )


def trainer_settings(cli: FinetuneCLI) -> dict[str, Any]:
    """Returns the recipe's arguments of Lightning's Trainer."""
    return asked_of_trainer(vars(cli.config_init.trainer), vars(cli.parser.get_defaults().trainer))


def asked_of_trainer(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Drops Lightning's own defaults, which are not settings of the run."""
    return {name: value for name, value in settings.items() if name in TRAINER_DEFAULTS or value != defaults[name]}


def trainer_recipe(cli: FinetuneCLI) -> dict[str, Any]:
    """Returns the trainer's settings as the recipe has them: objects by class path and arguments."""
    dumped = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))["trainer"]
    defaults = yaml.safe_load(cli.parser.dump(cli.parser.get_defaults(), skip_none=False))["trainer"]
    return asked_of_trainer(dumped, defaults)
