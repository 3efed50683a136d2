"""`vidprism evaluate`: any classifier of videos on the held-out clips of a recipe's data.

It is the one module of this room that knows the training, whose recipes it reads.
"""

import os
import tempfile
from pathlib import Path

import lightning as L
import yaml
from lightning.pytorch.utilities import rank_zero_only
from transformers import AutoConfig

from ..data.bad_clips import bad_clip_table
from ..errors import UserError, first_line, why_not_loaded
from ..hub.card import eval_results, eval_results_path, evaluation_body, plain
from ..hub.card_merge import with_evaluation
from ..hub.export import README, is_vidprism_config
from ..model import VidPrismConfig
from ..training.callbacks import BadClipReport
from ..training.card_facts import dataset_facts
from ..training.finetune import FinetuneCLI, parse, progress_bars
from .other_models import OtherClassifier, load_other, matched_labels
from .report import Evaluation, default_folder, print_evaluation, write_evaluation
from .scores import ScoreRecorder
from .testing import evaluate_held_out

USAGE = """usage: vidprism evaluate MODEL --config RECIPE [--key value]

MODEL is an export, or any video classifier of transformers in a folder or on the Hub: VidPrism, VideoMAE, TimeSformer,
ViViT, V-JEPA 2. Keys are those of `vidprism finetune --help`, among them

  --data.test_clips N                     clips of each video, from N places in time
  --data.test_crops 3                     crops of each clip, along the longer side
  --evaluation.average_clips score|prob   average the views' logits (the default), or their probabilities
  --evaluation.output FOLDER              where evaluation.json and confusion.png go
  --trainer.devices N                     processes, among which the clips are shared
"""


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
    name, *rest = argv
    cli, module = prepare(name, rest)
    recorder = ScoreRecorder(cli.config_init.evaluation.average_clips)
    trainer = cli.instantiate_trainer(logger=False, callbacks=[recorder, BadClipReport(), *progress_bars(cli)])
    evaluation = evaluate_held_out(trainer, module, cli.datamodule, name, dataset_facts(cli.datamodule))
    keep_and_tell(evaluation, cli.config_init.evaluation.output)
    return evaluation


def prepare(name: str, settings: list[str]) -> tuple[FinetuneCLI, L.LightningModule]:
    """The data of a recipe, with the processor of a model, and the module that tests it.

    Raises:
        UserError: If the model cannot be loaded, or its labels are not the data's.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be loaded ({why_not_loaded(name, error)})") from error
    # The model brings its configuration and number of frames; what the recipe says of them is for training.
    own = {"model.checkpoint": name, "model.config": "null"}
    if isinstance(config, VidPrismConfig):
        cli = parse([*settings, *arguments(own | {"model.num_frames": config.num_frames})])
        return cli, cli.model
    model, processor = load_other(name, config)
    own |= {"model.checkpoint": "null", "model.backbone": "tiny", "data.feature_cache": "null"}
    cli = parse([*settings, *arguments(own | {"model.num_frames": processor.num_frames})])
    cli.datamodule.video_processor = processor
    return cli, OtherClassifier(model, matched_labels(name, config.id2label, cli.datamodule.id2label))


def arguments(values: dict[str, object]) -> list[str]:
    """Settings as the command line takes them."""
    return [f"--{name}={value}" for name, value in values.items()]


@rank_zero_only
def keep_and_tell(evaluation: Evaluation, output: str | None) -> None:
    """Writes the files of an evaluation, refreshes the card of a local export, and prints what was found.

    Raises:
        UserError: If the files cannot be written.
    """
    folder = Path(output) if output else default_folder(evaluation.model) / evaluation.folder_name
    write_evaluation(evaluation, folder)
    if evaluation.unreadable:
        print(bad_clip_table(evaluation.unreadable))
    print_evaluation(evaluation)
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
    if evaluation.evaluated < evaluation.num_clips:
        return []
    files = {}
    try:
        readme = existing(export / README).decode()
        title = f"On {plain(evaluation.dataset)} ({plain(evaluation.split)}), {evaluation.protocol}"
        refreshed = with_evaluation(readme, title, card_body(evaluation))
        if refreshed != readme:
            files[README] = refreshed.encode()
        if evaluation.dataset_id:
            path = eval_results_path(evaluation.dataset_id)
            notes = f"By vidprism evaluate: {evaluation.protocol}."
            files[path] = eval_results(evaluation.dataset_id, evaluation.values, notes, existing(export / path))
        for path, content in files.items():
            replace_file(export, path, content)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{export}: its card cannot be refreshed ({first_line(error)})") from error
    return list(files)


def existing(file: Path) -> bytes:
    """The content of a file; nothing where there is none."""
    return file.read_bytes() if file.exists() else b""


def card_body(evaluation: Evaluation) -> str:
    """What the card says below the title."""
    used = evaluation.counts.phrase("held-out clips")
    protocol = f"By `vidprism evaluate`, on {used}. A clip that cannot be decoded counts as wrong."
    measured = evaluation.values, evaluation.intervals, evaluation.evaluated
    return evaluation_body(protocol, *measured, len(evaluation.labels), evaluation.classes)


def replace_file(export: Path, name: str, content: bytes) -> None:
    """Writes a file of an export whole. Until it is, it lies beside the export, which would not be one with it."""
    handle, beside = tempfile.mkstemp(prefix=f".{export.name}-", dir=export.resolve().parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.chmod(beside, 0o644)
        (export / name).parent.mkdir(exist_ok=True)
        os.replace(beside, export / name)
    finally:
        Path(beside).unlink(missing_ok=True)
