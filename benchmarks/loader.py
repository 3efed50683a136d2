"""Claim: what a training gets from its loader, beside what bare decoding in one process would give.

One epoch of training batches (decode, augment, collate) through the data module's DataLoader with 0, 1 and 2 workers,
and the same clips, the same number of frames each, through `decode_video` alone in this process. All are timed in
turn, several rounds in one run; only the ratios hold for other machines.

    python benchmarks/loader.py --data path/to/folder --frames 8 32
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from report import add_report_options, write_report
from torch.utils.data import DataLoader

from vidprism_hf.data import ClipDataset, ClipSampler, VideoDataModule, random_in_segments
from vidprism_hf.data.loading.dataset import collate
from vidprism_hf.model import decode_video


def bare(table, num_frames, epoch):
    """Decodes a random frame of each segment of all clips."""
    generator = np.random.default_rng(epoch)
    for index in range(len(table)):
        decode_video(table.video(index), lambda total: random_in_segments(total, num_frames, generator))
    return len(table)


def through(loader, epoch):
    """Takes one epoch from a loader."""
    loader.sampler.set_epoch(epoch)
    count = 0
    for batch in loader:
        if batch["bad_clips"]:
            raise RuntimeError(f"clips that do not decode would be counted: {batch['bad_clips'][:3]}")
        count += len(batch["labels"])
    return count


def training_loader(source, num_frames, workers, batch_size, most):
    """The data module's training loader on some of the clips of a source, all of whose classes remain."""
    data = VideoDataModule(**source, processor="b16", num_frames=num_frames, num_workers=workers, batch_size=batch_size)
    whole = data.train_dataloader()
    table = whole.dataset.table
    chosen = np.sort(np.random.default_rng(0).permutation(len(table))[:most])
    return DataLoader(
        ClipDataset(table.select(chosen), whole.dataset.reader),
        batch_size=batch_size,
        sampler=ClipSampler(len(chosen), training=True),
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
    )


def measure(source, num_frames, args):
    """Clips per second: the median over the rounds of each way, by its name."""
    loaders = {
        _workers(workers): training_loader(source, num_frames, workers, args.batch_size, args.clips)
        for workers in args.workers
    }
    table = next(iter(loaders.values())).dataset.table
    ways = {"bare": lambda epoch: bare(table, num_frames, epoch)}
    ways |= {name: (lambda epoch, loader=loader: through(loader, epoch)) for name, loader in loaders.items()}
    rates = {name: [] for name in ways}
    for epoch in range(args.rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            count = run(epoch)
            if epoch:  # the first round starts the workers and fills the disk cache
                rates[name].append(count / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}, len(table)


def _workers(count):
    return "1 worker" if count == 1 else f"{count} workers"


def sources(args):
    """Folders to measure, by name, as arguments of VideoDataModule."""
    rule = {} if args.val_fraction is None else {"val_fraction": args.val_fraction}
    return {Path(folder).resolve().name: {"source": folder} | rule for folder in args.data}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", nargs="+", default=["demo"], help="folders of class folders, or demo")
    parser.add_argument("--val_fraction", type=float, help="rule for folders of one level, as data.val_fraction")
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--clips", type=int, default=64, help="most clips an epoch, drawn at random")
    parser.add_argument("--rounds", type=int, default=5)
    add_report_options(parser)
    args = parser.parse_args()

    torch.set_num_threads(1)  # as in a loader's worker: only the number of processes differs
    rows = []
    for name, source in sources(args).items():
        for num_frames in args.frames:
            rates, count = measure(source, num_frames, args)
            others = [f"{rates[way]:.1f} ({rates[way] / rates['bare']:.2f})" for way in rates if way != "bare"]
            rows.append([name, str(count), str(num_frames), f"{rates['bare']:.1f}", *others])
    header = ["clips of", "clips", "frames", "bare decoding", *map(_workers, args.workers)]
    about = (
        "Training clips per second, and in brackets the ratio to bare decoding in one process; medians of "
        f"{args.rounds} rounds. Through the loader a clip is decoded, resized, cropped to 224 pixels, augmented and "
        f"put into a batch of {args.batch_size}; 0 workers do this in the training process."
    )
    write_report("What the loader gives", about, header, rows, args)


if __name__ == "__main__":
    main()
