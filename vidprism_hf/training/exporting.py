"""Exports a run's best weights at its end and, optionally, each kept checkpoint."""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.pytorch import Trainer

from ..data.sources.splits import clip_list_hash
from ..errors import UserError, one_line_or_traceback
from ..evaluation.report import Evaluation, Protocol
from ..hub import export_model, render_card
from ..hub.card import eval_results_file
from ..hub.export import MAX_SHARD_SIZE, Precision
from .allowed import own_classes
from .callbacks.averaging import WeightEMA
from .callbacks.recorder import METRICS, CardRecorder, Measured, bad_clips, kept_by, moment, run_facts, run_figures
from .checkpoint.files import KeptCheckpoint

if TYPE_CHECKING:
    from .plan import RunPlan

TRAIN_LIST = "train_clips.txt"  # in the run's folder, if the training videos were drawn or listed
# Parts of a setting's name that mark its text as a secret; num_tokens and tokenizer do not match.
SECRET_NAME = re.compile(
    r"(^|_)(token|auth|password|passwd|passphrase|secrets?|credentials?|api_?keys?|\w+_keys?)(_|$)", re.IGNORECASE
)
SIZE = re.compile(r"[1-9]\d*\s*[KMGT]B", re.IGNORECASE)  # huggingface_hub's format
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}|://[^/@\s]+@")  # a Hub token, or a URL with credentials


@dataclass
class ExportSettings:
    """How a run's weights are published.

    Args:
        dtype: Precision of the exported weights.
        max_shard_size: Weights larger than this are written in several files.
        checkpoints: Also exports each kept checkpoint, to a folder of the same name beside it.
        license: Licence of the weights: a Hub id such as apache-2.0, written to every export; null leaves it unknown,
            or as the export's README states it.
        wise_ft_alpha: Weight of the fine-tuned tower in an average with its starting point (WiSE-FT), used for the
            final test and the export; null uses the fine-tuned tower alone.
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
    """A KeptCheckpoint that also exports each checkpoint, to a folder named like the file without `.ckpt`.

    A failed export is a warning and does not end the run.

    Args:
        export: Called on all ranks after each save, with trainer and folder.
        settings: Arguments of ModelCheckpoint.
    """

    def __init__(self, export: Callable[[Trainer, Path], None], **settings: Any):
        super().__init__(**settings)
        self.export = export

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        export_or_warn(self.export, trainer, Path(filepath).with_suffix(""))


def export_or_warn(export: Callable[[Trainer, Path], None], trainer: Trainer, folder: Path) -> None:
    """Exports a kept checkpoint; warns if that fails."""
    try:
        export(trainer, folder)
    except Exception as error:
        warnings.warn(f"{folder}.ckpt is kept, but not exported: {one_line_or_traceback(error)}", stacklevel=2)


def export_kept(plan: "RunPlan", trainer: Trainer, folder: Path, chosen: bool = True) -> None:
    """Exports the current weights during training, with the last validation's results if they apply.

    Args:
        plan: The run's plan.
        trainer: The run's trainer.
        folder: Where the export is written.
        chosen: Whether the weights are kept as the best on the validation split.
    """
    export_run(trainer, plan, measured_in_training(trainer, plan, chosen), folder)


def measured_in_training(trainer: Trainer, plan: "RunPlan", chosen: bool) -> Measured:
    """Returns the validation results that apply to the current weights."""
    validations = kept_by(trainer, CardRecorder).validations
    if not validations:
        return Measured()
    step = max(validations)
    found = validations[step]
    if step != trainer.global_step:
        told = ", ".join(f"{name} {found[name]:.4f}" for name in METRICS if name in found)
        text = f"Not evaluated as they are, {moment(trainer, trainer.global_step)}."
        return Measured(f"{text} The last validation, {moment(trainer, step)}, found {told}.")
    used = Protocol(plan.module.model.config.num_frames, precision=trainer.precision)
    sentences = [f"Validation {moment(trainer, step)}; {used}.", *remarks(plan)]
    if found["clips"] != (held_out := trainer.datamodule.num_clips["val"]):
        sentences.append(f"Only {found['clips']} of the {held_out} held-out clips were evaluated.")
    if chosen:
        sentences.append("Kept as the best so far: the same clips choose the checkpoint, so the figure is optimistic.")
    conditions = f"{used}; {trainer.datamodule.split_description}"
    return Measured(" ".join(sentences), validation=found, conditions=conditions, chosen=chosen)


def export_best(trainer: Trainer, plan: "RunPlan", evaluation: Evaluation, folder: Path) -> Path:
    """Exports the best weights, which the test loaded, with its results."""
    recorder = kept_by(trainer, CardRecorder)
    step, count = recorder.tested_step, len(recorder.validations)
    if count > 1:
        which = f"Best of {count} validated checkpoints by held-out top-1"
    else:  # only one candidate
        which = "Last checkpoint" if step == trainer.global_step else "The only validated checkpoint"
    sentences = [f"{which}, {moment(trainer, step)}; {evaluation.protocol}.", *remarks(plan), *evaluation.caveats]
    export_run(trainer, plan, Measured(" ".join(sentences), evaluation, chosen=evaluation.chose_checkpoint), folder)
    return folder


def remarks(plan: "RunPlan") -> list[str]:
    """Returns the sentences that accompany every evaluation of a run."""
    told, dtype = ["A clip that cannot be decoded counts as wrong."], plan.export.dtype
    if dtype != "float32":
        told.append(f"Measured before the weights were rounded to {dtype}.")
    return told


def export_run(trainer: Trainer, plan: "RunPlan", measured: Measured, folder: Path) -> None:
    """Exports the module's weights with the run's model card. Call it on all ranks; rank 0 writes.

    Raises:
        ExportError: On rank 0, if the export cannot be written.
    """
    state = gathered_weights(trainer)
    try:
        if trainer.is_global_zero:
            write_export(trainer, plan, measured, folder, state)
    finally:
        trainer.strategy.barrier("export")


def gathered_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Returns the model's unsharded weights, or their average, by the model's own names. Call it on all ranks."""
    averages = (callback.average() for callback in trainer.callbacks if isinstance(callback, WeightEMA))
    state = next(averages, None) or trainer.strategy.lightning_module_state_dict()
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


def write_export(
    trainer: Trainer,
    plan: "RunPlan",
    measured: Measured,
    folder: Path,
    state: dict[str, torch.Tensor],
) -> None:
    """Writes the export with its card, figures, recipe and split manifest."""
    settings: ExportSettings = plan.export
    facts = run_facts(trainer, plan, measured)
    figures = run_figures(kept_by(trainer, CardRecorder), facts.config, facts.labels, measured.evaluation)
    facts.figures = {path: caption for path, (caption, _) in figures.items()}
    files = {path: picture for path, (_, picture) in figures.items()}
    files["recipe.yaml"] = portable_recipe(plan).encode()
    files["split.json"] = (
        json.dumps(split_manifest(trainer, measured.chosen), indent=2, allow_nan=False) + "\n"
    ).encode()
    if (listed := Path(trainer.default_root_dir) / TRAIN_LIST).is_file():
        files[TRAIN_LIST] = listed.read_bytes()
    export_model(
        plan.module.model,
        plan.data.video_processor,
        folder,
        render_card(facts),
        state_dict=state,
        dtype=settings.dtype,
        max_shard_size=settings.max_shard_size,
        files=files | eval_results_file(facts),
    )


def portable_recipe(plan: "RunPlan") -> str:
    """Returns all settings of the run as YAML, without secrets and this machine's folders."""
    settings = plan.recipe()
    del settings["resume"]
    # The recipe must run without --trust-recipe and must not push to the same repository.
    kept = {name: own_classes(value) for name, value in settings["trainer"].items()}
    callbacks = kept.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    kept["callbacks"] = [each for each in callbacks if not each["class_path"].endswith(".PushToHub")] or None
    settings["trainer"] = {name: value for name, value in kept.items() if value is not None}
    head = "# All settings of the run (vidprism finetune --config recipe.yaml). Absolute paths keep their last part.\n"
    return head + yaml.safe_dump(portable(settings), sort_keys=False, allow_unicode=True)


def portable(value: Any, name: str = "") -> Any:
    """Returns a setting, nested ones included, without absolute paths and secrets.

    Args:
        value: The setting's value.
        name: The setting's name; every text below a secret's name counts as secret.
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
    """Returns the last part of an absolute or home path (POSIX or Windows); other text unchanged."""
    text = text.removeprefix("file://")
    kind = PureWindowsPath if re.match(r"[A-Za-z]:[\\/]|\\\\", text) else PurePath
    return kind(text).name if kind(text).is_absolute() or text.startswith(("~", "../", "..\\")) else text


def split_manifest(trainer: Trainer, chosen: bool) -> dict[str, Any]:
    """Returns counts and content hashes of the training and validation splits.

    Args:
        trainer: The run's trainer.
        chosen: Whether the weights were selected on the validation split; later evaluations report it.
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
