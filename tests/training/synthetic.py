"""Batches of random pixels and a bare trainer, for tests of the LightningModule alone."""

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from small import NUM_FRAMES
from torch.utils.data import DataLoader


def random_batches(count: int, size: int = 4, num_labels: int = 2, seed: int = 0) -> DataLoader:
    """Batches as the data module gives them to the device."""
    generator = torch.Generator().manual_seed(seed)
    batches = [
        {
            "pixel_values_videos": torch.randn(size, NUM_FRAMES, 3, 32, 32, generator=generator),
            "labels": torch.randint(num_labels, (size,), generator=generator),
        }
        for _ in range(count)
    ]
    return DataLoader(batches, batch_size=None)


def trainer(folder, **settings) -> L.Trainer:
    """A trainer on the CPU that logs every step."""
    settings = {"max_epochs": 1, "logger": CSVLogger(folder), "enable_checkpointing": False} | settings
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
