"""Tests a module on the validation split in all views; shared by finetune and evaluate."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedConfig

from ..data import VideoDataModule
from ..data.bad_videos import BadClip
from ..data.sources.splits import clip_list_hash
from ..errors import UserError, first_line
from .compute import cost
from .metrics import measure
from .report import Evaluation, Protocol, Subject
from .scores import AverageClips, ScoreRecorder


@dataclass
class EvaluationSettings:
    """How the validation split is evaluated, by evaluate and at the end of finetune. The data sets the views.

    Args:
        average_clips: Averages the logits (score) or the probabilities (prob) over the views of a video.
        output: Folder of evaluate's evaluation.json and confusion.png; null uses one below evaluation/ beside the
            model's folder, or below runs/ for a model on the Hub.
    """

    average_clips: AverageClips = "score"
    output: str | None = None


class NotEvaluated(UserError):
    """A test finished without a valid accuracy; the module has the tested weights."""


def subject_of(
    trainer: Trainer,
    config: PreTrainedConfig,
    data: VideoDataModule,
    model: str,
    facts: Mapping[str, str],
    chose_checkpoint: bool = False,
) -> Subject:
    """Collects the metadata of an evaluation before the test.

    Args:
        trainer: A trainer with a ScoreRecorder callback.
        config: The model's configuration.
        data: Source of the videos.
        model: The model's name.
        facts: `dataset`, its name, and `dataset_id` if it has one.
        chose_checkpoint: Whether the checkpoint was selected on the validation split.
    """
    settings, id2label = data.hparams, data.id2label
    frames, crop = data.video_processor.num_frames, data.video_processor.crop_size
    views = settings.test_crops, settings.test_clips, settings.frame_stride
    return Subject(
        model=model,
        dataset=facts["dataset"],
        dataset_id=facts.get("dataset_id"),
        split=data.split_description,
        sha256=None if settings.streaming else clip_list_hash(data.val_table),
        protocol=Protocol(frames, *views, recorder_of(trainer).average_clips, trainer.precision),
        labels=[id2label[index] for index in range(len(id2label))],
        num_clips=data.num_clips["val"],
        missing=tuple(data.splits.missing.get("val", ())),
        cost=cost(config, frames, (crop["height"], crop["width"])),
        chose_checkpoint=chose_checkpoint,
    )


def evaluate_held_out(
    trainer: Trainer,
    module: L.LightningModule,
    data: VideoDataModule,
    subject: Subject,
    checkpoint: str | None = None,
) -> Evaluation:
    """Tests a module on the validation split. Call it on all ranks; each gets the full result.

    Args:
        trainer: A trainer with a ScoreRecorder callback.
        module: Its test step returns `logits` (B, views, K).
        data: Source of the videos.
        subject: Metadata from `subject_of`.
        checkpoint: Lightning checkpoint to load and test; None tests the module as it is.

    Raises:
        NotEvaluated: If no video was tested, one was tested twice, or scores are not finite.
    """
    trainer.test(module, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    found = recorder_of(trainer).result
    if found is None:
        raise NotEvaluated("trainer.limit_test_batches: no held-out clip is evaluated; set it to 1 or more")
    if found.repeated:
        raise NotEvaluated(
            f"{found.repeated[0]}: was evaluated more than once ({len(found.repeated)} such clips); list each held-out "
            "clip once, and leave trainer.use_distributed_sampler false"
        )
    if nowhere := int((found.readable & np.isnan(found.scores).any(axis=1)).sum()):
        raise NotEvaluated(
            f"{subject.model}: the scores of {nowhere} clips are not finite numbers; its weights or its processor's "
            "settings are damaged, or it needs a precision with a wider range (trainer.precision)"
        )
    unreadable = [BadClip("val", name, data.id2label[label], cause) for name, (label, cause) in found.notes.items()]
    metrics = measure(found.scores, found.labels, found.readable)
    return Evaluation(**vars(subject), metrics=metrics, unreadable=unreadable)


def recorder_of(trainer: Trainer) -> ScoreRecorder:
    """Returns the trainer's ScoreRecorder."""
    (recorder,) = (callback for callback in trainer.callbacks if isinstance(callback, ScoreRecorder))
    return recorder


def make_trainer(settings: Mapping[str, Any], callbacks: Sequence[Callback], **own: Any) -> Trainer:
    """Builds a trainer.

    Args:
        settings: Arguments of Lightning's Trainer.
        callbacks: Our callbacks. They run first, so that exports by a recipe's callbacks include their records.
        own: More arguments, which take precedence.

    Raises:
        UserError: If the settings are invalid on this machine.
    """
    # A new list, because a trainer appends its default callbacks to the list it gets.
    own["callbacks"] = [*callbacks, *callbacks_of(settings)]
    try:
        return Trainer(**dict(settings) | own)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"trainer: {first_line(error)}") from error


def callbacks_of(settings: Mapping[str, Any]) -> list[Callback]:
    """Returns the callbacks among the arguments of a Trainer."""
    asked = settings.get("callbacks") or []
    return list(asked) if isinstance(asked, (list, tuple)) else [asked]


def progress_bars(enabled: bool | None = None) -> list[Callback]:
    """Returns a Rich bar on a terminal and plain lines in a log file; none if `enabled` is False."""
    if enabled is False:
        return []
    return [RichProgressBar() if os.isatty(1) else TQDMProgressBar(refresh_rate=20)]
