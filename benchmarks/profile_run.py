"""Claim: nothing but the tower shows in a training step. Where the time of a real run's steps goes, by torch.profiler.

A recipe's run as `vidprism finetune` builds it, with loggers and callbacks, takes some steps; then the parts of the
next ones are recorded, each without the parts inside it. On CUDA the device is waited for at the borders of the parts,
so that its work counts where it was asked for; what would overlap is shown one after the other. Loading shows its parts
with `--data.num_workers 0`; with workers only the waiting for them is left of it.

    make profile                                            # the demo; with DATASET, BACKBONE, ARGS as finetune
    python benchmarks/profile_run.py --config recipes/folder.yaml --data.source path/to/folder --data.val_fraction 0.2 \
        --model.backbone b16 --model.num_frames 32 --data.num_workers 0 --report benchmarks/results/profile.md

(Not called profile.py: Python's own module of that name would not be found beside it.)
"""

import argparse
import functools
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import Profiler
from report import add_report_options, write_report
from torch.profiler import ProfilerActivity, profile, record_function

from vidprism_hf.cli.recipe import parse, plan_of
from vidprism_hf.data import ClipAugmentation, VideoDataModule, datamodule
from vidprism_hf.data.loading import dataset
from vidprism_hf.model import VidPrismTemporalModel
from vidprism_hf.model.tower_vidprism import VidPrismVisionTower
from vidprism_hf.training.module import VidPrismLightningModule
from vidprism_hf.training.trainer import build_trainer

MARK = "part: "
# What profiles of runs showed beside the tower's matrix products, and what became of it.
NOTES = (
    "What could be avoided and was:",
    "1. The tower's last layer was computed for all patches, of which nothing is read: 7 % of ViT-B/16's multiply-adds "
    "and 3.5 % of ViT-L/14's. Now it is computed for the class token (`tower_vidprism.py`).",
    "2. Elementwise passes over memory, which no product hides: quick-GELU took 21 passes over the widest tensor of "
    "each layer, forward and backward, and kept three of its size; as SiLU it takes 13 and keeps two. AdamW took a "
    "dozen passes over all weights; in one kernel it takes about a fifth of the time (on this CPU).",
    "3. Operations that cost what it costs to start them: RgSTA and DBI ran stream by stream and edge by edge, the "
    "head in 445 operations forward and 1107 a step, losses and backward pass too; all streams at once it takes 193 "
    "and 609 (`head.py`: 32 clips, 32 frames, four streams). The constants of the normalisation were copied to "
    "the device for each batch, which waits for its queue; they are kept there.",
    "No custom kernel: beside the tower's products nothing that is left is large enough to pay for one.",
)
# What Lightning calls its actions, and the part of a step that each is; the first that fits counts.
ACTIONS = {
    "train_dataloader_next": "loading: the rest, and waiting for workers",
    ".batch_to_device": "transfer to the device",
    ".training_step": "classifier and losses",
    ".backward": "backward",
    ".optimizer_step": "Lightning's loop",
    "gradient_clipping": "gradient clipping",
    "[Callback]": "callbacks",
    "run_training_batch": "Lightning's loop",
}
# Our own functions and the optimiser's.
FUNCTIONS = [
    (dataset.ClipReader, "_decode", "loading: decode"),
    (ClipAugmentation, "__call__", "loading: augment"),
    (datamodule, "collate", "loading: collate"),
    (VideoDataModule, "on_after_batch_transfer", "normalise and mix"),
    (VidPrismVisionTower, "forward", "tower forward"),
    (VidPrismTemporalModel, "forward", "head forward"),
    (VidPrismLightningModule, "_log_losses", "logging"),
    (CSVLogger, "log_metrics", "logging"),
    (TensorBoardLogger, "log_metrics", "logging"),
    (torch.optim.AdamW, "step", "optimiser"),
    (torch.optim.AdamW, "zero_grad", "optimiser"),
]


def wait():
    """Lets the device finish, so that its work falls into the part that asked for it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Part:
    """One part of a step, from the first to the last moment of the block."""

    def __init__(self, name):
        self.record = record_function(MARK + name)

    def __enter__(self):
        wait()
        self.record.__enter__()

    def __exit__(self, *error):
        wait()
        self.record.__exit__(*error)


def mark(owner, name, part):
    """Makes a function or method show as a part."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def marked(*args, **kwargs):
        with Part(part):
            return function(*args, **kwargs)

    setattr(owner, name, marked)


class Steps(Profiler):
    """Lightning's actions as parts; torch.profiler runs from one request for a batch to another."""

    def __init__(self, warmup, steps):
        super().__init__()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.torch_profiler = profile(activities=activities, acc_events=True)
        self.first, self.last = warmup, warmup + steps
        self.requests = 0
        self.open = defaultdict(list)

    def start(self, action_name):
        part = next((part for key, part in ACTIONS.items() if key in action_name), None)
        if part is None:
            return
        if "train_dataloader_next" in action_name:
            if self.requests == self.first:
                self.torch_profiler.start()
            elif self.requests == self.last:
                wait()
                self.torch_profiler.stop()
            self.requests += 1
        opened = Part(part)
        opened.__enter__()
        self.open[action_name].append(opened)

    def stop(self, action_name):
        if self.open[action_name]:
            self.open[action_name].pop().__exit__(None, None, None)


def own_times(events):
    """Seconds in each part without the parts inside it, and the seconds from the first part to the last."""
    parts = [event for event in events if event.name.startswith(MARK) and not event.is_async]
    thread = next(event.thread for event in parts if event.name == MARK + ACTIONS[".training_step"])
    parts = sorted(
        (event for event in parts if event.thread == thread),
        key=lambda event: (event.time_range.start, -event.time_range.end),
    )
    own, around = defaultdict(float), []
    for event in parts:
        while around and around[-1].time_range.end <= event.time_range.start:
            around.pop()
        length = event.time_range.elapsed_us() / 1e6
        own[event.name.removeprefix(MARK)] += length
        if around:
            own[around[-1].name.removeprefix(MARK)] -= length
        around.append(event)
    total = max(event.time_range.end for event in parts) - parts[0].time_range.start
    return own, total / 1e6


def run(argv, folder, warmup, steps):
    """Trains for some steps and returns the recorded events, the settings and the most expensive operations."""
    limits = ["--trainer.max_steps", str(warmup + steps + 1), "--trainer.limit_val_batches", "0"]
    cli = parse([*argv, "--output", str(folder), "--trainer.max_epochs", "1000", *limits])
    for owner, name, part in FUNCTIONS:
        mark(owner, name, part)
    trainer = build_trainer(plan_of(cli, ""))
    trainer.profiler = steps = Steps(warmup, steps)
    trainer.fit(cli.model, datamodule=cli.datamodule)
    return steps.torch_profiler, cli, trainer


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--warmup", type=int, default=3, help="steps before those that are recorded")
    parser.add_argument("--steps", type=int, default=10, help="steps that are recorded")
    parser.add_argument("--operations", type=int, default=0, help="also print so many of the most expensive operations")
    add_report_options(parser, "--report")
    args, argv = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        profiler, cli, trainer = run(argv, Path(folder) / "run", args.warmup, args.steps)
    own, total = own_times(profiler.events())
    own["outside of all parts"] = total - sum(own.values())
    rows = [
        [name, f"{1e3 * seconds / args.steps:.2f}", f"{seconds / total:.1%}"]
        for name, seconds in sorted(own.items(), key=lambda item: -item[1])
    ]
    model, data = cli.model.hparams, cli.datamodule.hparams
    about = (
        f"Steps of {data.batch_size} clips of {cli.datamodule.name}, {model.num_frames} frames, "
        f"{Path(model.backbone).name}{', frozen' if model.freeze_backbone else ''}, {data.num_workers} loader workers, "
        f"precision {trainer.precision}, on {trainer.strategy.root_device}: {args.steps} steps of "
        f"{1e3 * total / args.steps:.1f} ms under the profiler, which itself costs some time at every operation."
    )
    write_report("Where a step's time goes", about, ["part of a step", "ms a step", "share"], rows, args, NOTES)
    if args.operations:
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=args.operations))


if __name__ == "__main__":
    main()
