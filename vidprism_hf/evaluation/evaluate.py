"""`vidprism evaluate`: any classifier of videos on the held-out clips of a recipe's data.

As ablate.py it knows the training, whose recipes it reads.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import lightning as L
import yaml
from huggingface_hub import hf_hub_download, snapshot_download
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities import rank_zero_only
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from ..data.bad_clips import bad_clip_table
from ..data.ranks import print_once
from ..errors import UserError, first_line, why_not_loaded
from ..hub.card import eval_results, evaluation_body
from ..hub.card_merge import states_results, with_evaluation
from ..hub.export import README, is_vidprism_config
from ..hub.markdown import Markdown, escape
from ..hub.own_files import NotOwn, located, read_own
from ..model import VidPrismConfig
from ..training.callbacks import BadClipReport
from ..training.card_facts import dataset_facts
from ..training.module import read_checkpoint_config
from ..training.recipe import FinetuneCLI, parse, progress_bars
from ..training.run_lock import lock_path, only_run
from ..training.signals import SignalWatch
from .labels import matched_labels
from .other_models import OtherClassifier, load_other
from .records import check_folder, evaluations_of, write_evaluation
from .report import Evaluation, Subject, print_evaluation
from .scores import ScoreRecorder
from .testing import evaluate_held_out, subject_of

USAGE = """usage: vidprism evaluate MODEL --config RECIPE [--key value]

MODEL is an export, or any video classifier of transformers in a folder or on the Hub: VidPrism, VideoMAE, TimeSformer,
ViViT, V-JEPA 2. Keys are those of `vidprism finetune --help`, among them

  --revision REVISION                     branch, tag or commit of a model on the Hub (main)
  --model.num_frames N                    frames of a view, for a VidPrism without learned positions; else the model's
  --data.frame_stride N                   of each clip every Nth frame; without it frames are from the whole video
  --data.test_clips N                     clips of each video, from N places in time
  --data.test_crops 3                     crops of each clip, along the longer side
  --evaluation.average_clips score|prob   average the views' logits (the default), or their probabilities
  --evaluation.output FOLDER              where evaluation.json and confusion.png go
  --trainer.devices N                     processes, among which the clips are shared
  --trust-recipe                          lets the recipe name any class, and so run its code

VideoMAE, TimeSformer and ViViT were published with a stride on Kinetics-400: recipes/README.md has it and their views.
"""
# What of an export evaluation reads.
EXPORT_FILES = {"allow_patterns": ["*.json", "*.safetensors"], "ignore_patterns": ["*/*"]}
DATA_KEYS = {"--config", "-c", "--data", "--data.source"}
WHOLE_VIDEO = (
    "{}: frames are from the whole video (data.frame_stride is null), which may not be how it was trained; "
    "see vidprism evaluate --help"
)


def evaluate(argv: list[str]) -> Evaluation | None:
    """Evaluates a classifier of videos on the held-out clips of a recipe's data.

    Args:
        argv: The model (folder or Hub id), then `--config` and any `--key value`.

    Returns:
        What was found; None where only help was asked for.

    Raises:
        UserError: If the model cannot be loaded, or its labels are not the data's.
    """
    if {"-h", "--help"}.intersection(argv):
        print(USAGE, end="")
        return None
    if not argv or argv[0].startswith("-"):
        raise UserError("name the model first, then --config RECIPE")
    name, (revision, rest) = argv[0], asked(argv[1:], "--revision")
    if not {word.partition("=")[0] for word in rest}.intersection(DATA_KEYS):
        raise UserError("name the clips: --config RECIPE (a run's own is its config.yaml), or --data.source CLIPS")
    config, commit = find(name, revision)
    cli, module = prepare(name, config, commit, rest)
    recorder = ScoreRecorder(cli.config_init.evaluation.average_clips)
    # Under Lightning's own handler of SIGTERM processes that wait for each other do so until they are killed.
    ends = LambdaCallback(on_test_start=lambda trainer, module: SignalWatch().leave_at_once(trainer))
    trainer = cli.instantiate_trainer(logger=False, callbacks=[recorder, BadClipReport(), ends, *progress_bars(cli)])
    subject = subject_of(trainer, config_of(module), cli.datamodule, name, dataset_facts(cli.datamodule))
    subject = replace(subject, commit=commit, chose_checkpoint=chose_checkpoint(subject))
    output = cli.config_init.evaluation.output
    rank_zero_only(check_folder)(subject, output)
    evaluation = evaluate_held_out(trainer, module, cli.datamodule, subject)
    keep_and_tell(evaluation, output)
    return evaluation


def asked(settings: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value that the command line itself gives an option, empty where it has none, and the rest of the line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, nargs="?", const="", dest="value")
    found, others = parser.parse_known_args(settings)
    return found.value, others


def find(name: str, revision: str | None) -> tuple[PreTrainedConfig, str | None]:
    """The configuration of a model, and of one on the Hub the commit that a revision is at.

    Raises:
        UserError: If there is no such model, or revision of it.
    """
    if revision == "":
        raise UserError("--revision: is empty; name a branch, tag or commit, or leave it out")
    if os.path.isdir(name) and revision is not None:
        raise UserError(f"--revision {revision}: {name} is a folder, which has none; leave it out")
    commit, unknown = None, None
    if not os.path.isdir(name):
        try:  # the cache keeps files below their commit, which is known without a network, too
            commit = Path(hf_hub_download(name, CONFIG_NAME, revision=revision)).parent.name
        except (OSError, ValueError) as error:  # to load the model fails, too, and tells more of the cause
            unknown = error
    place = name if revision is None else f"{name} at {revision}"
    try:
        config = AutoConfig.from_pretrained(name, revision=commit or revision, trust_remote_code=False)
    except Exception as error:  # what a file holds decides how transformers fails at it
        raise UserError(f"{place}: cannot be loaded ({why_not_loaded(name, error)})") from error
    if unknown is not None:
        raise UserError(f"{place}: cannot be loaded ({first_line(unknown)})") from unknown
    return config, commit


def prepare(
    name: str, config: PreTrainedConfig, commit: str | None, settings: list[str]
) -> tuple[FinetuneCLI, L.LightningModule]:
    """The data of a recipe, with the processor of a model, and the module that tests it.

    Args:
        name: Of the model.
        config: Its configuration.
        commit: Of a model on the Hub.
        settings: What the command line says beside it.

    Raises:
        UserError: If the model cannot be loaded, or its labels are not the data's.
    """
    # The model brings its configuration. The recipe's number of frames is for training; one that is typed is for this.
    frames, _ = asked(settings, "--model.num_frames")
    if isinstance(config, VidPrismConfig):
        own = {"model.checkpoint": fetched(name, commit) if commit else name, "model.config": "null"}
        cli = parse([*settings, *arguments(own if frames else own | {"model.num_frames": config.num_frames})])
        return cli, cli.model
    model, processor = load_other(name, config, commit)
    if frames and frames != str(processor.num_frames):
        raise UserError(f"model.num_frames={frames}: {name} takes {processor.num_frames} frames; leave it out")
    own = {"model.checkpoint": "null", "model.config": "null", "model.backbone": "tiny", "data.feature_cache": "null"}
    cli = parse([*settings, *arguments(own | {"model.num_frames": processor.num_frames})])
    cli.datamodule.video_processor = processor
    order = matched_labels(name, config.id2label, cli.datamodule.id2label)
    if cli.datamodule.hparams.frame_stride is None:
        print_once(WHOLE_VIDEO.format(name))
    return cli, OtherClassifier(model, order)


def fetched(name: str, commit: str) -> str:
    """The folder of an export on the Hub at a commit: what trains knows no revisions.

    Raises:
        UserError: If it cannot be fetched.
    """
    try:
        return snapshot_download(name, revision=commit, **EXPORT_FILES)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} at {commit}: cannot be loaded ({first_line(error)})") from error


def arguments(values: dict[str, object]) -> list[str]:
    """Settings as the command line takes them."""
    return [f"--{name}={value}" for name, value in values.items()]


def config_of(module: L.LightningModule) -> PreTrainedConfig:
    """The configuration of the model that a module tests, which may not have built it yet."""
    if module.model is not None:
        return module.model.config
    config = read_checkpoint_config(module.hparams.checkpoint)
    config.num_frames = module.hparams.num_frames
    return config


def chose_checkpoint(subject: Subject) -> bool:
    """Whether the clips chose the checkpoint of a local export, as its split.json says."""
    try:
        split = json.loads(read_own(Path(subject.model), "split.json"))
        chosen, known = split["chosen_on_val"], split["val"]["sha256"]
        alike = (split["val"]["clips"], split["split"]) == (subject.num_clips, subject.split)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(chosen) and (known == subject.sha256 if known and subject.sha256 else alike)


@rank_zero_only
def keep_and_tell(evaluation: Evaluation, output: str | None) -> None:
    """Prints what was found, writes its files, and refreshes the card of a local export.

    Raises:
        UserError: If something cannot be written.
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
    """Puts an evaluation on the card of an export, and where the Hub has the dataset into its `.eval_results`.

    A README without a generated part is a person's and stays, and nothing is told of a part of the clips.

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
    """The content of a file of an export; nothing where there is none."""
    return read_own(export, name) if os.path.lexists(export / name) else b""


def told(evaluation: Evaluation) -> list[str]:
    """How many clips were evaluated, and what to know of it."""
    used = evaluation.counts.phrase("held-out clips")
    return [f"on {used}. A clip that cannot be decoded counts as wrong.", *evaluation.caveats]


def card_body(evaluation: Evaluation, has_results: bool) -> str:
    """What the card says below the title.

    Args:
        evaluation: What was found.
        has_results: Whether the card's metadata state results.
    """
    sentences = told(evaluation)
    if has_results:
        sentences.append("The metadata of this card have the results of its export.")
    measured = evaluation.values, evaluation.intervals, evaluation.evaluated
    protocol = Markdown(f"By `vidprism evaluate`, {escape(' '.join(sentences))}")
    return evaluation_body(protocol, *measured, len(evaluation.labels), evaluation.classes)


def replace_file(export: Path, name: str, content: bytes) -> None:
    """Writes a file of an export whole, under its lock. Until it is, it lies where the lock does: with a strange file
    in it the folder would be no export, and what a killed process leaves is written over by the next.
    """
    located(export, os.path.dirname(name))
    beside = lock_path(export).with_suffix(".tmp")
    beside.write_bytes(content)
    (export / name).parent.mkdir(exist_ok=True)
    os.replace(beside, export / name)
