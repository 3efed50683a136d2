"""Recipes: from a YAML file and what is typed beside it to data, model and trainer.

Keys are those of `vidprism finetune --help`; evaluate and ablate read recipes in the same way.
"""

import os
import warnings
from datetime import timedelta
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ..data import VideoDataModule, load_processor
from ..data.sources import source_kind
from ..errors import UserError, first_line
from ..evaluation.testing import EvaluationSettings
from ..hub.licenses import check_license
from .checkpointing import CheckpointSettings
from .checks import check_callbacks
from .exporting import ExportSettings
from .module import VidPrismLightningModule, check_frozen
from .resuming import AUTO
from .stalls import LONG, StallWatch, check_timeout
from .strategies import ddp_settings, named_strategy
from .trust import HELP, RecipeParser, check_places, check_recipes, reading, refusal, take_trust
from .whitening import check_whitening

# What a recipe need not say.
TRAINER_DEFAULTS = {
    "max_epochs": 30,
    "log_every_n_steps": 10,
    # ClipSampler shares clips among processes itself: every held-out clip once, none twice.
    "use_distributed_sampler": False,
}


class FinetuneCLI(LightningCLI):
    """LightningCLI with the run's folder, and the links between data and model.

    Args:
        trusted: Whether the recipe may name any class, and any folder for it.
    """

    def __init__(self, *args: Any, trusted: bool = False, **settings: Any):
        self.trusted = trusted
        with reading(trusted):
            super().__init__(*args, **settings)

    def add_arguments_to_parser(self, parser):
        parser.add_argument("--output", type=str, default="runs/finetune", help="Folder of the run.")
        parser.add_argument(
            "--resume",
            type=str,
            default=AUTO,
            help="auto goes on with a stopped run in the output folder; none begins anew and keeps the folder as "
            "<folder>.1; a checkpoint of the folder goes on from there, with other settings if they are given. The "
            "same command typed again goes on.",
        )
        parser.add_argument(
            "--collective_timeout",
            type=float,
            default=900.0,
            help="Seconds that one of several processes waits for another in a step before all end, saying where each "
            "is; twice as many while checkpoints and exports are written.",
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
        """Parses, and looks at what is used before anything is built."""
        super().parse_arguments(parser, args)
        seed = self.config.seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything={seed}: must be from 0 to {2**32 - 1}")
        if not self.trusted:
            check_places(self.config.trainer)

    def before_instantiate_classes(self) -> None:
        """Looks for licence and backbone before data are fetched, which may be hundreds of gigabytes."""
        check_license("export.license", self.config.export.license)
        check_timeout(self.config.collective_timeout)
        data = self.config.data
        if data.feature_cache:
            check_frozen(self.config.model.freeze_backbone)
        check_whitening(self.config.model.config, data.feature_cache)
        if source_kind(data.source) in ("benchmark", "hub"):
            load_processor(data.processor, data.num_frames)

    def instantiate_classes(self) -> None:
        """Builds data, model and what the recipe names for the trainer.

        Raises:
            UserError: If a class of the trainer's does not take what the recipe gives it.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            if not str(error).startswith("Does not validate"):  # jsonargparse's beginning, around the class's own error
                raise
            raise UserError(f"trainer: {first_line(error.__cause__ or error)}") from error

    def instantiate_trainer(self, **settings) -> Trainer:
        """Builds the recipe's trainer.

        Raises:
            UserError: If this machine cannot give what the recipe asks for.
        """
        trainer = self.config_init.trainer
        asked = trainer.callbacks or []
        # A list of its own for each trainer, which puts default callbacks into the list that it is given. The run's
        # own come first: what a recipe's callback exports holds what they keep of the same epoch.
        asked = asked if isinstance(asked, list) else [asked]
        check_callbacks(asked, len(self.model.id2label), others=self.trusted)
        seconds = self.config.collective_timeout
        callbacks = [*settings.pop("callbacks", []), *asked, StallWatch(seconds)]
        accumulates = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
        accumulates = accumulates or trainer.accumulate_grad_batches > 1
        limit = timedelta(seconds=LONG * seconds)  # where StallWatch does not look
        strategy = named_strategy(trainer.strategy, accumulates, limit)
        try:
            built = super().instantiate_trainer(callbacks=callbacks, strategy=strategy, **settings)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise UserError(f"trainer: {first_line(error)}") from error
        if strategy == "auto" and type(built.strategy) is DDPStrategy:  # Lightning has found several devices
            built.strategy._ddp_kwargs.update(ddp_settings(accumulates))
            built.strategy._timeout = limit
        return built


def parse(argv: list[str], description: str | None = None) -> FinetuneCLI:
    """Parses a recipe and overrides, and builds data and model.

    Args:
        argv: `--config recipes/X.yaml`, any `--key value`, and --trust-recipe if the recipe may name any class.
        description: What `--help` says above the keys.

    Raises:
        UserError: With jsonargparse's message as one line, if a key does not exist or a value does not fit.
    """
    trusted, argv = take_trust(argv)
    check_recipes(argv)
    try:
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
        raise UserError(refusal(error) or " ".join(str(error).split())) from error


def progress_bars(cli: FinetuneCLI) -> list[Callback]:
    """Rich on a terminal; elsewhere plain lines for a log file; none where the recipe wants none."""
    if cli.config.trainer.enable_progress_bar is False:
        return []
    return [RichProgressBar() if os.isatty(1) else TQDMProgressBar(refresh_rate=20)]
