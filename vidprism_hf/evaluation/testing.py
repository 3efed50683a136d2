"""The one way to evaluate: a trainer's test over the held-out clips in all their views, and what it comes to."""

from collections.abc import Mapping
from dataclasses import dataclass

import lightning as L
from lightning.pytorch import Trainer

from ..data import VideoDataModule
from ..data.bad_clips import BadClip
from .compute import cost
from .metrics import measure
from .report import Evaluation, Protocol
from .scores import AverageClips, ScoreRecorder


@dataclass
class EvaluationSettings:
    """How held-out clips are evaluated: by evaluate, and at the end of finetune. Views are settings of the data.

    Args:
        average_clips: What is averaged over the views of a clip: score, the logits, or prob, the probabilities.
        output: Folder that evaluate writes evaluation.json and confusion.png into; null is one below evaluation/
            beside the model's folder, or below runs/ for an id of the Hub.
    """

    average_clips: AverageClips = "score"
    output: str | None = None


def evaluate_held_out(
    trainer: Trainer,
    module: L.LightningModule,
    data: VideoDataModule,
    model: str,
    facts: Mapping[str, str],
    checkpoint: str | None = None,
) -> Evaluation:
    """Tests a module on the held-out clips. All processes call it, and each gets the result for all clips.

    Args:
        trainer: With a ScoreRecorder among its callbacks.
        module: Its test step gives `logits` (B, views, K), and its `model` has a `config`.
        data: Where the clips come from.
        model: What the model is called.
        facts: `dataset`, its name, and `dataset_id`, where it has one.
        checkpoint: Lightning checkpoint to test, which stays loaded; None tests the module as it is.
    """
    trainer.test(module, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    (recorder,) = (callback for callback in trainer.callbacks if isinstance(callback, ScoreRecorder))
    found, settings, id2label = recorder.result, data.hparams, data.id2label
    unreadable = [BadClip("val", name, id2label[label], cause) for name, (label, cause) in found.notes.items()]
    frames, crop = data.video_processor.num_frames, data.video_processor.crop_size
    evaluation = Evaluation(
        model=model,
        dataset=facts["dataset"],
        dataset_id=facts.get("dataset_id"),
        split=data.split_description,
        protocol=Protocol(
            frames, settings.test_crops, settings.test_clips, settings.frame_stride, recorder.average_clips
        ),
        labels=[id2label[index] for index in range(len(id2label))],
        metrics=measure(found.scores, found.labels, found.readable),
        num_clips=data.num_clips["val"],
        missing=tuple(data.splits.missing.get("val", ())),
        unreadable=unreadable,
        cost=cost(module.model.config, frames, (crop["height"], crop["width"])),
    )
    if trainer.is_global_zero and evaluation.evaluated < evaluation.num_clips:
        print(f"trainer.limit_test_batches={trainer.limit_test_batches}: not all held-out clips were evaluated")
    return evaluation
