"""What a run knows of itself for its model card: a callback that keeps it, and the facts put together."""

import platform
import resource
import statistics
import sys
import time
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
from ..data.sources import DEMO, source_kind
from ..evaluation.compute import giga_macs_per_view, million_parameters
from ..evaluation.figures import curves, expert_weights
from ..hub import CardFacts
from ..model import VISION_PRESETS
from .callbacks import BadClipReport
from .module import VidPrismLightningModule
from .resuming import gathered


class CardRecorder(L.Callback):
    """Keeps the curves, time and peak memory of a run, and what the experts did on the held-out clips.

    Attributes:
        epochs: Epoch, from 0, to `train_loss`, `val_loss` and `val_top1` at its end.
        seconds: Of training with its validations, those before a resumption among them.
        peak_bytes: Of the process or GPU that took most.
        class_weights: (K, N), mean weight of each expert over the clips of each class in the last test; a class
            without clips has NaN. None before a test.
        mean_weights: (N,), likewise over all clips.
    """

    def __init__(self):
        self.epochs: dict[int, dict[str, float]] = {}
        self.seconds = 0.0
        self.peak_bytes = 0
        self.class_weights: np.ndarray | None = None
        self.mean_weights: np.ndarray | None = None
        self._since: float | None = None
        self._loss, self._batches = torch.zeros(()), 0  # of the epoch so far

    def state_dict(self) -> dict[str, Any]:
        loss = statistics.fmean(gathered(self._loss.item()))
        return {"epochs": self.epochs, "seconds": self._seconds(), "loss": loss, "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A test loads the best checkpoint, which knows less than this run does by then.
        self.epochs = state_dict["epochs"] | self.epochs
        self.seconds = max(self.seconds, state_dict["seconds"])
        self._loss, self._batches = torch.tensor(state_dict.get("loss", 0.0)), state_dict.get("batches", 0)

    def on_fit_start(self, trainer, pl_module):
        self._since = time.monotonic()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_fit_end(self, trainer, pl_module):
        self.seconds, self._since = self._seconds(), None
        peak = torch.tensor(float(peak_memory(pl_module.device)), device=pl_module.device)
        self.peak_bytes = int(trainer.strategy.reduce(peak, reduce_op="max"))

    def on_train_epoch_start(self, trainer, pl_module):
        self._loss, self._batches = torch.zeros(()), 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # Lightning hands on the loss as it was divided for the accumulation.
        self._loss = self._loss.to(pl_module.device) + outputs["loss"].float() * trainer.accumulate_grad_batches
        self._batches += 1

    def on_train_epoch_end(self, trainer, pl_module):
        mean = trainer.strategy.reduce(self._loss.to(pl_module.device) / max(1, self._batches), reduce_op="mean")
        self.epochs.setdefault(trainer.current_epoch, {})["train_loss"] = mean.item()

    def on_validation_end(self, trainer, pl_module):
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        measured = {name: trainer.callback_metrics.get(f"val/{name}") for name in ("loss", "top1")}
        values = {f"val_{name}": value.item() for name, value in measured.items() if value is not None}
        self.epochs.setdefault(trainer.current_epoch, {}).update(values)

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

    def _seconds(self) -> float:
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


def run_facts(trainer: Trainer, cli: LightningCLI, metrics: dict[str, float], protocol: str) -> CardFacts:
    """The facts of a run, for the card of the weights that gave the metrics."""
    model, data, hparams = cli.model.model, cli.datamodule, cli.model.hparams
    recorder = kept_by(trainer, CardRecorder)
    weights = {} if recorder.mean_weights is None else dict(zip(model.config.rates, recorder.mean_weights, strict=True))
    return CardFacts(
        model_name=Path(cli.config.output).name,
        labels=[model.config.id2label[index] for index in range(model.config.num_labels)],
        num_frames=model.config.num_frames,
        rates=model.config.rates,
        origin="It was fine-tuned with `vidprism finetune`.",
        base_model=hub_id(hparams.checkpoint or hparams.backbone),
        backbone=Path(hparams.checkpoint or hparams.backbone).name,
        **dataset_facts(data),
        split=data.split_description,
        train_clips=str(clip_counts(trainer, "train")),
        eval_clips=str(clip_counts(trainer, "val")),
        train_list_hash=None if data.hparams.streaming else clip_list_hash(data.train_table),
        bad_clips=bad_clips(trainer),
        metrics=metrics,
        num_evaluated=data.num_clips["val"],
        protocol=protocol,
        hyper_parameters=hyper_parameters(trainer, cli),
        augmentation=data.augmentation,
        compute=compute_facts(trainer, cli.model, recorder),
        expert_weights={f"rate {rate}": f"{weight:.4f}" for rate, weight in weights.items()},
    )


def views(num_frames: int, crops: int, clips: int) -> str:
    """What of each video is evaluated: frames x crops x clips."""
    return f"{num_frames} frames x {crops} crop{'s' * (crops > 1)} x {clips} clip{'s' * (clips > 1)}"


def dataset_facts(data: L.LightningDataModule) -> dict[str, str]:
    """Name, Hub id and terms of the data, as far as they are known."""
    source = data.hparams.source
    if source in BENCHMARKS:
        benchmark = BENCHMARKS[source]
        repo = getattr(benchmark.parts.get("clips"), "repo", None)
        return {"dataset": benchmark.title, "dataset_id": repo, "data_license": f"{benchmark.terms} {benchmark.home}"}
    if source == DEMO:
        return {"dataset": DEMO, "data_license": "rendered by vidprism_hf (Apache-2.0)"}
    on_hub = source_kind(source, data.hparams.train_list) == "hub"
    return {"dataset": data.name} | ({"dataset_id": source} if on_hub else {})


def hyper_parameters(trainer: Trainer, cli: LightningCLI) -> dict[str, Any]:
    """What the training was set to."""
    data, hparams = cli.datamodule.hparams, cli.model.hparams
    return {
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "batch size (clips)": data.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
        "optimiser": "AdamW, betas 0.9 and 0.999, eps 1e-08",
        "learning rate": hparams.learning_rate,
        "schedule": "linear warm-up, then cosine to zero, stepped every step",
        "warm-up epochs": hparams.warmup_epochs,
        "backbone": "frozen" if hparams.freeze_backbone else f"learning rate x {hparams.backbone_lr_scale}",
        "weight decay": hparams.weight_decay,
        "gradient clipping": trainer.gradient_clip_val,
        "precision": trainer.precision,
        "seed": cli.config.seed_everything,
        "data seed": data.seed,
        "few-shot, clips a class": data.shots,
    }


def compute_facts(trainer: Trainer, module: VidPrismLightningModule, recorder: CardRecorder) -> dict[str, Any]:
    """What the model and the run cost."""
    parameters, frozen = million_parameters(module.model), not_trained(module.model)
    where = "GPU, allocated" if trainer.strategy.root_device.type == "cuda" else "process, resident"
    most = f"{where}{', the highest of all' if trainer.world_size > 1 else ''}"
    return {
        "GMACs per view (counted)": f"{giga_macs_per_view(module.model.config):.4g}",
        "parameters": f"{parameters:.1f} M" + (f", {frozen:.1f} M of them frozen" if frozen else ""),
        "device": f"{trainer.world_size} x {device_name(trainer.strategy.root_device)}",
        "wall time of training": duration(recorder._seconds()),
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
    return f"{device.type.upper()} ({platform.machine()}, {torch.get_num_threads()} threads)"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02} min {whole % 60:02} s" if hours else f"{minutes} min {whole % 60:02} s"


def run_figures(recorder: CardRecorder, labels: list[str], rates: list[int]) -> dict[str, tuple[str, bytes]]:
    """The pictures of a run's card: caption and PNG by path."""
    drawn = {}
    if recorder.epochs:
        drawn["figures/curves.png"] = ("Loss and held-out top-1 over the epochs", curves(recorder.epochs))
    if recorder.class_weights is not None:
        picture = expert_weights(recorder.class_weights, labels, rates)
        drawn["figures/experts.png"] = ("Mean expert weights of the held-out clips, by class", picture)
    return drawn


def hub_id(name: str) -> str | None:
    """The Hub id that a backbone or checkpoint was loaded by; None for folders and random weights."""
    if name in VISION_PRESETS:
        return VISION_PRESETS[name]["name_or_path"]
    return None if Path(name).exists() else name
