"""Evaluates any video classifier on the validation split of a data module and writes the results."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download, snapshot_download
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..data import VideoDataModule
from ..data.bad_videos import bad_clip_table
from ..data.open import dataset_facts
from ..data.reading.processor import load_processor, processor_for
from ..distributed import print_once
from ..errors import UserError, first_line, why_not_loaded
from ..hub.card import eval_results, evaluation_body
from ..hub.export import README, is_vidprism_config
from ..hub.markdown import Markdown, escape
from ..hub.merge import states_results, with_evaluation
from ..hub.own_files import NotOwn, located, read_own
from ..locks import lock_path, only_run
from ..model import VidPrismConfig, VidPrismForVideoClassification
from ..quiet import quiet_lightning
from ..signals import SignalWatch
from ..stalls import COLLECTIVE_TIMEOUT, LONG, StallWatch
from .checkpoints import load_checkpoint
from .labels import matched_labels
from .other_models import TestedClassifier, load_other
from .records import check_folder, evaluations_of, write_evaluation
from .report import Evaluation, Subject, print_evaluation
from .scores import AverageClips, ScoreRecorder
from .testing import evaluate_held_out, make_trainer, progress_bars, subject_of

# Files of an export that evaluation needs.
EXPORT_FILES = {"allow_patterns": ["*.json", "*.safetensors"], "ignore_patterns": ["*/*"]}
WHOLE_VIDEO = (
    "{}: frames are from the whole video (data.frame_stride is null), which may not be how it was trained; "
    "see vidprism evaluate --help"
)


def evaluate(
    model: str | PreTrainedModel,
    data: VideoDataModule,
    *,
    output: str | None = None,
    average_clips: AverageClips = "score",
    revision: str | None = None,
    num_frames: int | None = None,
    trainer: Mapping[str, Any] | None = None,
    collective_timeout: float = COLLECTIVE_TIMEOUT,
) -> Evaluation:
    """Evaluates a video classifier on the validation split: every video once, in all test views.

    Prints and writes the results, and refreshes the card of a local export. Use it to test an export again, on other
    data or with other views, or to compare with other models.

    Args:
        model: Export or Hub id of any video classifier of transformers (VidPrism, VideoMAE, TimeSformer, ViViT,
            V-JEPA 2), or a VidPrism model in memory. Its own processor prepares the input.
        data: Source of the videos; labels are matched by name.
        output: Folder for evaluation.json and confusion.png; None uses one below `evaluation/` beside the model's
            folder, or below runs/ for a model on the Hub.
        average_clips: Averages the logits (`score`) or the probabilities (`prob`) over the views of a video.
        revision: Branch, tag or commit of a model on the Hub.
        num_frames: Frames per view, for a VidPrism without learned positions; None takes the model's.
        trainer: Arguments of Lightning's Trainer: devices, precision, ...
        collective_timeout: Seconds a rank waits for another one before all are stopped.

    Raises:
        UserError: If the model cannot be loaded, or its labels are not the data's.

    Example:
        ```python
        found = evaluate("runs/mine/export", VideoDataModule("clips", val_fraction=0.2))
        print(found.values["top1"], found.intervals["top1"])
        ```
    """
    tested = load_tested(model, data, revision, num_frames)
    data.video_processor = tested.processor
    recorder, settings = ScoreRecorder(average_clips), dict(trainer or {})
    # With Lightning's own SIGTERM handler, ranks that wait for each other wait until they are killed.
    ends = LambdaCallback(on_test_start=lambda trainer, module: SignalWatch().leave_at_once(trainer))
    bars = progress_bars(settings.get("enable_progress_bar"))
    if settings.get("strategy") in ("ddp", "fsdp"):  # nothing is trained: each rank has the whole model
        settings["strategy"] = DDPStrategy(timeout=timedelta(seconds=LONG * collective_timeout))
    callbacks = [recorder, ends, StallWatch(collective_timeout), *bars]
    with quiet_lightning():
        built = make_trainer(settings, callbacks, logger=False, use_distributed_sampler=False)
    facts = dataset_facts(data.hparams)
    subject = subject_of(built, tested.module.model.config, data, tested.name, facts)
    subject = replace(subject, commit=tested.commit, chose_checkpoint=chose_checkpoint(subject))
    rank_zero_only(check_folder)(subject, output)
    with quiet_lightning():
        evaluation = evaluate_held_out(built, tested.module, data, subject)
    keep_and_tell(evaluation, output)
    return evaluation


@dataclass
class Tested:
    """A model that is ready to be tested.

    Attributes:
        name: Folder or Hub id.
        commit: Commit of a model on the Hub.
        module: Its test step returns logits in the order of the data's classes.
        processor: Prepares its input.
    """

    name: str
    commit: str | None
    module: TestedClassifier
    processor: Any


def load_tested(
    model: str | PreTrainedModel, data: VideoDataModule, revision: str | None, num_frames: int | None
) -> Tested:
    """Loads a model and matches its classes to the data's. Does not run code from its repository.

    Raises:
        UserError: If the model cannot be loaded, or its labels are not the data's.
    """
    if isinstance(model, PreTrainedModel):
        if not isinstance(model, VidPrismForVideoClassification):
            raise UserError(f"{type(model).__name__}: only a VidPrism is evaluated in memory; give a folder or Hub id")
        name, frames = model.name_or_path or type(model).__name__, num_frames or model.config.num_frames
        order = matched_labels(name, model.config.id2label, data.id2label)
        processor = processor_for(model)
        processor.num_frames = frames
        return Tested(name, None, TestedClassifier(model, order), processor)
    config, commit = find(model, revision)
    if isinstance(config, VidPrismConfig):
        frames = num_frames or config.num_frames
        place = fetched(model, commit) if commit else model
        classifier = load_checkpoint(place, data.id2label, frames)
        return Tested(model, commit, TestedClassifier(classifier), load_processor(place, frames))
    other, processor = load_other(model, config, commit)
    if num_frames and num_frames != processor.num_frames:
        raise UserError(f"model.num_frames={num_frames}: {model} takes {processor.num_frames} frames; leave it out")
    order = matched_labels(model, config.id2label, data.id2label)
    data.hparams.feature_cache = None  # of a VidPrism's tower
    if data.hparams.frame_stride is None:
        print_once(WHOLE_VIDEO.format(model))
    return Tested(model, commit, TestedClassifier(other, order), processor)


def find(name: str, revision: str | None) -> tuple[PreTrainedConfig, str | None]:
    """Returns a model's configuration and, on the Hub, the commit of its revision.

    Raises:
        UserError: If there is no such model or revision.
    """
    if revision == "":
        raise UserError("--revision: is empty; name a branch, tag or commit, or leave it out")
    if os.path.isdir(name) and revision is not None:
        raise UserError(f"--revision {revision}: {name} is a folder, which has none; leave it out")
    commit, unknown = None, None
    if not os.path.isdir(name):
        try:  # the cache stores files by commit, which is therefore known offline too
            commit = Path(hf_hub_download(name, CONFIG_NAME, revision=revision)).parent.name
        except (OSError, ValueError) as error:  # loading the model fails too, with a better message
            unknown = error
    place = name if revision is None else f"{name} at {revision}"
    try:
        config = AutoConfig.from_pretrained(name, revision=commit or revision, trust_remote_code=False)
    except Exception as error:  # transformers may raise anything on invalid files
        raise UserError(f"{place}: cannot be loaded ({why_not_loaded(name, error)})") from error
    if unknown is not None:
        raise UserError(f"{place}: cannot be loaded ({first_line(unknown)})") from unknown
    return config, commit


def fetched(name: str, commit: str) -> str:
    """Downloads an export from the Hub at a commit and returns its folder; checkpoints have no revisions.

    Raises:
        UserError: If it cannot be downloaded.
    """
    try:
        return snapshot_download(name, revision=commit, **EXPORT_FILES)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} at {commit}: cannot be loaded ({first_line(error)})") from error


def chose_checkpoint(subject: Subject) -> bool:
    """Returns whether these videos selected the checkpoint of a local export, according to its split.json."""
    try:
        split = json.loads(read_own(Path(subject.model), "split.json"))
        chosen, known = split["chosen_on_val"], split["val"]["sha256"]
        alike = (split["val"]["clips"], split["split"]) == (subject.num_clips, subject.split)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(chosen) and (known == subject.sha256 if known and subject.sha256 else alike)


@rank_zero_only
def keep_and_tell(evaluation: Evaluation, output: str | None) -> None:
    """Prints an evaluation, writes its files, and refreshes the card of a local export.

    Raises:
        UserError: If a file cannot be written.
    """
    if evaluation.unreadable:
        print(bad_clip_table(evaluation.unreadable))
    print_evaluation(evaluation)
    with only_run(Path(output) if output else evaluations_of(evaluation)):
        folder = write_evaluation(evaluation, output)
    print(f"\nWritten to {folder}")
    export = Path(evaluation.model)
    if is_vidprism_config(export / "config.json"):
        told = refresh_export(evaluation, export)
        print(f"Refreshed: {', '.join(told)}" if told else f"{export / README}: left as it is")


def refresh_export(evaluation: Evaluation, export: Path) -> list[str]:
    """Adds an evaluation to an export's card and, if the dataset is on the Hub, to its `.eval_results`.

    A README without a generated part is left alone. Partial evaluations are not added.

    Returns:
        The files that were written.
    """
    if evaluation.is_partial:
        return []
    files = {}
    try:
        with only_run(export):
            readme = existing(export, README).decode()
            title = escape(f"On {evaluation.dataset} ({evaluation.split}), {evaluation.protocol}")
            refreshed = with_evaluation(readme, title, card_body(evaluation, states_results(readme)))
            if refreshed != readme:
                files[README] = refreshed.encode()
            if evaluation.dataset_id:
                notes = f"{evaluation.conditions}. By vidprism evaluate, {' '.join(told(evaluation))}"
                names = [f".eval_results/{path.name}" for path in export.glob(".eval_results/*.yaml")]
                known = {name: read_own(export, name) for name in names}
                measured = evaluation.dataset_id, evaluation.values
                files |= eval_results(*measured, evaluation.conditions, notes, known)
            for path, content in files.items():
                replace_file(export, path, content)
    except NotOwn:
        raise
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{export}: its card cannot be refreshed ({first_line(error)})") from error
    return list(files)


def existing(export: Path, name: str) -> bytes:
    """Returns the content of an export's file; empty if it does not exist."""
    return read_own(export, name) if os.path.lexists(export / name) else b""


def told(evaluation: Evaluation) -> list[str]:
    """Returns sentences on the number of videos evaluated, and the caveats."""
    used = evaluation.counts.phrase("held-out clips")
    return [f"on {used}. A clip that cannot be decoded counts as wrong.", *evaluation.caveats]


def card_body(evaluation: Evaluation, has_results: bool) -> str:
    """Renders an evaluation for the card, below its title.

    Args:
        evaluation: The results.
        has_results: Whether the card's metadata have results already.
    """
    sentences = told(evaluation)
    if has_results:
        sentences.append("The metadata of this card have the results of its export.")
    measured = evaluation.values, evaluation.intervals, evaluation.evaluated
    protocol = Markdown(f"By `vidprism evaluate`, {escape(' '.join(sentences))}")
    return evaluation_body(protocol, *measured, len(evaluation.labels), evaluation.classes)


def replace_file(export: Path, name: str, content: bytes) -> None:
    """Writes an export's file atomically, under the export's lock.

    The temporary file is beside the lock: an export with a stray file would be invalid, and the next write replaces
    the remains of a killed one.
    """
    located(export, os.path.dirname(name))
    beside = lock_path(export).with_suffix(".tmp")
    beside.write_bytes(content)
    (export / name).parent.mkdir(exist_ok=True)
    os.replace(beside, export / name)
