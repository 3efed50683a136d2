"""The one way to evaluate: a trainer's test over the held-out clips in all their views, and what it comes to."""

from collections.abc import Mapping
from dataclasses import dataclass

import lightning as L
import numpy as np
from lightning.pytorch import Trainer
from transformers import PreTrainedConfig

from ..data import VideoDataModule
from ..data.bad_clips import BadClip
from ..data.few_shot import clip_list_hash
from ..errors import UserError
from .compute import cost
from .metrics import measure
from .report import Evaluation, Protocol, Subject
from .scores import AverageClips, ScoreRecorder


@dataclass
class EvaluationSettings:
    """How held-out clips are evaluated: by evaluate, and at the end of finetune. Views are settings of the data.

    Args:
        average_clips: What is averaged over the views of a clip: score, the logits, or prob, the probabilities.
        output: Folder that evaluate writes evaluation.json and confusion.png into; null is one below evaluation/
            beside the model's folder, or below runs/ for a model on the Hub.
    """

    average_clips: AverageClips = "score"
    output: str | None = None


class NotEvaluated(UserError):
    """A test that was gone through and tells no accuracy; the module has the weights that were tested."""


def subject_of(
    trainer: Trainer,
    config: PreTrainedConfig,
    data: VideoDataModule,
    model: str,
    facts: Mapping[str, str],
    chose_checkpoint: bool = False,
) -> Subject:
    """What a test of a model on the held-out clips will be of.

    Args:
        trainer: With a ScoreRecorder among its callbacks.
        config: Of the model.
        data: Where the clips come from.
        model: What the model is called.
        facts: `dataset`, its name, and `dataset_id`, where it has one.
        chose_checkpoint: Whether the held-out clips chose this checkpoint among others.
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
    """Tests a module on the held-out clips. All processes call it, and each gets the result for all clips.

    Args:
        trainer: With a ScoreRecorder among its callbacks.
        module: Its test step gives `logits` (B, views, K).
        data: Where the clips come from.
        subject: What `subject_of` tells of these.
        checkpoint: Lightning checkpoint to test, which stays loaded; None tests the module as it is.

    Raises:
        NotEvaluated: If no clip was seen, or one more than once.
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
    """The trainer's recorder of scores."""
    (recorder,) = (callback for callback in trainer.callbacks if isinstance(callback, ScoreRecorder))
    return recorder
