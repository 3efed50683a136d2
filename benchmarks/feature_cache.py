"""Claim: with a frozen tower, an epoch from the feature cache is far quicker than one that computes the features.

A head is trained by the run's own data module, module and trainer on some clips of a folder, twice from the same
seed: with pixels, where each epoch decodes, augments and runs the tower, and with `data.feature_cache`, which is
empty at first. Epochs are timed from the first to the last step. The losses of both are compared as well.

    python benchmarks/feature_cache.py --data path/to/folder --backbone path/to/clip --val_fraction 0.2
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import lightning as L
import numpy as np
import torch
from report import add_report_options, write_report

from vidprism_hf import VidPrismLightningModule
from vidprism_hf.data import VideoDataModule

HELD_OUT = 2  # held-out clips, whose features are part of the filling; no epoch looks at them


class Clock(L.Callback):
    """Seconds and mean loss of each epoch, and seconds until the first one; ends a run early."""

    def __init__(self, epochs):
        self.wanted, self.epochs, self.losses = epochs, [], []
        self.start, self.before = time.perf_counter(), None

    def on_train_epoch_start(self, trainer, module):
        self.before = self.before or time.perf_counter() - self.start
        self.since, self.sum = time.perf_counter(), 0.0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.sum += outputs["loss"].item()

    def on_train_epoch_end(self, trainer, module):
        self.epochs.append(time.perf_counter() - self.since)
        self.losses.append(self.sum / trainer.num_training_batches)
        trainer.should_stop = len(self.epochs) == self.wanted


def train(folder, num_frames, epochs, args, cache=None):
    """Trains a head and returns its clock, and how many clips it saw in an epoch."""
    L.seed_everything(0, verbose=False)
    data = VideoDataModule(
        folder,
        processor=args.backbone,
        num_frames=num_frames,
        batch_size=args.batch_size,
        num_workers=args.workers,
        val_fraction=args.val_fraction,
        train_views=args.views,
        feature_cache=cache,
    )
    splits, draw = data.splits, np.random.default_rng(0)
    sizes = ((splits.train, args.clips), (splits.val, HELD_OUT))
    chosen = [np.sort(draw.permutation(len(table))[:most]) for table, most in sizes]
    data._splits = dataclasses.replace(splits, train=splits.train.select(chosen[0]), val=splits.val.select(chosen[1]))
    module = VidPrismLightningModule(
        args.backbone, id2label=data.id2label, num_frames=num_frames, freeze_backbone=True, warmup_epochs=1
    )
    clock = Clock(epochs)
    trainer = L.Trainer(
        min_epochs=0,
        max_epochs=args.epochs * args.repeats,  # in both, for the same schedule
        limit_val_batches=0,
        callbacks=[clock],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return clock, len(chosen[0])


def measure(folder, num_frames, args):
    """A row of the report."""
    pixels, count = train(folder, num_frames, args.epochs, args)
    with tempfile.TemporaryDirectory() as cache:
        kept, _ = train(folder, num_frames, args.epochs * args.repeats, args, cache)
        size = sum(path.stat().st_size for path in Path(cache).rglob("*.safetensors"))
    slow, quick = statistics.median(pixels.epochs), statistics.median(kept.epochs)
    losses = zip(pixels.losses, kept.losses, strict=False)
    return [
        Path(folder).resolve().name,
        str(count),
        str(num_frames),
        f"{slow:.1f} s",
        f"{quick:.3f} s",
        f"{slow / quick:.0f}",
        f"{kept.before / slow:.2f}",
        f"{size / 1e6:.1f} MB",
        f"{max(abs(one - two) for one, two in losses):.1e}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", nargs="+", required=True, help="folders of class folders")
    parser.add_argument("--val_fraction", type=float, default=0.2, help="rule of the folders, as data.val_fraction")
    parser.add_argument("--backbone", default="b16", help="CLIP checkpoint: a preset, a Hub id or a folder")
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--clips", type=int, default=48, help="most clips an epoch, drawn at random")
    parser.add_argument("--views", type=int, default=2, help="data.train_views")
    parser.add_argument("--epochs", type=int, default=2, help="epochs that compute features")
    parser.add_argument("--repeats", type=int, default=10, help="so many times as many are run from the cache")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    add_report_options(parser)
    args = parser.parse_args()

    rows = [measure(folder, num_frames, args) for folder in args.data for num_frames in args.frames]
    header = ["clips of", "clips", "frames", "epoch that computes", "epoch from the cache", "times faster"]
    header += ["filling, in epochs", "size", "difference of losses"]
    about = (
        f"Training a head on a frozen tower ({Path(args.backbone).name}), {args.batch_size} clips a step: medians over "
        f"the epochs, {args.epochs} from pixels (decoding, augmentation, tower, head) and {args.epochs * args.repeats} "
        f"from the cache, on {args.views} views of each clip; {args.workers} loader processes; threads of the tower: "
        f"{torch.get_num_threads()}. Filling the cache is given in epochs that compute, start-up included: about as "
        "many as there are views, once for all runs. The last column is the largest difference of an epoch's mean loss "
        "between the two."
    )
    write_report("What the feature cache saves", about, header, rows, args)


if __name__ == "__main__":
    main()
