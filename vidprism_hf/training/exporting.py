"""Exports of a run: the best weights at its end, and, if asked for, each checkpoint that is kept."""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from ..data.few_shot import clip_list_hash
from ..errors import UserError, one_line_or_traceback
from ..evaluation.report import Evaluation, Protocol
from ..hub import export_model, render_card
from ..hub.card import eval_results_file
from ..hub.export import MAX_SHARD_SIZE, Precision
from .averaging import WeightEMA
from .card_facts import METRICS, CardRecorder, Measured, bad_clips, kept_by, moment, run_facts, run_figures
from .checkpointing import KeptCheckpoint
from .trust import own_classes

TRAIN_LIST = "train_clips.txt"  # in the run's folder, where the clips were drawn or listed
# Parts of a setting's name that make its text a secret; num_tokens and tokenizer are none.
SECRET_NAME = re.compile(
    r"(^|_)(token|auth|password|passwd|passphrase|secrets?|credentials?|api_?keys?|\w+_keys?)(_|$)", re.IGNORECASE
)
SIZE = re.compile(r"[1-9]\d*\s*[KMGT]B", re.IGNORECASE)  # as huggingface_hub takes it
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}|://[^/@\s]+@")  # a token of the Hub, or an address with a user


@dataclass
class ExportSettings:
    """How a run's weights are published.

    Args:
        dtype: Precision of the written weights.
        max_shard_size: Size of a file of weights past which they are written in several.
        checkpoints: Whether each kept checkpoint is exported too, to a folder of its name beside it.
        license: Of the weights: an id of the Hub, such as apache-2.0, which each export states anew; null leaves it
            unknown, or as the export's README says.
        wise_ft_alpha: Share of the tuned tower in an average with the one it started from (WiSE-FT), which the
            final test and export have; null takes the tuned tower alone.
    """

    dtype: Precision = "float32"
    max_shard_size: str = MAX_SHARD_SIZE
    checkpoints: bool = False
    license: str | None = None
    wise_ft_alpha: float | None = None

    def __post_init__(self):
        if not SIZE.fullmatch(self.max_shard_size):
            raise UserError(f"export.max_shard_size={self.max_shard_size}: is no size; write one like 5GB or 300MB")


class ExportedCheckpoint(KeptCheckpoint):
    """A KeptCheckpoint that also exports what it keeps, to the file's name without `.ckpt`.

    An export that fails does not end the run.

    Args:
        export: Called on all processes after each saving, with trainer and folder.
        settings: Those of ModelCheckpoint.
    """

    def __init__(self, export: Callable[[Trainer, Path], None], **settings: Any):
        super().__init__(**settings)
        self.export = export

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        export_or_warn(self.export, trainer, Path(filepath).with_suffix(""))


def export_or_warn(export: Callable[[Trainer, Path], None], trainer: Trainer, folder: Path) -> None:
    """Exports a kept checkpoint; a failure is told and ends nothing."""
    try:
        export(trainer, folder)
    except Exception as error:
        warnings.warn(f"{folder}.ckpt is kept, but not exported: {one_line_or_traceback(error)}", stacklevel=2)


def export_kept(cli: LightningCLI, trainer: Trainer, folder: Path, chosen: bool = True) -> None:
    """Exports the weights as they are in training, with what the last validation found if it was of these.

    Args:
        cli: Of the run.
        trainer: Of the run.
        folder: Where to.
        chosen: Whether they are kept as the best on the held-out clips.
    """
    export_run(trainer, cli, measured_in_training(trainer, cli, chosen), folder)


def measured_in_training(trainer: Trainer, cli: LightningCLI, chosen: bool) -> Measured:
    """What the validations tell of the weights as they are now."""
    validations = kept_by(trainer, CardRecorder).validations
    if not validations:
        return Measured()
    step = max(validations)
    found = validations[step]
    if step != trainer.global_step:
        told = ", ".join(f"{name} {found[name]:.4f}" for name in METRICS if name in found)
        text = f"Not evaluated as they are, {moment(trainer, trainer.global_step)}."
        return Measured(f"{text} The last validation, {moment(trainer, step)}, found {told}.")
    used = Protocol(cli.model.model.config.num_frames, precision=trainer.precision)
    sentences = [f"Validation {moment(trainer, step)}; {used}.", *remarks(cli)]
    if found["clips"] != (held_out := trainer.datamodule.num_clips["val"]):
        sentences.append(f"Only {found['clips']} of the {held_out} held-out clips were evaluated.")
    if chosen:
        sentences.append("Kept as the best so far: the same clips choose the checkpoint, so the figure is optimistic.")
    conditions = f"{used}; {trainer.datamodule.split_description}"
    return Measured(" ".join(sentences), validation=found, conditions=conditions, chosen=chosen)


def export_best(trainer: Trainer, cli: LightningCLI, evaluation: Evaluation, folder: Path) -> Path:
    """Exports the best weights, which the test has loaded, with what it found."""
    recorder = kept_by(trainer, CardRecorder)
    step, count = recorder.tested_step, len(recorder.validations)
    if count > 1:
        which = f"Best of {count} validated checkpoints by held-out top-1"
    else:  # there was nothing to choose from
        which = "Last checkpoint" if step == trainer.global_step else "The only validated checkpoint"
    sentences = [f"{which}, {moment(trainer, step)}; {evaluation.protocol}.", *remarks(cli), *evaluation.caveats]
    export_run(trainer, cli, Measured(" ".join(sentences), evaluation, chosen=evaluation.chose_checkpoint), folder)
    return folder


def remarks(cli: LightningCLI) -> list[str]:
    """What to say of every evaluation of a run, in sentences."""
    told, dtype = ["A clip that cannot be decoded counts as wrong."], cli.config_init.export.dtype
    if dtype != "float32":
        told.append(f"Measured before the weights were rounded to {dtype}.")
    return told


def export_run(trainer: Trainer, cli: LightningCLI, measured: Measured, folder: Path) -> None:
    """Exports the module's weights with a card of the run's facts. All processes call it, the first one writes.

    Raises:
        ExportError: On the first process, if the export cannot be written.
    """
    state = gathered_weights(trainer)
    try:
        if trainer.is_global_zero:
            write_export(trainer, cli, measured, folder, state)
    finally:
        trainer.strategy.barrier("export")


def gathered_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The model's weights, or their average, by its own names, whole; a strategy that shares them out gathers here."""
    averages = (callback.average() for callback in trainer.callbacks if isinstance(callback, WeightEMA))
    state = next(averages, None) or trainer.strategy.lightning_module_state_dict()
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


def write_export(
    trainer: Trainer,
    cli: LightningCLI,
    measured: Measured,
    folder: Path,
    state: dict[str, torch.Tensor],
) -> None:
    """Puts card, figures, recipe and split manifest together and exports."""
    settings: ExportSettings = cli.config_init.export
    facts = run_facts(trainer, cli, measured)
    figures = run_figures(kept_by(trainer, CardRecorder), facts.config, facts.labels, measured.evaluation)
    facts.figures = {path: caption for path, (caption, _) in figures.items()}
    files = {path: picture for path, (_, picture) in figures.items()}
    files["recipe.yaml"] = portable_recipe(cli).encode()
    files["split.json"] = (
        json.dumps(split_manifest(trainer, measured.chosen), indent=2, allow_nan=False) + "\n"
    ).encode()
    if (listed := Path(trainer.default_root_dir) / TRAIN_LIST).is_file():
        files[TRAIN_LIST] = listed.read_bytes()
    export_model(
        cli.model.model,
        cli.datamodule.video_processor,
        folder,
        render_card(facts),
        state_dict=state,
        dtype=settings.dtype,
        max_shard_size=settings.max_shard_size,
        files=files | eval_results_file(facts),
    )


def portable_recipe(cli: LightningCLI) -> str:
    """All settings of the run as YAML, without what is nobody else's: folders of this machine, and secrets."""
    settings = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    del settings["resume"]  # the run's own affair
    defaults = cli.parser.get_defaults().trainer
    for name, value in settings["trainer"].items():
        # Whoever runs it again is to be able to, without trust, and is not to push to the same repository.
        value = own_classes(value)
        if name == "callbacks" and value:
            value = value if isinstance(value, list) else [value]
            value = [each for each in value if not each["class_path"].endswith(".PushToHub")] or None
        settings["trainer"][name] = defaults.get(name) if value is None else value
    head = "# All settings of the run (vidprism finetune --config recipe.yaml). Absolute paths keep their last part.\n"
    return head + yaml.safe_dump(portable(settings), sort_keys=False, allow_unicode=True)


def portable(value: Any, name: str = "") -> Any:
    """A setting, or the settings below it, without absolute paths and secrets.

    Args:
        value: Of the setting.
        name: Of the setting; below one that names a secret every text is one.
    """
    if isinstance(value, dict):
        secret = name if SECRET_NAME.search(name) else ""
        return {key: portable(item, secret or str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if SECRET_NAME.search(name) or SECRET.search(value):
        return None
    return value if name.endswith("pattern") else portable_path(value)


def portable_path(text: str) -> str:
    """The last part of a path that this machine alone has, on any system; any other text as it is."""
    text = text.removeprefix("file://")
    kind = PureWindowsPath if re.match(r"[A-Za-z]:[\\/]|\\\\", text) else PurePath
    return kind(text).name if kind(text).is_absolute() or text.startswith(("~", "../", "..\\")) else text


def split_manifest(trainer: Trainer, chosen: bool) -> dict[str, Any]:
    """Which clips were trained and evaluated on: counts, and the hash of each list.

    Args:
        trainer: Of the run.
        chosen: Whether the held-out clips chose the weights among others, which a later evaluation has to tell.
    """
    data = trainer.datamodule
    manifest: dict[str, Any] = {"dataset": data.name, "split": data.split_description}
    for split in ("train", "val"):
        streamed = data.hparams.streaming
        table = None if streamed else data.train_table if split == "train" else data.val_table
        manifest[split] = {
            "clips": data.num_clips[split],
            "not_decoded": len(bad_clips(trainer, split)),
            "not_on_disk": len(data.splits.missing.get(split, ())),
            "sha256": None if table is None else clip_list_hash(table),
        }
    manifest["chosen_on_val"] = chosen
    if data.hparams.shots:
        manifest["few_shot"] = {"shots": data.hparams.shots, "seed": data.hparams.seed}
    return manifest
