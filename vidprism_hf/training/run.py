"""A whole run: train, evaluate the best checkpoint, export; stopped or killed, the same call resumes it.

The folder of a run holds config.yaml, logs/, checkpoints/{best,last}.ckpt, export/, evaluation/ and, when the run is
finished, metrics.json. push/ holds exports that a PushToHub callback could not publish.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from ..data import VideoDataModule
from ..data.bad_videos import BadClip, TooManyBadClips, bad_clip_table
from ..data.open import dataset_facts
from ..data.sources.splits import save_clip_list
from ..distributed import print_once
from ..errors import UserError
from ..evaluation.records import write_evaluation
from ..evaluation.report import Evaluation, rounded
from ..evaluation.testing import EvaluationSettings, NotEvaluated, evaluate_held_out, subject_of
from ..hub.export import refuse_other_content
from ..hub.licenses import check_license
from ..hub.push import PushResult, push_export
from ..locks import not_writable, only_run
from ..model import VidPrismForVideoClassification
from ..model.loading import load_classifier
from ..quiet import quiet_lightning
from ..signals import Stopped
from ..util import atomic_write
from .callbacks.push import push_open
from .callbacks.recorder import CardRecorder, Measured, bad_clips, clip_counts, kept_by, switched_on
from .checkpoint.callback import Safeguard
from .checkpoint.files import BEST, LAST, PREVIOUS, CheckpointSettings, damage
from .checkpoint.resume import AUTO, METRICS, NONE, Start, agreed, begin, changed_settings, identified, settings_hash
from .checks import lightnings_complaints
from .exporting import TRAIN_LIST, ExportSettings, export_best, export_run
from .module import VidPrismLightningModule
from .plan import RunPlan
from .trainer import build_trainer, tower_ensemble, training_trainer

# On fewer videos the 95 % interval (Wilson) of a top-1 of one half is 0.3 wide or more: it says little.
FEW_VIDEOS = 40

Classifier = VidPrismForVideoClassification | VidPrismLightningModule


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: Of the run.
        export: The exported model below it: `from_pretrained` and `pipeline` load it.
        evaluation: What the final test found.
    """

    folder: Path
    export: Path
    evaluation: Evaluation

    def push_to_hub(self, repo: str, **options: Any) -> PushResult:
        """Publishes the export.

        Args:
            repo: Repository on the Hub, org/name; created if it does not exist.
            options: See `vidprism_hf.push`.
        """
        return push_export(self.export, repo, **options)


def finetune(
    model: Classifier,
    data: VideoDataModule,
    output: str | os.PathLike = "runs/finetune",
    *,
    max_epochs: int | None = None,
    resume: str = AUTO,
    seed: int = 0,
    checkpoint: CheckpointSettings | None = None,
    export: ExportSettings | None = None,
    evaluation: EvaluationSettings | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Run:
    """Trains a classifier, evaluates its best checkpoint on the validation split, and exports it with a model card.

    Called again with the same settings it resumes a run that was stopped, and returns one that is finished. A finished
    run of other settings stays, renamed, and a new one starts. For training settings other than the defaults, pass a
    `VidPrismLightningModule`.

    Args:
        model: The classifier, trained in place: it has the best weights in the end.
        data: Where the videos come from; its labels must be the model's.
        output: Folder of the run.
        max_epochs: Epochs to train; None takes the trainer's (30).
        resume: `auto` resumes a stopped run in the folder; `none` starts a fresh one and keeps the folder as
            `<folder>.1`; a checkpoint of the folder resumes from there.
        seed: Of everything random in training that the data's own seed does not cover.
        checkpoint: How often checkpoints are written.
        export: How the weights are published: precision, licence, WiSE-FT.
        evaluation: How the final test is done.
        trainer: Arguments of Lightning's Trainer: devices, strategy, precision, callbacks, ...

    Returns:
        The finished run.

    Raises:
        UserError: If data or settings do not fit.
        Stopped: A `SystemExit`, when a signal stopped the run after its checkpoint was written.

    Example:
        ```python
        data = VideoDataModule("clips", val_fraction=0.2)
        model = VidPrismForVideoClassification.from_vision_pretrained("b16", id2label=data.id2label, num_frames=16)
        run = finetune(model, data, output="runs/mine", max_epochs=10)
        print(run.evaluation.values["top1"], run.export)
        ```
    """
    asked = dict(trainer or {}) | ({} if max_epochs is None else {"max_epochs": max_epochs})
    L.seed_everything(seed, workers=True, verbose=False)
    plan = RunPlan(
        as_module(model, data),
        data,
        Path(output),
        resume,
        seed,
        checkpoint or CheckpointSettings(),
        export or ExportSettings(),
        evaluation or EvaluationSettings(),
        asked,
    )
    if resume == AUTO and (found := finished_run(plan)):
        return found
    return run(plan)


def finished_run(plan: RunPlan) -> Run | None:
    """Returns the finished run of a plan, whose weights go into the plan's model; None if there is none."""
    folder, exported = plan.output, plan.output / "export"
    if not (folder / METRICS).is_file() or not exported.is_dir() or changed_settings(folder, plan.recipe()):
        return None
    values = json.loads((folder / METRICS).read_bytes())
    for path in sorted((folder / "evaluation").glob("*/evaluation.json")):
        evaluation = Evaluation.from_json(path.read_bytes())
        if evaluation.values.items() <= values.items():
            print_once(f"The run in {folder} is finished; it is not trained again (resume={NONE!r} starts a fresh one)")
            plan.module.configure_model()
            plan.module.model.load_state_dict(load_classifier(str(exported)).state_dict())
            return Run(folder, exported, evaluation)
    return None


def as_module(model: Classifier, data: VideoDataModule) -> VidPrismLightningModule:
    """Returns the module that trains a model, with the default settings unless it is one already.

    Raises:
        UserError: If the model's labels are not the data's.
    """
    module = model if isinstance(model, VidPrismLightningModule) else VidPrismLightningModule.from_model(model)
    if module.id2label != data.id2label:
        raise UserError(
            "id2label: the model's labels are not the data's; build it with id2label=data.id2label "
            f"({len(module.id2label)} and {len(data.id2label)} labels)"
        )
    return module


def run(plan: RunPlan) -> Run:
    """Carries out a plan: trains, evaluates and exports, in a folder that is this run's own.

    Raises:
        UserError: If data or settings do not fit.
        ExportError: If the export cannot be written.
    """
    check_license("export.license", plan.export.license)
    check_start(plan)
    tower_ensemble(plan)
    # What this machine cannot give shows before the run has a folder.
    with quiet_lightning():
        training_trainer({**plan.trainer, "callbacks": None}, logger=False, enable_checkpointing=False)
    with quiet_lightning(), only_run(plan.output) if rank_zero_only.rank == 0 else nullcontext():
        return _run(plan)


def _run(plan: RunPlan) -> Run:
    start = begin_once(plan)
    save_settings(plan, start)
    save_train_list(plan.data, plan.output)
    trainer = build_trainer(plan)
    print_once(f"Run folder: {plan.output}")
    with push_open(trainer) as publish:
        fit(trainer, plan, agreed(trainer, plan.module, start))
        evaluation = final_test(trainer, plan)
        exported = export_best(trainer, plan, evaluation, plan.output / "export")
        print_bad_clips(bad_clips(trainer))
        print_usage(exported, evaluation)
        publish(exported)
    finish(trainer, evaluation, plan.output)  # last: the same command would start a fresh run
    return Run(plan.output, exported, evaluation)


def fit(trainer: Trainer, plan: RunPlan, start: Start) -> None:
    """Trains; where it ends early, says how to resume, or which videos were bad."""
    if start.data:
        plan.data.load_state_dict(start.data)
    safeguard = kept_by(trainer, Safeguard)
    safeguard.begun, safeguard.run = start.begun, start.run
    settings = {name: value for name, value in switched_on(trainer, plan).items() if value is not None}
    print_once(f"Training: {'; '.join(f'{name} {value}' for name, value in settings.items())}")
    try:
        with lightnings_complaints():
            trainer.fit(plan.module, datamodule=plan.data, ckpt_path=start.checkpoint, weights_only=True)
    except Stopped:
        step = max(trainer.global_step, safeguard.saved_step)  # Lightning knows it when training begins
        print_once(f"Stopped after step {step}. Go on with: {plan.command}")
        raise
    except TooManyBadClips as error:
        print_once(bad_clip_table(error.clips))
        raise
    finally:
        safeguard.release()


def best_checkpoint(output: Path) -> Path:
    """Returns the run's best checkpoint, or its last one if no epoch was validated or the best one is damaged.

    By its place, not by the path that the checkpoint callback remembers: the folder of a resumed run may have moved.
    """
    best, last = (output / "checkpoints" / name for name in (BEST, LAST))
    if not best.exists():
        print_once("No epoch was validated (trainer.check_val_every_n_epoch): the last checkpoint is evaluated")
    elif cause := damage(best):
        print_once(f"{best} {cause}: the last checkpoint is evaluated")
    else:
        return best
    return last


def final_test(trainer: Trainer, plan: RunPlan) -> Evaluation:
    """Tests the best checkpoint, whose weights stay loaded.

    Raises:
        NotEvaluated: If that tells nothing; the weights are exported then, too.
    """
    chosen = len(kept_by(trainer, CardRecorder).validations) > 1
    facts, export = dataset_facts(plan.data.hparams), plan.output / "export"
    subject = subject_of(trainer, plan.module.model.config, plan.data, str(export), facts, chosen)
    try:
        return evaluate_held_out(trainer, plan.module, plan.data, subject, str(best_checkpoint(plan.output)))
    except NotEvaluated as error:
        export_run(trainer, plan, Measured(f"Not evaluated: {error}.", chosen=chosen), export)
        raise NotEvaluated(f"{error} ({export} is written, without an evaluation)") from error


@rank_zero_only
def finish(trainer: Trainer, evaluation: Evaluation, output: Path) -> None:
    """Writes what the evaluation found, and last metrics.json, which marks the run as finished: metrics and counts."""
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
    """Writes train_clips.txt where the training videos were drawn or listed, at the start of the run: a name that does
    not fit shows now.
    """
    if data.hparams.shots or data.hparams.train_list:
        save_clip_list(data.train_table, output / TRAIN_LIST)


def check_start(plan: RunPlan) -> None:
    """Checks that the model to start from is not in the folder of an earlier run, which would be renamed.

    Raises:
        UserError: If it is.
    """
    name, output = plan.module.hparams.checkpoint, plan.output
    if name and os.path.exists(name) and output.resolve() in (path := Path(name).resolve(), *path.parents):
        raise UserError(f"model.checkpoint {name}: lies in output {output}; choose another output")


@rank_zero_only
def begin_once(plan: RunPlan) -> Start:
    """Decides on the first rank whether the run starts fresh or resumes."""
    settings = plan.recipe()
    start = begin(plan.output, str(plan.resume), settings)
    if start.checkpoint is not None:
        refuse_other_content(plan.output / "export")  # now, not when the training has ended
    if start.data:
        plan.data.load_state_dict(start.data)  # now, before the lists of the run are written again
    return start if start.run else dataclasses.replace(start, run=settings_hash(settings))


@rank_zero_only
def save_settings(plan: RunPlan, start: Start) -> None:
    """Writes all settings to the run's folder, at its start: config.yaml marks a folder as a run's.

    Raises:
        UserError: If the folder cannot be written.
    """
    try:
        plan.output.mkdir(parents=True, exist_ok=True)
        atomic_write(plan.output / "config.yaml", identified(start.run, plan.to_yaml()).encode())
    except OSError as error:
        raise not_writable(plan.output, error) from error


def print_bad_clips(clips: list[BadClip]) -> None:
    """Prints the videos that could not be decoded, if there are any."""
    if clips:
        print_once(bad_clip_table(clips))


def print_usage(export: Path, evaluation: Evaluation) -> None:
    """Prints the three lines that end a run."""
    classify = f"t.pipeline('video-classification', '{export}')('CLIP.mp4')"
    code = f"import vidprism_hf, transformers as t; print({classify})"
    top1, clips = evaluation.values["top1"], evaluation.counts.phrase("clips")
    if evaluation.is_partial:
        clips += f" (only {evaluation.evaluated} were evaluated)"
    if evaluation.evaluated < FEW_VIDEOS:
        low, high = evaluation.intervals["top1"]
        clips += f" (caution: so few say little, the 95 % interval is {low:.2f} to {high:.2f})"
    print_once(f"Held-out top-1 {top1:.4f} on {clips}; exported to {export}")
    print_once(f"  vidprism predict {export} CLIP.mp4")
    print_once(f'  python -c "{code}"')
