"""What a run knows of itself for its model card: a callback that keeps it, and the facts put together."""

import math
import platform
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from ..data.bad_clips import BadClip, ClipCounts
from ..data.benchmarks import BENCHMARKS
from ..data.few_shot import clip_list_hash
from ..data.hub_repository import stated_license
from ..data.ranks import gathered
from ..data.sources import DEMO, source_kind
from ..evaluation.compute import cost, million_parameters
from ..evaluation.figures import confusion_matrix, curves, expert_names, expert_weights
from ..evaluation.intervals import wilson_interval
from ..evaluation.report import Evaluation
from ..hub import CardFacts
from ..hub.card import expert_share
from ..model import VidPrismConfig
from .averaging import WiseFT
from .callbacks import BadClipReport
from .module import VidPrismLightningModule
from .optimization import clips_per_step, scaled_learning_rate
from .origin import base_model, is_random, starting_point

METRICS = ("top1", "top5")


@dataclass(frozen=True)
class Measured:
    """What is known of the accuracy of the weights that a card is for: by the final test, or by a validation.

    Attributes:
        protocol: How it was measured, in sentences; None if there is nothing to say.
        evaluation: What the final test found; None of weights that it did not see.
        validation: What the validation of these weights found otherwise: `clips`, over all processes, and of
            `METRICS` some; empty if there was none.
        conditions: Views and split of that validation.
        chosen: Whether the held-out clips chose these weights among others.
    """

    protocol: str | None = None
    evaluation: Evaluation | None = None
    validation: Mapping[str, float] = field(default_factory=dict)
    conditions: str | None = None
    chosen: bool = False

    def facts(self) -> dict[str, Any]:
        """What the card says of it."""
        found = self.evaluation
        if found is not None:
            return {
                "metrics": found.values,
                "intervals": found.intervals,
                "num_evaluated": found.evaluated,
                "per_class": found.classes,
                "protocol": self.protocol,
                "conditions": found.conditions,
            }
        clips = self.validation.get("clips")
        metrics = {name: value for name, value in self.validation.items() if name in METRICS}
        return {
            "metrics": metrics,
            "intervals": {name: wilson_interval(value, clips) for name, value in metrics.items()},
            "num_evaluated": clips,
            "protocol": self.protocol,
            "conditions": self.conditions,
        }


class CardRecorder(L.Callback):
    """Keeps the curves, time and peak memory of a run, and what the experts did on the held-out clips.

    Attributes:
        epochs: Epoch, from 0, to `train_loss`, `val_loss` and `val_top1` at its end; of the epoch that goes on, so far.
        validations: Global step to what the validation there found, those before a resumption among them: `top1`,
            `top5`, and `clips`, the number that these count over all processes.
        tested_step: Global step of the checkpoint that the last test has loaded; None if it loaded none.
        base_model: Hub id of the checkpoint that the tower comes from; None if it has none.
        seconds: Of training with its validations, those before a resumption among them.
        peak_bytes: Of the process or GPU that took most.
        class_weights: (K, N), mean weight of each expert over the clips of each class in the last test; a class
            without clips has NaN. None before a test.
        mean_weights: (N,), likewise over all clips.
    """

    def __init__(self):
        self.epochs: dict[int, dict[str, float]] = {}
        self.validations: dict[int, dict[str, float]] = {}
        self.tested_step: int | None = None
        self.base_model: str | None = None
        self.seconds = 0.0
        self.peak_bytes = 0
        self.class_weights: np.ndarray | None = None
        self.mean_weights: np.ndarray | None = None
        self._since: float | None = None
        self._loss, self._batches = torch.zeros(()), 0  # of the epoch so far
        self._clips = 0  # of the validation that goes on, in this process

    def state_dict(self) -> dict[str, Any]:
        loss = statistics.fmean(gathered(self._loss.item()))
        so_far = {"loss": loss, "batches": self._batches}
        return {"epochs": self.epochs, "validations": self.validations, "seconds": self.elapsed(), **so_far}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A test loads the best checkpoint, which knows less than this run does by then.
        self.epochs = state_dict["epochs"] | self.epochs
        self.validations = state_dict["validations"] | self.validations
        self.seconds = max(self.seconds, state_dict["seconds"])
        self._loss, self._batches = torch.tensor(state_dict.get("loss", 0.0)), state_dict.get("batches", 0)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.state.fn == "test":
            self.tested_step = checkpoint["global_step"]

    def setup(self, trainer, pl_module, stage):
        if stage == "fit":  # now: whether a name is that of a folder may be another matter when the run ends
            self.base_model = base_model(pl_module.hparams.checkpoint or pl_module.hparams.backbone)

    def on_fit_start(self, trainer, pl_module):
        self._since = time.monotonic()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_fit_end(self, trainer, pl_module):
        self.seconds, self._since = self.elapsed(), None
        peak = torch.tensor(float(peak_memory(pl_module.device)), device=pl_module.device)
        self.peak_bytes = int(trainer.strategy.reduce(peak, reduce_op="max"))

    def on_train_epoch_start(self, trainer, pl_module):
        self._loss, self._batches = torch.zeros(()), 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # Lightning hands on the loss as it was divided for the accumulation.
        self._loss = self._loss.to(pl_module.device) + outputs["loss"].float() * trainer.accumulate_grad_batches
        self._batches += 1

    def on_train_epoch_end(self, trainer, pl_module):
        self._keep_train_loss(trainer)
        self._loss, self._batches = torch.zeros(()), 0

    def on_validation_epoch_start(self, trainer, pl_module):
        self._clips = 0

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._clips += len(batch["labels"])

    def on_validation_end(self, trainer, pl_module):
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._keep_train_loss(trainer)  # what is exported or pushed right now has it in its curves
        measured = {name: trainer.callback_metrics.get(f"val/{name}") for name in ("loss", *METRICS)}
        found = {name: value.item() for name, value in measured.items() if value is not None}
        curve = {f"val_{name}": found[name] for name in ("loss", "top1") if name in found}
        self.epochs.setdefault(trainer.current_epoch, {}).update(curve)
        metrics = {name: found[name] for name in METRICS if name in found}
        self.validations[trainer.global_step] = {"clips": self._all_clips(trainer), **metrics}

    def on_test_epoch_start(self, trainer, pl_module):
        shape = (pl_module.model.config.num_labels, len(pl_module.model.config.rates))
        self._sums = torch.zeros(shape, device=pl_module.device)
        self._counts = torch.zeros(shape[0], device=pl_module.device)

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        known = batch.get("readable", torch.ones_like(batch["labels"], dtype=torch.bool)).float()
        self._sums.index_add_(0, batch["labels"], outputs["expert_weights"].float() * known[:, None])
        self._counts.index_add_(0, batch["labels"], known)

    def on_test_epoch_end(self, trainer, pl_module):
        sums = trainer.strategy.reduce(self._sums, reduce_op="sum").cpu().numpy()
        counts = trainer.strategy.reduce(self._counts, reduce_op="sum").cpu().numpy()
        with np.errstate(invalid="ignore"):
            self.class_weights = sums / counts[:, None]
            self.mean_weights = sums.sum(0) / counts.sum()

    def _keep_train_loss(self, trainer: Trainer) -> None:
        """The mean over the batches of the epoch so far, of all processes."""
        device = trainer.strategy.root_device
        sums = torch.stack([self._loss.to(device), torch.tensor(float(self._batches), device=device)])
        loss, batches = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        if batches:
            self.epochs.setdefault(trainer.current_epoch, {})["train_loss"] = loss / batches

    def _all_clips(self, trainer: Trainer) -> int:
        """The clips of this validation, of all processes."""
        count = torch.tensor(self._clips, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(count, reduce_op="sum"))

    def elapsed(self) -> float:
        """Seconds of training up to now; see `seconds`."""
        return self.seconds + (time.monotonic() - self._since if self._since is not None else 0.0)


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors on the GPU, or else this process, have taken."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bad_clips(trainer: Trainer, split: str | None = None) -> list[BadClip]:
    """The clips that could not be decoded so far, of one split (train, val) or both."""
    return kept_by(trainer, BadClipReport).clips(trainer.datamodule.id2label, split)


def kept_by(trainer: Trainer, kind: type) -> Any:
    """The trainer's callback of a kind, of which it has one."""
    (callback,) = (callback for callback in trainer.callbacks if isinstance(callback, kind))
    return callback


def clip_counts(trainer: Trainer, split: str) -> ClipCounts:
    """What became of the clips of a split (train, val)."""
    data = trainer.datamodule
    missing = len(data.splits.missing.get(split, ()))
    return ClipCounts(data.num_clips[split] + missing, missing, len(bad_clips(trainer, split)))


def run_facts(trainer: Trainer, cli: LightningCLI, measured: Measured) -> CardFacts:
    """The facts of a run, for the card of the weights that were measured."""
    model, data = cli.model.model, cli.datamodule
    recorder = kept_by(trainer, CardRecorder)
    from_scratch = is_random(cli.model.hparams.checkpoint, cli.model.hparams.backbone)
    weights = [] if recorder.mean_weights is None else recorder.mean_weights
    return CardFacts(
        model_name=Path(cli.config.output).name,
        labels=[model.config.id2label[index] for index in range(model.config.num_labels)],
        num_frames=model.config.num_frames,
        rates=model.config.rates,
        config=model.config,
        origin=f"It was {'trained from random weights' if from_scratch else 'fine-tuned'} with vidprism finetune.",
        from_scratch=from_scratch,
        base_model=recorder.base_model,
        backbone=starting_point(cli.model.hparams.checkpoint, cli.model.hparams.backbone, recorder.base_model),
        **dataset_facts(data),
        split=data.split_description,
        train_clips=str(clip_counts(trainer, "train")),
        eval_clips=str(clip_counts(trainer, "val")),
        train_list_hash=None if data.hparams.streaming else clip_list_hash(data.train_table),
        bad_clips=bad_clips(trainer),
        **measured.facts(),
        hyper_parameters=hyper_parameters(trainer, cli),
        augmentation=data.augmentation,
        compute=compute_facts(trainer, cli.model, recorder, measured.evaluation),
        expert_weights={
            name: f"{weight:.4f}" for name, weight in zip(expert_names(model.config.rates), weights, strict=False)
        },
        license=cli.config_init.export.license,
    )


def dataset_facts(data: L.LightningDataModule) -> dict[str, str]:
    """Name, Hub id and terms of the data, as far as they are known."""
    source = data.hparams.source
    if source in BENCHMARKS:
        benchmark = BENCHMARKS[source]
        repo = getattr(benchmark.parts.get("clips"), "repo", None)
        return {"dataset": benchmark.title, "dataset_id": repo, "data_license": f"{benchmark.terms} {benchmark.home}"}
    if source == DEMO:
        return {"dataset": DEMO, "data_license": "rendered by vidprism_hf (Apache-2.0)"}
    if source_kind(source, data.hparams.train_list) != "hub":
        return {"dataset": data.name}
    stated = stated_license(source, data.hparams.hub_revision)
    terms = {"data_license": f"{stated}, as its card says"} if stated else {}
    where = {"split": data.hparams.val_split, "config": data.hparams.hub_config, "revision": data.hparams.hub_revision}
    named = {f"dataset_{part}": name for part, name in where.items() if name}
    return {"dataset": data.name, "dataset_id": source} | named | terms


def epochs_at(trainer: Trainer, step: int) -> str:
    """How many epochs a global step of the run is, which may be a fraction."""
    steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)  # of one epoch
    return f"{round(step / steps, 2):g}"


def moment(trainer: Trainer, step: int) -> str:
    """A global step of the run in words."""
    return f"after epoch {epochs_at(trainer, step)} (step {step})"


def hyper_parameters(trainer: Trainer, cli: LightningCLI) -> dict[str, Any]:
    """What the training was set to."""
    data, hparams = cli.datamodule.hparams, cli.model.hparams
    epochs, planned = epochs_at(trainer, trainer.global_step), trainer.max_epochs
    clips = clips_per_step(trainer)
    return {
        "epochs": epochs if planned in (None, -1, float(epochs)) else f"{epochs} of {planned}",
        "steps": trainer.global_step,
        "batches an epoch, by a limit": trainer.num_training_batches if trainer.limit_train_batches != 1.0 else None,
        "batch size (clips)": clips,
        "optimiser": "AdamW, betas 0.9 and 0.999, eps 1e-08",
        "learning rate": learning_rate(hparams, clips),
        "schedule": f"{'linear warm-up, then ' * bool(cli.model.warmup_steps)}cosine to zero, stepped every step",
        "warm-up steps": cli.model.warmup_steps or None,
        "weight decay": hparams.weight_decay,
        **switched_on(trainer, cli),
        "precision": trainer.precision,
        "seed": cli.config.seed_everything,
        "data seed": data.seed,
        "few-shot, clips a class": data.shots,
        "weight-space ensembling": next((it.applied for it in trainer.callbacks if isinstance(it, WiseFT)), None),
    }


def switched_on(trainer: Trainer, cli: LightningCLI) -> dict[str, Any]:
    """The settings of training that are off unless asked for; None where they are."""
    hparams, accumulated = cli.model.hparams, trainer.accumulate_grad_batches
    return {
        "backbone": backbone_training(hparams),
        "label smoothing": hparams.label_smoothing or None,
        "gradient accumulation (batches)": accumulated if accumulated > 1 else None,
        "gradient clipping": trainer.gradient_clip_val,
        "weight averaging": f"exponential moving, decay {hparams.ema_decay}" if hparams.ema_decay else None,
    }


def learning_rate(hparams: Any, clips: int) -> str | float:
    """The peak learning rate, and how it follows from the batch where it does."""
    reference = hparams.reference_batch_size
    if reference is None:
        return hparams.learning_rate
    scaled = scaled_learning_rate(hparams.learning_rate, clips, reference)
    return f"{scaled:.4g} = {hparams.learning_rate:g} x sqrt({clips} / {reference})"


def backbone_training(hparams: Any) -> str:
    """How the tower is trained."""
    if hparams.freeze_backbone:
        return "frozen"
    layers = f", x {hparams.layer_decay} for each layer below the top" if hparams.layer_decay != 1 else ""
    frozen = f", embeddings and first {hparams.freeze_layers} layers frozen" if hparams.freeze_layers else ""
    return f"learning rate x {hparams.backbone_lr_scale}{layers}{frozen}"


def compute_facts(
    trainer: Trainer, module: VidPrismLightningModule, recorder: CardRecorder, evaluation: Evaluation | None
) -> dict[str, Any]:
    """What the model and the run cost."""
    parameters, frozen = million_parameters(module.model), not_trained(module.model)
    config = module.model.config
    counted = evaluation.cost if evaluation else cost(config, config.num_frames)
    where = "GPU, allocated" if trainer.strategy.root_device.type == "cuda" else "process, resident"
    most = f"{where}{', the highest of all' if trainer.world_size > 1 else ''}"
    return {
        "GMACs per view (counted)": f"{counted.giga_macs:.4g}",
        "GMACs per view (the paper's)": counted.paper_giga_macs and f"{counted.paper_giga_macs:.4g}",
        "parameters": f"{parameters:.1f} M" + (f", {frozen:.1f} M of them frozen" if frozen else ""),
        "device": f"{trainer.world_size} x {device_name(trainer.strategy.root_device)}",
        "wall time of training": duration(recorder.elapsed()),
        # Known once the training has ended.
        "peak memory": f"{recorder.peak_bytes / 2**30:.2f} GiB ({most})" if recorder.peak_bytes else None,
    }


def not_trained(model: torch.nn.Module) -> float:
    """Parameters without a gradient, in units of 1e6."""
    return sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad) / 1e6


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type.upper()} ({platform.machine()}, {threads} thread{'s' * (threads > 1)})"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02} min {whole % 60:02} s" if hours else f"{minutes} min {whole % 60:02} s"


def run_figures(
    recorder: CardRecorder, config: VidPrismConfig, labels: list[str], evaluation: Evaluation | None
) -> dict[str, tuple[str, bytes]]:
    """The pictures of a run's card: caption and PNG by path."""
    drawn = {}
    if recorder.epochs:
        drawn["figures/curves.png"] = ("Loss and held-out top-1 over the epochs", curves(recorder.epochs))
    if recorder.class_weights is not None and expert_share(config):
        picture = expert_weights(recorder.class_weights, labels, config.rates)
        drawn["figures/experts.png"] = ("Mean expert weights of the held-out clips, by class", picture)
    if evaluation is not None:
        picture = confusion_matrix(evaluation.metrics.confusion, labels)
        drawn["figures/confusion.png"] = ("Labels given to the held-out clips, by class", picture)
    return drawn
