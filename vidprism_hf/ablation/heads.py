"""Trains one head on cached frame features, with the module that also trains whole runs."""

from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

from ..data.loading.dataset import ClipSampler, collate
from ..model import VidPrismConfig, VidPrismForVideoClassification
from ..training.module import VidPrismLightningModule
from .baselines import with_baseline


@dataclass(frozen=True)
class TrainerSettings:
    """How heads are trained: arguments of Lightning's `Trainer`.

    A head is small: one device and 32 bits do. See there for what each field means.
    """

    accelerator: str = "auto"
    max_epochs: int | None = 20
    max_steps: int = -1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None
    accumulate_grad_batches: int = 1

    @property
    def length(self) -> str:
        """Returns the length of a training in words."""
        bounds = {f"{self.max_epochs} epochs": self.max_epochs, f"{self.max_steps} steps": self.max_steps}
        return " and at most ".join(text for text, number in bounds.items() if number not in (None, -1))


class HeadModule(VidPrismLightningModule):
    """The run's module without its callbacks: a trial has no folder and no bad videos."""

    def configure_callbacks(self) -> list[L.Callback]:
        return []


def train_head(
    config: VidPrismConfig,
    settings: dict[str, Any],
    trainer: TrainerSettings,
    videos: Dataset,
    batch_size: int,
    seed: int,
    baseline: str | None = None,
) -> VidPrismForVideoClassification:
    """Trains a head for all its epochs, so that validation videos decide nothing.

    Args:
        config: Of the model; its tower never runs.
        settings: Arguments of `VidPrismLightningModule`.
        trainer: Length and accelerator of the training.
        videos: Training videos as frame features.
        batch_size: Videos per step.
        seed: Seed of weights, dropout and order.
        baseline: `transformer` or `mixture` instead of VidPrism's temporal model.

    Returns:
        The model in eval mode on the CPU.
    """
    L.seed_everything(seed, verbose=False)
    model = VidPrismForVideoClassification._from_config(config)
    model.vidprism.vision_tower.freeze()
    if baseline is not None:
        with_baseline(model, baseline)
    module = HeadModule(**settings)
    module.model = model.train()
    sampler = ClipSampler(len(videos), training=True, seed=seed)
    quiet_trainer(**asdict(trainer)).fit(module, feature_loader(videos, batch_size, sampler))
    return model.eval().cpu()


def feature_loader(videos: Dataset, batch_size: int, sampler: ClipSampler | None = None) -> DataLoader:
    """Returns a loader without workers, in float32 whatever the tower's precision."""

    def batch(items: list[dict[str, Any]]) -> dict[str, Any]:
        collated = collate(items)
        return collated | {"frame_features": collated["frame_features"].float()}

    return DataLoader(videos, batch_size=batch_size, sampler=sampler, collate_fn=batch)


def quiet_trainer(**settings: Any) -> L.Trainer:
    """Returns a trainer on one device that writes and prints nothing."""
    return L.Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **settings,
    )
