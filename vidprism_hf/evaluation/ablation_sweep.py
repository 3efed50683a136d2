"""A sweep of `vidprism ablate`: a head for each row of its grids, each fold and each seed, trained and tested.

The tower runs once for each clip and view, into the recipe's feature cache; a cell (a row, a fold, a seed) then takes
seconds. It is trained by the recipe, by the run's own `VidPrismLightningModule`, for all its epochs: no checkpoint is
chosen, so that held-out clips decide nothing.

The sweep's folder holds folds/ (lists of held-out clips, which `vidprism finetune --data.val_list` takes) and
cells.jsonl: a line for each finished cell, by the hash of all that it follows from. A sweep that was stopped goes on,
one whose recipe has changed trains anew, and several processes may share one, which locks/ keeps apart.
"""

import argparse
import gc
import hashlib
import json
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader, Dataset

from .. import __version__
from ..data import VideoDataModule
from ..data.dataset import ClipSampler, collate
from ..data.few_shot import clip_list_hash
from ..errors import UserError
from ..model import VISION_PRESETS, VidPrismConfig, VidPrismForVideoClassification
from ..training.module import VidPrismLightningModule
from ..training.recipe import FinetuneCLI
from ..training.signals import SignalWatch, Stopped
from ..util import atomic_write
from .ablation_cells import Cell, Cells, append_cell, read_cells
from .baselines import PROBE_PENALTIES, TIME_WEIGHTS, LinearProbe, parameters_of, with_baseline
from .folds import block_folds, group_folds

CELLS = "cells.jsonl"
AGAIN = "the same command goes on"
# Linear probes: what each is built with.
PROBES: dict[str, dict[str, Any]] = {
    "probe": {},
    "whitened_probe": {"whitened": True},
    "timed_probe": {"time_weights": TIME_WEIGHTS},
}
# What of a recipe's trainer a cell is trained with; the head is small, so one device and full precision do.
OF_TRAINER = (
    "accelerator",
    "max_epochs",
    "max_steps",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "accumulate_grad_batches",
)
GridRows = list[tuple[str, str, dict[str, Any]]]  # grid, name and changes
# What a row may change beside the head.
OF_TRAINING = ("learning_rate", "label_smoothing", "weight_decay")
# What of its model has no influence on a head.
OF_TOWER = {
    *("backbone", "freeze_backbone", "freeze_layers"),
    *("backbone_lr_scale", "layer_decay", "gradient_checkpointing"),
}


class HeadModule(VidPrismLightningModule):
    """The run's module without callbacks of its own: a cell has no folder and no bad clips."""

    def configure_callbacks(self) -> list[L.Callback]:
        return []


@dataclass(frozen=True)
class Fold:
    """One part held out.

    Attributes:
        train: Training clips as frame features.
        val: Held-out clips as frame features.
        features: Hashes of the features of both.
        groups: For each training clip the number of the fold that it is in otherwise, (N,).
        clips: Hash of the names and labels of both, in order.
    """

    train: Dataset
    val: Dataset
    features: tuple[str, str]
    groups: torch.Tensor
    clips: str


class Sweep:
    """The cells of a recipe on a source of clips.

    Args:
        cli: The parsed recipe.
        output: The sweep's folder.
        folds: Number of contiguous blocks to hold out in turn.
        groups: Regular expression of the groups to hold out in turn; without both the source's split is the only
            fold.
    """

    def __init__(self, cli: FinetuneCLI, output: Path, folds: int | None, groups: str | None):
        self.cli, self.output = cli, output
        self.settings = {name: value for name, value in own_settings(cli.model).items() if name != "config"}
        self.config = cli.model.hparams.config or {}
        trainer = cli.config.trainer
        self.trainer = {name: trainer[name] for name in OF_TRAINER}
        self.folds = list(self._folds(folds, groups))
        self.feature_size = self.folds[0].val[0]["frame_features"].shape[-1]
        self.cells = read_cells(output / CELLS)

    def run(self, rows: GridRows, seeds: range) -> None:
        """Trains the cells that are not there, seed by seed: a sweep that is stopped has whole tables first."""
        wanted: dict[str, tuple[str, dict[str, Any], int, int]] = {}
        for seed in seeds:
            for _, name, changes in rows:
                for fold in range(len(self.folds)):
                    wanted.setdefault(self._key(changes, fold, seed), (name, changes, fold, seed))
        missing = {key: cell for key, cell in wanted.items() if key not in self.cells}
        print(f"{len(wanted)} cells, {len(missing)} to train", flush=True)
        (self.output / "locks").mkdir(parents=True, exist_ok=True)
        watch = SignalWatch()
        watch.install(quiet_trainer(accelerator="cpu"), "stopping after this cell")
        try:
            busy = []
            for wait in (False, True):  # those that another process trains come last, should it not end them
                for key, cell in list(missing.items()) if not wait else busy:
                    if self._run_cell(key, cell, wait):
                        busy.append((key, cell))
                    if watch.received:
                        print(f"Stopped with {len(self.cells.keys() & wanted.keys())} of {len(wanted)} cells: {AGAIN}")
                        raise Stopped(watch.received)
        finally:
            watch.restore()

    def _run_cell(self, key: str, cell: tuple[str, dict[str, Any], int, int], wait: bool) -> bool:
        """Trains a cell unless it is there; returns whether it was left to another process that trains it just now."""
        name, changes, fold, seed = cell
        lock = FileLock(self.output / "locks" / key)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            return True
        try:
            self.cells = read_cells(self.output / CELLS)
            if key not in self.cells:
                trained = self._train(changes, self.folds[fold], seed)
                append_cell(self.output / CELLS, key, trained)
                self.cells[key] = trained
                gc.collect()  # a trainer and its module refer to each other, with all weights: gigabytes in an hour
                said = f"{sum(trained.right)} of {len(trained.right)} in {trained.seconds:.1f} s"
                print(f"{name}, fold {fold}, seed {seed}: {said}", flush=True)
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
        return False

    def of_row(self, changes: dict[str, Any], seeds: range) -> Cells:
        """The cells of a row, of the seeds that are complete; of a probe, which has nothing random, under None."""
        folds = range(len(self.folds))
        of_seed = {None: 0} if changes.get("baseline") in PROBES else {seed: seed for seed in seeds}
        found = {
            name: [self.cells.get(self._key(changes, fold, seed)) for fold in folds] for name, seed in of_seed.items()
        }
        return {name: cells for name, cells in found.items() if None not in cells}

    def _missing(self, rows: GridRows, seeds: range) -> str:
        """How much of a sweep is not there, in a sentence."""
        wanted = {self._key(row[2], fold, seed) for row in rows for fold in range(len(self.folds)) for seed in seeds}
        there = len(wanted & self.cells.keys())
        return "" if there == len(wanted) else f" **Not finished: {there} of {len(wanted)} cells.**"

    def about(self, options: argparse.Namespace, rows: GridRows, seeds: range) -> str:
        """What was trained and how, for the report."""
        data, model = self.cli.datamodule, self.settings
        how = "the source's own split"
        if options.groups:
            how = f"{len(self.folds)} folds, one group each (`{options.groups}`)"
        elif options.folds:
            how = f"{len(self.folds)} folds, contiguous blocks of each class"
        clips = sum(data.num_clips.values())
        views = f"{data.hparams.train_views} random views" if data.hparams.augment else "the evaluation's own view"
        return (
            f"{data.name}: {clips} clips of {len(data.id2label)} classes, {model['num_frames']} frames each; {how}; "
            f"seeds as the rows say. The tower is frozen; training clips are seen in {views}. Heads train for "
            f"{self._length()} of batches of {data.hparams.batch_size} at a learning rate of "
            f"{model['learning_rate']:g} and weight decay {model['weight_decay']:g}, with "
            f"`{json.dumps(self.config, sort_keys=True)}`; the last weights are tested. All rows but the probes, whose "
            "penalty is chosen within each fold's training clips, have the settings of the recipe. top-1 is the mean "
            "over folds." + self._missing(rows, seeds)
        )

    def _length(self) -> str:
        """How long heads train, in words."""
        epochs, steps = self.trainer["max_epochs"], self.trainer["max_steps"]
        bounds = {f"{epochs} epochs": epochs, f"{steps} steps": steps}
        return " and at most ".join(text for text, number in bounds.items() if number not in (None, -1))

    def _folds(self, count: int | None, pattern: str | None) -> Iterator[Fold]:
        """The folds, with their features, which the tower computes where they are missing."""
        data = self.cli.datamodule
        if count is None and pattern is None:
            yield self._fold(data, None)
            return
        tables = (data.splits.train, data.splits.val)
        names = [table.name(index) for table in tables for index in range(len(table))]
        labels = np.concatenate([table.labels for table in tables])
        folds = group_folds(names, pattern) if pattern is not None else block_folds(names, labels, count)
        fold_of = dict(zip(names, folds.tolist(), strict=True))
        lists = self.output / "folds" / hashlib.sha256(json.dumps(fold_of, sort_keys=True).encode()).hexdigest()[:8]
        lists.mkdir(parents=True, exist_ok=True)
        for fold in range(max(fold_of.values()) + 1):
            listing = lists / f"{fold}.txt"
            held_out = sorted(name for name, its in fold_of.items() if its == fold)
            atomic_write(listing, "".join(f"{name}\n" for name in held_out).encode())  # others may read it just now
            rule = {"val_fraction": None, "val_pattern": None, "val_list": str(listing)}
            yield self._fold(VideoDataModule(**own_settings(data) | rule), fold_of)

    def _fold(self, data: VideoDataModule, fold_of: dict[str, int] | None) -> Fold:
        trainer = quiet_trainer(
            accelerator=self.trainer["accelerator"], precision=self.cli.config.trainer.precision, max_epochs=0
        )
        try:
            with warnings.catch_warnings():  # of a schedule, which this has none of
                warnings.filterwarnings("ignore", "model.warmup_epochs")
                trainer.fit(self.cli.model, datamodule=data)
        except SystemExit as error:  # Lightning's answer to Ctrl-C
            print(f"Stopped while features were computed: {AGAIN}")
            raise Stopped(signal.SIGINT) from error
        train, val = data.train_dataloader().dataset, data.val_dataloader().dataset
        names = [train.table.name(index) for index in range(len(train))]
        bad = [
            part.table.name(index) for part in (train, val) for index in range(len(part)) if part[index]["bad_clips"]
        ]
        if bad:
            raise UserError(
                f"{bad[0]}: cannot be decoded, as {len(bad)} of {len(train) + len(val)} clips; vidprism data check "
                "lists them, remove them"
            )
        groups = [] if fold_of is None else [fold_of[name] for name in names]
        if len(set(groups)) < 2:  # parts of the training clips serve where a choice is made among them
            fewest = min(Counter(train.table.labels).values())
            blocks = np.arange(len(names)) * 5 // len(names)  # of all clips, where a class has but one
            groups = block_folds(names, train.table.labels, min(5, fewest)) if fewest > 1 else blocks
        clips = clip_list_hash(data.splits.train, in_order=True) + clip_list_hash(data.splits.val, in_order=True)
        return Fold(train, val, (train.digest, val.digest), torch.as_tensor(groups), clips)

    def _key(self, changes: dict[str, Any], index: int, seed: int) -> str:
        """The hash of all that a cell follows from. What a row says that is the recipe's anyway changes nothing."""
        fold, baseline = self.folds[index], changes.get("baseline")
        about = {"version": __version__, "features": fold.features, "clips": fold.clips, "baseline": baseline}
        if baseline in PROBES:  # which has nothing random
            about |= {"probe": [PROBES[baseline], PROBE_PENALTIES, fold.groups.tolist()]}
        else:
            config, training = parts(changes)
            model = {name: value for name, value in (self.settings | training).items() if name not in OF_TOWER}
            about |= {
                "head": self._head_config(config).to_dict(),
                "model": model,
                "batch_size": self.cli.datamodule.hparams.batch_size,
                "trainer": self.trainer,
                "seed": seed,
            }
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _head_config(self, changes: dict[str, Any]) -> VidPrismConfig:
        """The configuration of a head on kept features; its tower is a small one that never runs."""
        labels = self.cli.model.id2label
        tower = VISION_PRESETS["tiny"]["vision_config"] | {"projection_dim": self.feature_size}
        return VidPrismConfig(
            vision_config=tower,
            num_frames=self.settings["num_frames"],
            id2label=labels,
            label2id={label: index for index, label in labels.items()},
            **self.config | changes,
        )

    def _train(self, changes: dict[str, Any], fold: Fold, seed: int) -> Cell:
        start = time.perf_counter()
        baseline = changes.get("baseline")
        if baseline in PROBES:
            score, size = self._probe(fold, PROBES[baseline])
        else:
            config, training = parts(changes)
            score, size = self._head(self._head_config(config), training, baseline, fold, seed)
        right = []
        for batch in loader(fold.val, 64):
            scores = score(batch)
            if not scores.isfinite().all():
                raise UserError(f"seed {seed}, {json.dumps(changes)}: its training diverged; lower the learning rate")
            right += (scores.argmax(-1) == batch["labels"]).tolist()
        return Cell(right, size, round(time.perf_counter() - start, 2))

    def _head(self, config: VidPrismConfig, training: dict[str, Any], baseline: str | None, fold: Fold, seed: int):
        L.seed_everything(seed, verbose=False)
        model = VidPrismForVideoClassification._from_config(config)
        model.vidprism.vision_tower.freeze()
        if baseline is not None:
            with_baseline(model, baseline)
        module = HeadModule(**self.settings | training)
        module.model = model.train()
        trainer = quiet_trainer(**self.trainer)
        batch_size = self.cli.datamodule.hparams.batch_size
        trainer.fit(module, loader(fold.train, batch_size, ClipSampler(len(fold.train), training=True, seed=seed)))
        model.eval().cpu()
        return torch.no_grad()(lambda batch: model(frame_features=batch["frame_features"]).logits), parameters_of(model)

    def _probe(self, fold: Fold, settings: dict[str, Any]):
        views = (fold.train.train_views or 1) if fold.train.reader.augmentation else 1
        items = [fold.train[view, index] for view in range(views) for index in range(len(fold.train))]
        frames = torch.stack([item["frame_features"].float() for item in items])
        labels = torch.tensor([item["labels"] for item in items])
        probe = LinearProbe(len(self.cli.model.id2label), **settings)
        probe.fit(frames, labels, fold.groups.repeat(views))
        parts = 3 if probe.time_weight else 1
        size = (parts * self.feature_size + 1) * len(self.cli.model.id2label)
        return (lambda batch: probe(batch["frame_features"].float())), size


def parts(changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a row changes in the head's configuration, and in its training."""
    config = {name: value for name, value in changes.items() if name not in {"baseline", *OF_TRAINING}}
    return config, {name: changes[name] for name in OF_TRAINING if name in changes}


def own_settings(module: L.LightningModule | L.LightningDataModule) -> dict[str, Any]:
    """The arguments that a module was built with, without what LightningCLI notes beside them."""
    return {name: value for name, value in module.hparams.items() if not name.startswith("_")}


def loader(clips: Dataset, batch_size: int, sampler: ClipSampler | None = None) -> DataLoader:
    """Batches of frame features, in the process itself, and in full precision whatever the tower's was."""

    def batch(items: list[dict[str, Any]]) -> dict[str, Any]:
        collated = collate(items)
        return collated | {"frame_features": collated["frame_features"].float()}

    return DataLoader(clips, batch_size=batch_size, sampler=sampler, collate_fn=batch)


def quiet_trainer(**settings: Any) -> L.Trainer:
    """A trainer on one device that neither writes nor prints."""
    return L.Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **settings,
    )
