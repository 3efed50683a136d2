"""`vidprism finetune` and `vidprism evaluate`: from a recipe to a trained, evaluated and exported model.

A run's folder (`output`) holds config.yaml, logs/, checkpoints/{best,last}.ckpt, metrics.json and export/.
In push/ lie exports that a PushToHub of the recipe has not published.
"""

import dataclasses
import json
import os
import shlex
import warnings
from functools import partial
from pathlib import Path

import torch
from jsonargparse import ArgumentError
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ..data import VideoDataModule, load_processor
from ..data.bad_clips import BadClip, ClipCounts, TooManyBadClips, bad_clip_table
from ..data.few_shot import save_clip_list
from ..data.sources import source_kind
from ..errors import UserError, first_line
from ..hub.export import refuse_other_content
from ..hub.licenses import check_license
from .callbacks import BadClipReport
from .card_facts import CardRecorder, bad_clips, clip_counts
from .exporting import TRAIN_LIST, ExportedCheckpoint, ExportSettings, export_best, export_kept
from .module import VidPrismLightningModule, read_checkpoint_config
from .push_callback import PushToHub, push_open
from .strategies import named_strategy

# What a recipe need not say.
TRAINER_DEFAULTS = {
    "max_epochs": 30,
    "log_every_n_steps": 10,
    # ClipSampler shares clips among processes itself: every held-out clip once, none twice.
    "use_distributed_sampler": False,
}


class FinetuneCLI(LightningCLI):
    """LightningCLI with the run's folder, and the links between data and model."""

    def add_arguments_to_parser(self, parser):
        parser.add_argument("--output", type=str, default="runs/finetune", help="Folder of the run.")
        parser.add_argument(
            "--resume", type=str, default=None, help="Checkpoint (.ckpt) of an interrupted run to go on from."
        )
        parser.add_class_arguments(ExportSettings, "export")
        parser.link_arguments("model.num_frames", "data.num_frames")
        parser.link_arguments(
            ("model.backbone", "model.checkpoint"),
            "data.processor",
            compute_fn=lambda backbone, checkpoint: checkpoint or backbone,
        )
        parser.link_arguments("data.id2label", "model.id2label", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Looks for licence and backbone before data are fetched, which may be hundreds of gigabytes."""
        check_license("export.license", self.config.export.license)
        data = self.config.data
        if source_kind(data.source) in ("benchmark", "hub"):
            load_processor(data.processor, data.num_frames)

    def instantiate_trainer(self, **settings) -> Trainer:
        """Builds the recipe's trainer.

        Raises:
            UserError: If this machine cannot give what the recipe asks for.
        """
        trainer = self.config_init.trainer
        asked = trainer.callbacks or []
        # A list of its own for each trainer, which puts default callbacks into the list that it is given. The run's
        # own come first: what a recipe's callback exports holds what they keep of the same epoch.
        callbacks = [*settings.pop("callbacks", []), *(asked if isinstance(asked, list) else [asked])]
        accumulates = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
        strategy = named_strategy(trainer.strategy, accumulates or trainer.accumulate_grad_batches > 1)
        try:
            return super().instantiate_trainer(callbacks=callbacks, strategy=strategy, **settings)
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"trainer: {first_line(error)}") from error


def finetune(argv: list[str]) -> None:
    """Trains by a recipe, evaluates the best checkpoint on the held-out clips and exports it.

    Args:
        argv: `--config recipes/X.yaml` and any `--key value`.

    Raises:
        UserError: If the data or the settings are bad.
        VideoDecodeError: If a clip cannot be decoded.
        ExportError: If the export cannot be written.
    """
    argv = list(argv)
    cli = parse(argv)
    output, resume = Path(cli.config.output), cli.config.resume
    check_checkpoint(cli.config.model.checkpoint, output)
    if resume is None:
        keep_previous_run(output)
    else:
        check_resume(resume, output)
        refuse_other_content(output / "export")  # now, not when the training has ended
    save_settings(cli, output)
    save_train_list(cli.datamodule, output)
    trainer = build_trainer(cli, output)
    print_once(f"Run folder: {output}")
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")  # a frozen tower is meant to be
    with push_open(trainer) as publish:
        fit(trainer, cli, argv)
        checkpoint = best_checkpoint(output)
        metrics = held_out_accuracy(trainer, cli, str(checkpoint))
        save_metrics(trainer, metrics, output)
        export = export_best(trainer, cli, metrics, output / "export")
        print_bad_clips(bad_clips(trainer))
        print_usage(export, metrics, clip_counts(trainer, "val"))
        publish(export)


def fit(trainer: Trainer, cli: FinetuneCLI, argv: list[str]) -> None:
    """Trains; where it ends early, says how to go on, or which clips were bad."""
    try:
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.resume, weights_only=True)
    except SystemExit:
        # Lightning's way to end after Ctrl-C; the checkpoint callback has saved last.ckpt by now.
        last = Path(cli.config.output) / "checkpoints" / "last.ckpt"
        if last.is_file():
            print_once(f"Stopped. Go on with: vidprism finetune {shlex.join(argv)} --resume {last}")
        raise
    except TooManyBadClips as error:
        print_once(bad_clip_table(error.clips))
        raise


def evaluate(argv: list[str]) -> dict[str, float]:
    """Evaluates an exported model on the held-out clips of a recipe's data.

    Args:
        argv: The model (folder or Hub id), then `--config` and any `--key value`.

    Raises:
        UserError: If the model's labels are not the data's.
    """
    if {"-h", "--help"}.intersection(argv):
        print("usage: vidprism evaluate MODEL --config RECIPE [--key value], with the keys of vidprism finetune --help")
        return {}
    if not argv or argv[0].startswith("-"):
        raise UserError("name the model first, then --config RECIPE")
    # The model brings its configuration and number of frames; what the recipe says of them is for training.
    num_frames = read_checkpoint_config(argv[0]).num_frames
    own = ["--model.checkpoint", argv[0], "--model.config", "null", "--model.num_frames", str(num_frames)]
    cli = parse([*argv[1:], *own])
    trainer = cli.instantiate_trainer(logger=False, callbacks=progress_bars(cli))
    metrics = held_out_accuracy(trainer, cli, checkpoint=None)
    print_bad_clips(bad_clips(trainer, "val"))
    print_once(f"{argv[0]} on {clip_counts(trainer, 'val').phrase('held-out clips')}")
    for name, value in metrics.items():
        print_once(f"  {name:<5} {value:.4f}")
    return metrics


def parse(argv: list[str]) -> FinetuneCLI:
    """Parses a recipe and overrides, and builds data and model.

    Raises:
        UserError: With jsonargparse's message as one line, if a key does not exist or a value does not fit.
    """
    try:
        # LightningCLI warns of its own arguments where the process has some too, which are the same here.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        return FinetuneCLI(
            VidPrismLightningModule,
            VideoDataModule,
            args=argv,
            run=False,
            seed_everything_default=0,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            parser_kwargs={
                "exit_on_error": False,
                "allow_abbrev": False,  # a misspelt key is an error, not the beginning of another one
                "prog": "vidprism finetune",
                "description": finetune.__doc__,
            },
        )
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error


def build_trainer(cli: FinetuneCLI, output: Path) -> Trainer:
    """The trainer of the recipe, with the run's loggers and callbacks."""
    checkpoints = output / "checkpoints"
    keep = partial(ModelCheckpoint, dirpath=checkpoints, enable_version_counter=False)
    if cli.config_init.export.checkpoints:
        export = partial(export_kept, cli)
        keep = partial(ExportedCheckpoint, export, dirpath=checkpoints, enable_version_counter=False)
    callbacks = [
        keep(filename="best", monitor="val/top1", mode="max"),
        # A checkpoint of its own, so that "last" is the last, not the best; also written on Ctrl-C.
        keep(filename="last", save_on_train_epoch_end=True, save_on_exception=True),
        BadClipReport(output),
        CardRecorder(),
        *progress_bars(cli),
    ]
    loggers = [
        TensorBoardLogger(output, name="logs", version="tensorboard"),
        CSVLogger(output, name="logs", version=free_name(output / "logs" / "csv").name),
    ]
    asked = cli.config_init.trainer
    for name in ("max_epochs", "max_steps"):
        if asked[name] == 0:
            raise UserError(f"trainer.{name}=0: nothing would be trained; set it to 1 or more")
    if asked.default_root_dir is not None:
        raise UserError("trainer.default_root_dir: the run's folder is output; set that")
    logger = loggers if asked.logger in (None, True) else asked.logger
    if logger:
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    trainer = cli.instantiate_trainer(default_root_dir=str(output), callbacks=callbacks, logger=logger)
    for callback in trainer.callbacks:
        if isinstance(callback, PushToHub):  # a recipe's (trainer.callbacks), which cannot name a function
            callback.export = lambda trainer, module, folder: export_kept(cli, trainer, folder)
    return trainer


def progress_bars(cli: FinetuneCLI) -> list[Callback]:
    """Rich on a terminal; elsewhere plain lines for a log file; none where the recipe wants none."""
    if cli.config.trainer.enable_progress_bar is False:
        return []
    return [RichProgressBar() if os.isatty(1) else TQDMProgressBar(refresh_rate=20)]


def best_checkpoint(output: Path) -> Path:
    """The run's best checkpoint, or its last one if no epoch was validated.

    By its place, not by the path that the checkpoint callback remembers: that of a resumed run may be from before
    the run's folder was moved.
    """
    best, last = (output / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    if not best.is_file():
        print_once("No epoch was validated (trainer.check_val_every_n_epoch): the last checkpoint is evaluated")
    return best if best.is_file() else last


def held_out_accuracy(trainer: Trainer, cli: FinetuneCLI, checkpoint: str | None) -> dict[str, float]:
    """Held-out top-1 and top-5 of a checkpoint, which stays loaded in the module, or of the module as it is."""
    results = trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True, verbose=False)
    if trainer.limit_test_batches != 1.0:
        print_once(f"trainer.limit_test_batches={trainer.limit_test_batches}: not all held-out clips were evaluated")
    return {name: results[0][f"test/{name}"] for name in ("top1", "top5") if f"test/{name}" in results[0]}


@rank_zero_only
def save_metrics(trainer: Trainer, metrics: dict[str, float], output: Path) -> None:
    """Writes metrics.json: the metrics, and what became of the clips."""
    counts = {split: dataclasses.asdict(clip_counts(trainer, split)) for split in ("train", "val")}
    beside = output / "metrics.json.tmp"
    beside.write_text(json.dumps({**metrics, "clips": counts}, indent=2) + "\n")
    os.replace(beside, output / "metrics.json")


@rank_zero_only
def save_train_list(data: VideoDataModule, output: Path) -> None:
    """Writes train_clips.txt where the training clips were drawn or listed: the run's start is in time to find out
    that a name does not fit.
    """
    if data.hparams.shots or data.hparams.train_list:
        save_clip_list(data.train_table, output / TRAIN_LIST)


@rank_zero_only
def keep_previous_run(output: Path) -> None:
    """Moves an earlier run that stands in the folder out of the way, to the first free `<folder>.N`.

    Raises:
        UserError: If the folder cannot be written, or holds something that is no run.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output {output}: cannot be written ({error.strerror}); choose another folder") from error
    if not any(output.iterdir()):
        return
    if not (output / "config.yaml").is_file():
        raise UserError(f"output {output}: exists and is not a run's folder; choose another one")
    kept = free_name(output)
    output.rename(kept)
    print(f"The earlier run in {output} is kept as {kept}")


def check_checkpoint(name: str | None, output: Path) -> None:
    """Looks whether the model to start from would be moved away with the earlier run in the folder.

    Raises:
        UserError: If it would.
    """
    if name and os.path.exists(name) and output.resolve() in (path := Path(name).resolve(), *path.parents):
        raise UserError(f"model.checkpoint {name}: lies in output {output}; choose another output")


def check_resume(file: str, output: Path) -> None:
    """Looks whether a checkpoint can be read and is this run's, before anything is written.

    Raises:
        UserError: If it cannot, or belongs to another run: going on would mix the two in one folder.
    """
    try:
        torch.load(file, map_location="cpu", mmap=True, weights_only=True)["optimizer_states"]
    except Exception as error:  # torch.load raises whatever its unpickler meets
        raise UserError(
            f"resume {file}: not a run's checkpoint ({type(error).__name__}); give its checkpoints/last.ckpt"
        ) from error
    if Path(file).resolve().parent != (output / "checkpoints").resolve():
        raise UserError(f"resume {file}: not in {output / 'checkpoints'}; set output to the folder of its run")


def free_name(path: Path) -> Path:
    """The path, or the first of `<path>.1`, `<path>.2`, ... that is not there yet."""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


@rank_zero_only
def save_settings(cli: FinetuneCLI, output: Path) -> None:
    """Writes all settings to the run's folder, at its start: config.yaml is what tells that it is one.

    Raises:
        UserError: If the folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        cli.parser.save(cli.config, output / "config.yaml", skip_none=False, overwrite=True, multifile=False)
    except OSError as error:
        raise UserError(f"output {output}: cannot be written ({error.strerror}); choose another folder") from error


@rank_zero_only
def print_once(text: str) -> None:
    """Prints on the first process alone."""
    print(text, flush=True)


def print_bad_clips(clips: list[BadClip]) -> None:
    """The clips that could not be decoded, if there are any."""
    if clips:
        print_once(bad_clip_table(clips))


def print_usage(export: Path, metrics: dict[str, float], counts: ClipCounts) -> None:
    """The three lines that end a run."""
    classify = f"t.pipeline('video-classification', '{export}')('CLIP.mp4')"
    code = f"import vidprism_hf, transformers as t; print({classify})"
    print_once(f"Held-out top-1 {metrics['top1']:.4f} on {counts.phrase('clips')}; exported to {export}")
    print_once(f"  vidprism predict {export} CLIP.mp4")
    print_once(f'  python -c "{code}"')
