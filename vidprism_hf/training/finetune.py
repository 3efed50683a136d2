"""`vidprism finetune`: from a recipe to a trained, evaluated and exported model.

A run's folder (`output`) holds config.yaml, logs/, checkpoints/{best,last}.ckpt, export/, evaluation/ and, when it is
finished, metrics.json. In push/ lie exports that a PushToHub of the recipe has not published.
"""

import dataclasses
import json
import os
import shlex
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from ..data import VideoDataModule
from ..data.bad_clips import BadClip, TooManyBadClips, bad_clip_table
from ..data.few_shot import save_clip_list
from ..data.ranks import print_once
from ..errors import UserError
from ..evaluation.records import write_evaluation
from ..evaluation.report import Evaluation, rounded
from ..evaluation.scores import ScoreRecorder
from ..evaluation.testing import NotEvaluated, evaluate_held_out, subject_of
from ..hub.export import refuse_other_content
from ..util import atomic_write
from .averaging import WiseFT
from .callbacks import BadClipReport
from .card_facts import CardRecorder, Measured, bad_clips, clip_counts, dataset_facts, kept_by, switched_on
from .checkpointing import BEST, LAST, PREVIOUS, KeptCheckpoint, SafeCheckpointIO, damage
from .checks import check_trainer, lightnings_complaints
from .exporting import TRAIN_LIST, ExportedCheckpoint, export_best, export_kept, export_or_warn, export_run
from .push_callback import PushToHub, push_open
from .recipe import FinetuneCLI, parse, progress_bars
from .resuming import AUTO, METRICS, Start, agreed, begin, free_name, identified, settings_hash
from .run_lock import not_writable, only_run
from .safeguard import Safeguard
from .signals import Stopped

# On fewer clips Wilson's 95 % interval of a top-1 of one half is some 0.3 wide, or more: it says little.
FEW_CLIPS = 40


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
    cli = parse(argv, finetune.__doc__.partition("\n")[0])
    check_trainer(cli.config.trainer)
    output = Path(cli.config.output)
    if output.name in ("", ".."):  # it may have to be renamed
        output = output.resolve()
        cli.config.output = str(output)
    check_checkpoint(cli.config.model.checkpoint, output)
    with only_run(output) if rank_zero_only.rank == 0 else nullcontext():
        run(cli, output, argv)


def run(cli: FinetuneCLI, output: Path, argv: list[str]) -> None:
    """Trains, evaluates and exports, in a folder that is this run's own."""
    ensemble = tower_ensemble(cli)
    start = begin_once(cli, output)
    save_settings(cli, output, start)
    save_train_list(cli.datamodule, output)
    trainer = build_trainer(cli, output, ensemble)
    print_once(f"Run folder: {output}")
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")  # a frozen tower is meant to be
    warnings.filterwarnings("ignore", r"Checkpoint directory .* exists and is not empty")  # that of a resumed run
    # Of the loader that begins where it should without Lightning's knowledge.
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
    with push_open(trainer) as publish:
        fit(trainer, cli, agreed(trainer, cli.model, start), argv)
        evaluation = final_test(trainer, cli, output)
        export = export_best(trainer, cli, evaluation, output / "export")
        print_bad_clips(bad_clips(trainer))
        print_usage(export, evaluation)
        publish(export)
    finish(trainer, evaluation, output)  # last: the same command would train anew


def fit(trainer: Trainer, cli: FinetuneCLI, start: Start, argv: list[str]) -> None:
    """Trains; where it ends early, says how to go on, or which clips were bad."""
    if start.data:
        cli.datamodule.load_state_dict(start.data)
    safeguard = kept_by(trainer, Safeguard)
    safeguard.begun, safeguard.run = start.begun, start.run
    settings = {name: value for name, value in switched_on(trainer, cli).items() if value is not None}
    print_once(f"Training: {'; '.join(f'{name} {value}' for name, value in settings.items())}")
    try:
        with lightnings_complaints():
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=start.checkpoint, weights_only=True)
    except Stopped:
        step = max(trainer.global_step, safeguard.saved_step)  # Lightning knows it when training begins
        print_once(f"Stopped after step {step}. Go on with: vidprism finetune {shlex.join(argv)}")
        raise
    except TooManyBadClips as error:
        print_once(bad_clip_table(error.clips))
        raise
    finally:
        safeguard.release()


def tower_ensemble(cli: FinetuneCLI) -> list[Callback]:
    """What averages the tower for the final test, if the recipe asks for it.

    Raises:
        UserError: If the run has nothing to average with.
    """
    alpha, model = cli.config.export.wise_ft_alpha, cli.config.model
    return [] if alpha is None else [WiseFT(alpha, model.backbone, model.checkpoint)]


def build_trainer(cli: FinetuneCLI, output: Path, more: Sequence[Callback] = ()) -> Trainer:
    """The trainer of the recipe, with the run's loggers and callbacks."""
    checkpoints, exported = output / "checkpoints", cli.config_init.export.checkpoints
    keep = partial(ExportedCheckpoint, partial(export_kept, cli)) if exported else KeptCheckpoint
    export_last = partial(export_or_warn, partial(export_kept, cli, chosen=False))
    best = keep(
        dirpath=checkpoints, filename=Path(BEST).stem, monitor="val/top1", mode="max", enable_version_counter=False
    )
    callbacks = [
        best,
        Safeguard(checkpoints, cli.config_init.checkpoint, export_last if exported else None),
        BadClipReport(output),
        CardRecorder(),
        ScoreRecorder(cli.config_init.evaluation.average_clips),
        *more,
        *progress_bars(cli),
    ]
    loggers = [
        TensorBoardLogger(output, name="logs", version="tensorboard"),
        CSVLogger(output, name="logs", version=free_name(output / "logs" / "csv").name),
    ]
    asked = cli.config_init.trainer
    if asked.default_root_dir is not None:
        raise UserError("trainer.default_root_dir: the run's folder is output; set that")
    logger = loggers if asked.logger in (None, True) else asked.logger
    if logger:
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    trainer = cli.instantiate_trainer(default_root_dir=str(output), callbacks=callbacks, logger=logger)
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # neither the recipe's nor a strategy's own
        trainer.strategy.checkpoint_io = SafeCheckpointIO()
    for callback in trainer.callbacks:
        if isinstance(callback, PushToHub):  # a recipe's (trainer.callbacks), which cannot name a function
            callback.export = lambda trainer, module, folder: export_kept(cli, trainer, folder)
    return trainer


def best_checkpoint(output: Path) -> Path:
    """The run's best checkpoint, or its last one if no epoch was validated or the best one is damaged.

    By its place, not by the path that the checkpoint callback remembers: that of a resumed run may be from before
    the run's folder was moved.
    """
    best, last = (output / "checkpoints" / name for name in (BEST, LAST))
    if not best.exists():
        print_once("No epoch was validated (trainer.check_val_every_n_epoch): the last checkpoint is evaluated")
    elif cause := damage(best):
        print_once(f"{best} {cause}: the last checkpoint is evaluated")
    else:
        return best
    return last


def final_test(trainer: Trainer, cli: FinetuneCLI, output: Path) -> Evaluation:
    """Tests the best checkpoint, whose weights stay loaded.

    Raises:
        NotEvaluated: If that tells nothing; the weights are exported then, too.
    """
    chosen = len(kept_by(trainer, CardRecorder).validations) > 1
    facts, export = dataset_facts(cli.datamodule), output / "export"
    subject = subject_of(trainer, cli.model.model.config, cli.datamodule, str(export), facts, chosen)
    try:
        return evaluate_held_out(trainer, cli.model, cli.datamodule, subject, str(best_checkpoint(output)))
    except NotEvaluated as error:
        export_run(trainer, cli, Measured(f"Not evaluated: {error}.", chosen=chosen), export)
        raise NotEvaluated(f"{error} ({export} is written, without an evaluation)") from error


@rank_zero_only
def finish(trainer: Trainer, evaluation: Evaluation, output: Path) -> None:
    """Writes what the evaluation found, and last metrics.json, by which the run is finished: metrics and counts."""
    with only_run(output / "evaluation"):
        write_evaluation(evaluation)
    counts = {split: dataclasses.asdict(clip_counts(trainer, split)) for split in ("train", "val")}
    counts["val"]["evaluated"] = evaluation.evaluated
    atomic_write(
        output / METRICS,
        (json.dumps({**rounded(evaluation.values), "clips": counts}, indent=2, allow_nan=False) + "\n").encode(),
    )
    (output / "checkpoints" / PREVIOUS).unlink(missing_ok=True)


@rank_zero_only
def save_train_list(data: VideoDataModule, output: Path) -> None:
    """Writes train_clips.txt where the training clips were drawn or listed: the run's start is in time to find out
    that a name does not fit.
    """
    if data.hparams.shots or data.hparams.train_list:
        save_clip_list(data.train_table, output / TRAIN_LIST)


def check_checkpoint(name: str | None, output: Path) -> None:
    """Looks whether the model to start from would be moved away with the earlier run in the folder.

    Raises:
        UserError: If it would.
    """
    if name and os.path.exists(name) and output.resolve() in (path := Path(name).resolve(), *path.parents):
        raise UserError(f"model.checkpoint {name}: lies in output {output}; choose another output")


@rank_zero_only
def begin_once(cli: FinetuneCLI, output: Path) -> Start:
    """Decides on the first process how the run begins, which its saved settings will not tell."""
    resume, cli.config.resume = str(cli.config.resume), AUTO  # jsonargparse lets null pass
    settings = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    start = begin(output, resume, settings)
    if start.checkpoint is not None:
        refuse_other_content(output / "export")  # now, not when the training has ended
    if start.data:
        cli.datamodule.load_state_dict(start.data)  # now, before the lists of the run are written anew
    return start if start.run else dataclasses.replace(start, run=settings_hash(settings))


@rank_zero_only
def save_settings(cli: FinetuneCLI, output: Path, start: Start) -> None:
    """Writes all settings to the run's folder, at its start: config.yaml is what tells that it is one.

    Raises:
        UserError: If the folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        settings = identified(start.run, cli.parser.dump(cli.config, skip_none=False))
        atomic_write(output / "config.yaml", settings.encode())
    except OSError as error:
        raise not_writable(output, error) from error


def print_bad_clips(clips: list[BadClip]) -> None:
    """The clips that could not be decoded, if there are any."""
    if clips:
        print_once(bad_clip_table(clips))


def print_usage(export: Path, evaluation: Evaluation) -> None:
    """The three lines that end a run."""
    classify = f"t.pipeline('video-classification', '{export}')('CLIP.mp4')"
    code = f"import vidprism_hf, transformers as t; print({classify})"
    top1, clips = evaluation.values["top1"], evaluation.counts.phrase("clips")
    if evaluation.is_partial:
        clips += f" (only {evaluation.evaluated} were evaluated)"
    if evaluation.evaluated < FEW_CLIPS:
        low, high = evaluation.intervals["top1"]
        clips += f" (caution: so few say little, the 95 % interval is {low:.2f} to {high:.2f})"
    print_once(f"Held-out top-1 {top1:.4f} on {clips}; exported to {export}")
    print_once(f"  vidprism predict {export} CLIP.mp4")
    print_once(f'  python -c "{code}"')
