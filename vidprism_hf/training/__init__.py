"""Fine-tuning: the LightningModule, its optimisation and the run from recipe to export."""

from .module import VidPrismLightningModule

__all__ = ["VidPrismLightningModule"]
