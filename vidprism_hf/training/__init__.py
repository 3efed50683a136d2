"""Fine-tuning: the LightningModule, its optimiser, and a whole run from recipe to export."""

from .module import VidPrismLightningModule

__all__ = ["VidPrismLightningModule"]
