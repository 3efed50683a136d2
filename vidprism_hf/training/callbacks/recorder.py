"""Collects a run's facts for its model card."""

import math
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch import Trainer

from ...data.bad_videos import BadClip, ClipCounts
from ...data.open import dataset_facts
from ...data.sources.splits import clip_list_hash
from ...distributed import gathered
from ...evaluation.compute import cost, million_parameters
from ...evaluation.figures import confusion_matrix, curves, expert_names, expert_weights
from ...evaluation.intervals import wilson_interval
from ...evaluation.report import Evaluation
from ...hub import CardFacts
from ...hub.card import expert_share
from ...model import VidPrismConfig
from ..module import VidPrismLightningModule
from ..optim import clips_per_step, scaled_learning_rate
from ..origin import base_model, is_random, starting_point
from .averaging import WiseFT
from .bad_videos import BadClipReport

try:
    import resource
except ImportError:  # Windows
    resource = None

if TYPE_CHECKING:
    from ..plan import RunPlan

METRICS = ("top1", "top5")


@dataclass(frozen=True)
class Measured:
    """Accuracy of the weights that a card describes, from the final test or a validation.

    Attributes:
        protocol: How it was measured, in sentences; None if there is nothing to say.
        evaluation: Results of the final test; None for weights that were not tested.
        validation: Otherwise the results of these weights' validation: `clips`, over all ranks, and some of
            `METRICS`; empty if there was none.
        conditions: Views and split of that validation.
        chosen: Whether these weights were selected on the validation split.
    """

    protocol: str | None = None
    evaluation: Evaluation | None = None
    validation: Mapping[str, float] = field(default_factory=dict)
    conditions: str | None = None
    chosen: bool = False

    def facts(self) -> dict[str, Any]:
        """Returns the corresponding fields of CardFacts."""
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
    """Records the curves, time and peak memory of a run, and the expert weights on the validation split.

    Attributes:
        epochs: Epoch, from 0, to `train_loss`, `val_loss` and `val_top1` at its end, or so far.
        validations: Global step to the validation's `top1`, `top5` and `clips` (number of videos over all ranks),
            including those before a resume.
        tested_step: Global step of the checkpoint loaded by the last test; None if it loaded none.
        base_model: Hub id of the checkpoint that the tower comes from; None if unknown.
        seconds: Time of training and validation, including time before a resume.
        peak_bytes: Peak memory of the process or GPU that used most.
        class_weights: (K, N), mean weight of each expert over the videos of each class in the last test; NaN for a
            class without videos. None before a test.
        mean_weights: (N,), the same over all videos.
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
        self._clips = 0  # of the current validation, on this rank

    def state_dict(self) -> dict[str, Any]:
        loss = statistics.fmean(gathered(self._loss.item()))
        so_far = {"loss": loss, "batches": self._batches}
        return {"epochs": self.epochs, "validations": self.validations, "seconds": self.elapsed(), **so_far}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A test loads the best checkpoint, whose record is older than this one.
        self.epochs = state_dict["epochs"] | self.epochs
        self.validations = state_dict["validations"] | self.validations
        self.seconds = max(self.seconds, state_dict["seconds"])
        self._loss, self._batches = torch.tensor(state_dict.get("loss", 0.0)), state_dict.get("batches", 0)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.state.fn == "test":
            self.tested_step = checkpoint["global_step"]

    def setup(self, trainer, pl_module, stage):
        if stage == "fit":  # now: a folder of this name may come or go during the run
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
        # Lightning passes the loss divided by the number of accumulated batches.
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
        self._keep_train_loss(trainer)  # an export or push at this moment needs it in its curves
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
        """Records the mean training loss of the epoch so far, over all ranks."""
        device = trainer.strategy.root_device
        sums = torch.stack([self._loss.to(device), torch.tensor(float(self._batches), device=device)])
        loss, batches = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        if batches:
            self.epochs.setdefault(trainer.current_epoch, {})["train_loss"] = loss / batches

    def _all_clips(self, trainer: Trainer) -> int:
        """Returns the number of videos of this validation over all ranks."""
        count = torch.tensor(self._clips, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(count, reduce_op="sum"))

    def elapsed(self) -> float:
        """Returns the training time so far in seconds; see `seconds`."""
        return self.seconds + (time.monotonic() - self._since if self._since is not None else 0.0)


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory in bytes: of tensors on the GPU, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bad_clips(trainer: Trainer, split: str | None = None) -> list[BadClip]:
    """Returns the videos that could not be decoded so far, of one split (train, val) or both."""
    return kept_by(trainer, BadClipReport).clips(trainer.datamodule.id2label, split)


def kept_by(trainer: Trainer, kind: type) -> Any:
    """Returns the trainer's only callback of a class."""
    (callback,) = (callback for callback in trainer.callbacks if isinstance(callback, kind))
    return callback


def clip_counts(trainer: Trainer, split: str) -> ClipCounts:
    """Returns the counts of videos listed, missing and undecodable in a split (train, val)."""
    data = trainer.datamodule
    missing = len(data.splits.missing.get(split, ()))
    return ClipCounts(data.num_clips[split] + missing, missing, len(bad_clips(trainer, split)))


def run_facts(trainer: Trainer, plan: "RunPlan", measured: Measured) -> CardFacts:
    """Returns the card facts of a run and its measured weights."""
    model, data = plan.module.model, plan.data
    recorder = kept_by(trainer, CardRecorder)
    from_scratch = is_random(plan.module.hparams.checkpoint, plan.module.hparams.backbone)
    weights = [] if recorder.mean_weights is None else recorder.mean_weights
    return CardFacts(
        model_name=plan.output.name,
        labels=[model.config.id2label[index] for index in range(model.config.num_labels)],
        num_frames=model.config.num_frames,
        rates=model.config.rates,
        config=model.config,
        origin=f"It was {'trained from random weights' if from_scratch else 'fine-tuned'} with vidprism finetune.",
        from_scratch=from_scratch,
        base_model=recorder.base_model,
        backbone=starting_point(plan.module.hparams.checkpoint, plan.module.hparams.backbone, recorder.base_model),
        **dataset_facts(data.hparams),
        split=data.split_description,
        train_clips=str(clip_counts(trainer, "train")),
        eval_clips=str(clip_counts(trainer, "val")),
        train_list_hash=None if data.hparams.streaming else clip_list_hash(data.train_table),
        bad_clips=bad_clips(trainer),
        **measured.facts(),
        hyper_parameters=hyper_parameters(trainer, plan),
        augmentation=data.augmentation,
        compute=compute_facts(trainer, plan.module, recorder, measured.evaluation),
        expert_weights={
            name: f"{weight:.4f}" for name, weight in zip(expert_names(model.config.rates), weights, strict=False)
        },
        license=plan.export.license,
    )


def epochs_at(trainer: Trainer, step: int) -> str:
    """Converts a global step to epochs, which may be fractional."""
    steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)  # of one epoch
    return f"{round(step / steps, 2):g}"


def moment(trainer: Trainer, step: int) -> str:
    """Describes a global step of the run."""
    return f"after epoch {epochs_at(trainer, step)} (step {step})"


def hyper_parameters(trainer: Trainer, plan: "RunPlan") -> dict[str, Any]:
    """Returns the training's hyper-parameters."""
    data, hparams = plan.data.hparams, plan.module.hparams
    epochs, planned = epochs_at(trainer, trainer.global_step), trainer.max_epochs
    clips = clips_per_step(trainer)
    return {
        "epochs": epochs if planned in (None, -1, float(epochs)) else f"{epochs} of {planned}",
        "steps": trainer.global_step,
        "batches an epoch, by a limit": trainer.num_training_batches if trainer.limit_train_batches != 1.0 else None,
        "batch size (clips)": clips,
        "optimiser": "AdamW, betas 0.9 and 0.999, eps 1e-08",
        "learning rate": learning_rate(hparams, clips),
        "schedule": f"{'linear warm-up, then ' * bool(plan.module.warmup_steps)}cosine to zero, stepped every step",
        "warm-up steps": plan.module.warmup_steps or None,
        "weight decay": hparams.weight_decay,
        **switched_on(trainer, plan),
        "precision": trainer.precision,
        "seed": plan.seed,
        "data seed": data.seed,
        "few-shot, clips a class": data.shots,
        "weight-space ensembling": next((it.applied for it in trainer.callbacks if isinstance(it, WiseFT)), None),
    }


def switched_on(trainer: Trainer, plan: "RunPlan") -> dict[str, Any]:
    """Returns optional training settings; None for those that are off."""
    hparams, accumulated = plan.module.hparams, trainer.accumulate_grad_batches
    return {
        "backbone": backbone_training(hparams),
        "label smoothing": hparams.label_smoothing or None,
        "gradient accumulation (batches)": accumulated if accumulated > 1 else None,
        "gradient clipping": trainer.gradient_clip_val,
        "weight averaging": f"exponential moving, decay {hparams.ema_decay}" if hparams.ema_decay else None,
    }


def learning_rate(hparams: Any, clips: int) -> str | float:
    """Returns the peak learning rate, with its scaling by the batch size if any."""
    reference = hparams.reference_batch_size
    if reference is None:
        return hparams.learning_rate
    scaled = scaled_learning_rate(hparams.learning_rate, clips, reference)
    return f"{scaled:.4g} = {hparams.learning_rate:g} x sqrt({clips} / {reference})"


def backbone_training(hparams: Any) -> str:
    """Describes how the tower is trained."""
    if hparams.freeze_backbone:
        return "frozen"
    layers = f", x {hparams.layer_decay} for each layer below the top" if hparams.layer_decay != 1 else ""
    frozen = f", embeddings and first {hparams.freeze_layers} layers frozen" if hparams.freeze_layers else ""
    return f"learning rate x {hparams.backbone_lr_scale}{layers}{frozen}"


def compute_facts(
    trainer: Trainer, module: VidPrismLightningModule, recorder: CardRecorder, evaluation: Evaluation | None
) -> dict[str, Any]:
    """Returns the compute cost of the model and the run."""
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
        # Known only after training.
        "peak memory": f"{recorder.peak_bytes / 2**30:.2f} GiB ({most})" if recorder.peak_bytes else None,
    }


def not_trained(model: torch.nn.Module) -> float:
    """Returns the number of frozen parameters in millions."""
    return sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad) / 1e6


def device_name(device: torch.device) -> str:
    """Returns a human-readable name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type.upper()} ({platform.machine()}, {threads} thread{'s' * (threads > 1)})"


def duration(seconds: float) -> str:
    """Formats seconds as hours, minutes and seconds."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02} min {whole % 60:02} s" if hours else f"{minutes} min {whole % 60:02} s"


def run_figures(
    recorder: CardRecorder, config: VidPrismConfig, labels: list[str], evaluation: Evaluation | None
) -> dict[str, tuple[str, bytes]]:
    """Draws the figures of a run's card: caption and PNG by path."""
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
