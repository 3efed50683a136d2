"""Exports of a run: the best weights at its end, and, if asked for, each checkpoint that is kept."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_warn

from ..data.few_shot import clip_list_hash
from ..hub import export_model, render_card
from ..hub.card import eval_results_file
from ..hub.export import MAX_SHARD_SIZE, ExportError, Precision
from .card_facts import CardRecorder, bad_clips, kept_by, run_facts, run_figures, views
from .checkpointing import KeptCheckpoint

TRAIN_LIST = "train_clips.txt"  # in the run's folder, where the clips were drawn or listed


@dataclass
class ExportSettings:
    """How a run's weights are published.

    Args:
        dtype: Precision of the written weights.
        max_shard_size: Size of a file of weights past which they are written in several.
        checkpoints: Whether each kept checkpoint is exported too, to a folder of its name beside it.
    """

    dtype: Precision = "float32"
    max_shard_size: str = MAX_SHARD_SIZE
    checkpoints: bool = False


class ExportedCheckpoint(KeptCheckpoint):
    """A KeptCheckpoint that also exports what it keeps, to the file's name without `.ckpt`.

    An export that fails does not end the run.

    Args:
        export: Called with trainer and folder on all processes after each saving.
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
    except ExportError as error:
        rank_zero_warn(f"{folder}.ckpt is kept, but not exported: {error}")


def export_kept(cli: LightningCLI, trainer: Trainer, folder: Path) -> None:
    """Exports the weights as they are in training, with what the last validation found."""
    found = {name: trainer.callback_metrics.get(f"val/{name}") for name in ("top1", "top5")}
    metrics = {name: value.item() for name, value in found.items() if value is not None}
    used = views(cli.model.model.config.num_frames, 1, 1)
    protocol = f"The last validation, in epoch {trainer.current_epoch + 1}, with {used}."
    export_run(trainer, cli, metrics, protocol, folder)


def export_best(trainer: Trainer, cli: LightningCLI, metrics: dict[str, float], folder: Path) -> Path:
    """Exports the best weights, which the test has loaded, with what it found."""
    data = cli.datamodule.hparams
    used = views(cli.model.model.config.num_frames, data.test_crops, data.test_clips)
    text = f"{used}. A clip that cannot be decoded counts as wrong."
    if trainer.current_epoch < 2 * (trainer.check_val_every_n_epoch or 1):
        protocol = f"Last checkpoint; {text}"  # at most one validation: there was nothing to choose from
    else:
        protocol = (
            f"Best checkpoint by held-out top-1; {text} The same clips chose the checkpoint: the figure is optimistic."
        )
    export_run(trainer, cli, metrics, protocol, folder)
    return folder


def export_run(trainer: Trainer, cli: LightningCLI, metrics: dict[str, float], protocol: str, folder: Path) -> None:
    """Exports the module's weights with a card of the run's facts. All processes call it, the first one writes.

    Raises:
        ExportError: On the first process, if the export cannot be written.
    """
    state = gathered_weights(trainer)
    try:
        if trainer.is_global_zero:
            write_export(trainer, cli, metrics, protocol, folder, state)
    finally:
        trainer.strategy.barrier("export")


def gathered_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The model's weights by its own names, whole; a strategy that shares them out gathers them here."""
    state = trainer.strategy.lightning_module_state_dict()
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


def write_export(
    trainer: Trainer,
    cli: LightningCLI,
    metrics: dict[str, float],
    protocol: str,
    folder: Path,
    state: dict[str, torch.Tensor],
) -> None:
    """Puts card, figures, recipe and split manifest together and exports."""
    settings: ExportSettings = cli.config_init.export
    facts = run_facts(trainer, cli, metrics, protocol)
    figures = run_figures(kept_by(trainer, CardRecorder), facts.labels, facts.rates)
    facts.figures = {path: caption for path, (caption, _) in figures.items()}
    files = {path: picture for path, (_, picture) in figures.items()}
    files["recipe.yaml"] = portable_recipe(cli).encode()
    files["split.json"] = (json.dumps(split_manifest(trainer), indent=2) + "\n").encode()
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

    def cleaned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: cleaned(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [cleaned(item) for item in value]
        if "token" in key or "password" in key:
            return None
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    settings = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    head = "# All settings of the run (vidprism finetune --config recipe.yaml). Absolute paths keep their last part.\n"
    return head + yaml.safe_dump(cleaned(settings), sort_keys=False, allow_unicode=True)


def split_manifest(trainer: Trainer) -> dict[str, Any]:
    """Which clips were trained and evaluated on: counts, and the hash of each list."""
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
    if data.hparams.shots:
        manifest["few_shot"] = {"shots": data.hparams.shots, "seed": data.hparams.seed}
    return manifest
