"""Studies of the head: a trial for each row of some grids, each fold and each seed, from cached frame features.

The tower runs once for each video and view, into the data module's feature cache; a trial then takes seconds. The
study's folder holds folds/ (lists of validation videos, which `data.val_list` takes), trials.jsonl (a line per finished
trial, keyed by a hash of everything it depends on), locks/ (several processes may share a study) and the report.
"""

import gc
import hashlib
import inspect
import json
import logging
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning import LightningDataModule, LightningModule
from torch.utils.data import Dataset

from .. import __version__
from ..data import VideoDataModule
from ..data.sources.splits import clip_list_hash
from ..errors import UserError
from ..model import VISION_PRESETS, VidPrismConfig
from ..quiet import quiet_lightning
from ..signals import SignalWatch, Stopped
from ..training.module import VidPrismLightningModule, check_frozen
from ..util import atomic_write
from .baselines import num_trainable
from .folds import block_folds, group_folds
from .grids import PROBE, RECIPE, Row, grid_rows
from .heads import TrainerSettings, feature_loader, quiet_trainer, train_head
from .probes import PENALTIES, PROBES, fit_probe
from .report import Result, summarise, write_report
from .trials import Trial, Trials, append_trial, read_trials

TRIALS = "trials.jsonl"
RESUME = "run the same command to resume"
MODULE_SETTINGS = set(inspect.signature(VidPrismLightningModule).parameters)
# Those without effect on a head: a trial's key leaves them out.
TOWER_SETTINGS = {
    *("backbone", "freeze_backbone", "freeze_layers"),
    *("backbone_lr_scale", "layer_decay", "gradient_checkpointing"),
}


@dataclass(frozen=True)
class Fold:
    """One split into training and validation videos.

    Attributes:
        train: Training videos as frame features.
        val: Validation videos as frame features.
        groups: Group of each training video, (N,), by which a probe chooses its penalty.
        key: Hashes of features, names and labels.
    """

    train: Dataset
    val: Dataset
    groups: np.ndarray
    key: tuple[str, ...]


class Plan(NamedTuple):
    """A trial to run: row, fold and seed."""

    row: Row
    fold: int
    seed: int


class Study:
    """Compares variants of the head on one source of videos, by cross-validation.

    Building one computes the features that the cache lacks. A study that was stopped resumes: finished trials are kept,
    and those whose settings have changed are trained again.

    Args:
        data: Source, batch size and feature cache; with folds of the study's own, its validation rule is ignored.
        model: Tower, head configuration and optimizer settings that all rows share. Only its tower runs.
        output: Folder of the study.
        trainer: How heads are trained.
        precision: Precision of the tower; `bf16-mixed` halves its time.
        folds: Number of contiguous blocks of each class to hold out in turn.
        groups: Regular expression; videos whose names agree in what it captures are held out together, in turn.
            Without `folds` and `groups` the source's own split is the only fold.

    Raises:
        UserError: If the settings do not train heads on cached features, or a video cannot be decoded.

    Example:
        >>> data = VideoDataModule("clips", val_fraction=0.5, num_frames=16, augment=False, feature_cache="features")
        >>> model = VidPrismLightningModule("b16", id2label=data.id2label, num_frames=16, freeze_backbone=True)
        >>> study = Study(data, model, "runs/ablations", folds=5)
        >>> study.run(["readout"], seeds=3)
        >>> study.report(["readout"], seeds=3)
    """

    @quiet_lightning(logging.ERROR)
    def __init__(
        self,
        data: VideoDataModule,
        model: VidPrismLightningModule,
        output: str | Path,
        *,
        trainer: TrainerSettings | None = None,
        precision: str | int | None = None,
        folds: int | None = None,
        groups: str | None = None,
    ):
        if folds is not None and groups is not None:
            raise UserError("folds, groups: give one of them, or none for the source's own split")
        check_settings(data, model)
        self.data, self.model, self.output = data, model, Path(output)
        self.trainer, self.precision = trainer or TrainerSettings(), precision
        self.settings = {name: value for name, value in own_settings(model).items() if name != "config"}
        self.config = model.hparams.config or {}
        self.folds = list(self._folds(folds, groups))
        self.split = "the source's own split"
        if groups:
            self.split = f"{len(self.folds)} folds, one group each (`{groups}`)"
        elif folds:
            self.split = f"{len(self.folds)} folds, contiguous blocks of each class"
        self.feature_size = self.folds[0].val[0]["frame_features"].shape[-1]
        self.trials = read_trials(self.output / TRIALS)

    @quiet_lightning(logging.ERROR)
    def run(self, grids: Sequence[str] = ("all",), seeds: int = 3) -> None:
        """Runs the missing trials seed by seed, so that a stopped study has complete tables first.

        Args:
            grids: Names of grids.GRIDS, or `all`. The recipe itself and a linear probe are always added.
            seeds: Trainings of each row and fold.

        Raises:
            UserError: If a training diverges.
            Stopped: After a signal, when the current trial is finished.
        """
        wanted: dict[str, Plan] = {}
        for plan in self._plans(grids, seeds):
            wanted.setdefault(self._key(plan), plan)
        missing = {key: plan for key, plan in wanted.items() if key not in self.trials}
        print(f"{len(wanted)} trials, {len(missing)} to train", flush=True)
        (self.output / "locks").mkdir(parents=True, exist_ok=True)
        watch = SignalWatch()
        watch.install(quiet_trainer(accelerator="cpu"), "stopping after this trial")
        try:
            busy = {}
            for wait in (False, True):  # trials of other processes come last, in case they do not finish
                for key, plan in (busy if wait else missing).items():
                    if not self._run_locked(key, plan, wait):
                        busy[key] = plan
                    if watch.received:
                        print(
                            f"Stopped with {len(self.trials.keys() & wanted.keys())} of {len(wanted)} trials: {RESUME}"
                        )
                        raise Stopped(watch.received)
        finally:
            watch.restore()

    def results(self, grids: Sequence[str] = ("all",), seeds: int = 3) -> list[Result]:
        """Returns the rows of the table, of the trials that are finished."""
        rows = {(row.grid, row.name): self._trials(row, seeds) for row in grid_rows(grids)}
        return summarise(rows, self._trials(RECIPE, seeds), self._trials(PROBE, seeds))

    def report(self, grids: Sequence[str] = ("all",), seeds: int = 3) -> list[Path]:
        """Writes ablations.md, .csv and .png into the study's folder and returns their paths; trains nothing."""
        return write_report(self.results(grids, seeds), self._about(grids, seeds), self.output)

    def _plans(self, grids: Sequence[str], seeds: int) -> list[Plan]:
        rows = [RECIPE, PROBE, *grid_rows(grids)]
        return [Plan(row, fold, seed) for seed in range(seeds) for row in rows for fold in range(len(self.folds))]

    def _run_locked(self, key: str, plan: Plan, wait: bool) -> bool:
        """Runs a trial unless it is finished; returns False if another process is running it and `wait` is not set."""
        lock = FileLock(self.output / "locks" / key)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            return False
        try:
            self.trials = read_trials(self.output / TRIALS)
            if key not in self.trials:
                self.trials[key] = trial = self._run_trial(plan)
                append_trial(self.output / TRIALS, key, trial)
                gc.collect()  # trainer and module refer to each other, with all weights: gigabytes in an hour
                result = f"{sum(trial.correct)} of {len(trial.correct)} in {trial.seconds:.1f} s"
                print(f"{plan.row.name}, fold {plan.fold}, seed {plan.seed}: {result}", flush=True)
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
        return True

    def _trials(self, row: Row, seeds: int) -> Trials:
        """Returns a row's trials by seed, of the seeds whose folds are all finished; a probe's under None."""
        folds = range(len(self.folds))
        numbers = {None: 0} if row.baseline in PROBES else {seed: seed for seed in range(seeds)}
        found = {
            name: [self.trials.get(self._key(Plan(row, fold, seed))) for fold in folds]
            for name, seed in numbers.items()
        }
        return {name: trials for name, trials in found.items() if None not in trials}

    def _about(self, grids: Sequence[str], seeds: int) -> str:
        """Returns the report's paragraph on what was trained and how."""
        data, model, fold = self.data, self.settings, self.folds[0]
        wanted = {self._key(plan) for plan in self._plans(grids, seeds)}
        finished = len(wanted & self.trials.keys())
        views = f"{data.hparams.train_views} random views" if data.hparams.augment else "the evaluation's own view"
        return (
            f"{data.name}: {len(fold.train) + len(fold.val)} videos of {len(data.id2label)} classes, "
            f"{model['num_frames']} frames each; {self.split}; seeds as stated per row. The tower is frozen; training "
            f"videos are seen in {views}. Heads train for {self.trainer.length} with batches of "
            f"{data.hparams.batch_size}, a learning rate of {model['learning_rate']:g} and weight decay "
            f"{model['weight_decay']:g}, with `{json.dumps(self.config, sort_keys=True)}`; the last weights are "
            "tested. All rows share these settings but the probes, whose penalty is chosen within each fold's training "
            "videos. top-1 is the mean over folds."
        ) + ("" if finished == len(wanted) else f" **Not finished: {finished} of {len(wanted)} trials.**")

    def _folds(self, count: int | None, pattern: str | None) -> Iterator[Fold]:
        """Yields the folds; the tower computes missing features."""
        data = self.data
        if count is None and pattern is None:
            yield self._fold(data, {})
            return
        tables = (data.splits.train, data.splits.val)
        names = [table.name(index) for table in tables for index in range(len(table))]
        labels = np.concatenate([table.labels for table in tables])
        folds = group_folds(names, pattern) if pattern is not None else block_folds(names, labels, count)
        fold_of = dict(zip(names, folds.tolist(), strict=True))
        lists = self.output / "folds" / hash_of(fold_of)[:8]
        lists.mkdir(parents=True, exist_ok=True)
        for fold in range(max(fold_of.values()) + 1):
            val_list = lists / f"{fold}.txt"
            held_out = sorted(name for name, own in fold_of.items() if own == fold)
            atomic_write(val_list, "".join(f"{name}\n" for name in held_out).encode())  # others may be reading it
            rule = {"val_fraction": None, "val_pattern": None, "val_list": str(val_list)}
            yield self._fold(VideoDataModule(**own_settings(data) | rule), fold_of)

    def _fold(self, data: VideoDataModule, fold_of: dict[str, int]) -> Fold:
        trainer = quiet_trainer(accelerator=self.trainer.accelerator, precision=self.precision, max_epochs=0)
        try:
            with warnings.catch_warnings():  # about the schedule of a training that does not take place
                warnings.filterwarnings("ignore", "model.warmup_epochs")
                trainer.fit(self.model, datamodule=data)
        except SystemExit as error:  # Lightning's answer to Ctrl-C
            print(f"Stopped while computing features: {RESUME}")
            raise Stopped(signal.SIGINT) from error
        train, val = data.train_dataloader().dataset, data.val_dataloader().dataset
        bad = [part.table.name(i) for part in (train, val) for i in range(len(part)) if part[i]["bad_clips"]]
        if bad:
            raise UserError(
                f"{bad[0]}: cannot be decoded, like {len(bad)} of {len(train) + len(val)} videos in all; list them "
                "with vidprism data check and remove them"
            )
        names, labels = [train.table.name(index) for index in range(len(train))], train.table.labels
        groups = [fold_of.get(name, 0) for name in names]
        if len(set(groups)) < 2:  # no two folds to train on: blocks of the training videos instead
            fewest = min(Counter(labels.tolist()).values())
            blocks = np.arange(len(names)) * 5 // len(names)  # across classes if one has a single video
            groups = block_folds(names, labels, min(5, fewest)) if fewest > 1 else blocks
        lists = [clip_list_hash(table, in_order=True) for table in (data.splits.train, data.splits.val)]
        return Fold(train, val, np.asarray(groups), (train.digest, val.digest, *lists))

    def _key(self, plan: Plan) -> str:
        """Returns the hash of all that a trial depends on; changes that repeat the recipe's value do not count."""
        row, fold = plan.row, self.folds[plan.fold]
        about = {"version": __version__, "fold": fold.key, "baseline": row.baseline}
        if row.baseline in PROBES:  # nothing random
            about |= {"probe": [PROBES[row.baseline], PENALTIES, fold.groups.tolist()]}
        else:
            settings = self._module_settings(row)
            about |= {
                "head": self._head_config(row).to_dict(),
                "model": {name: value for name, value in settings.items() if name not in TOWER_SETTINGS},
                "batch_size": self.data.hparams.batch_size,
                "trainer": asdict(self.trainer),
                "seed": plan.seed,
            }
        return hash_of(about)[:32]

    def _module_settings(self, row: Row) -> dict[str, Any]:
        return self.settings | {name: value for name, value in row.changes.items() if name in MODULE_SETTINGS}

    def _head_config(self, row: Row) -> VidPrismConfig:
        """Returns the configuration of a head on cached features; its tower is a small one that never runs."""
        changes = {name: value for name, value in row.changes.items() if name not in MODULE_SETTINGS}
        labels = self.model.id2label
        tower = VISION_PRESETS["tiny"]["vision_config"] | {"projection_dim": self.feature_size}
        return VidPrismConfig(
            vision_config=tower,
            num_frames=self.settings["num_frames"],
            id2label=labels,
            label2id={label: index for index, label in labels.items()},
            **self.config | changes,
        )

    def _run_trial(self, plan: Plan) -> Trial:
        start = time.perf_counter()
        correct, size = self._probe(plan) if plan.row.baseline in PROBES else self._head(plan)
        return Trial(correct, size, round(time.perf_counter() - start, 2))

    def _head(self, plan: Plan) -> tuple[list[bool], int]:
        """Returns whether each validation video is predicted correctly, and the number of trainable parameters."""
        row, fold, seed = plan.row, self.folds[plan.fold], plan.seed
        config, settings = self._head_config(row), self._module_settings(row)
        batch_size = self.data.hparams.batch_size
        model = train_head(config, settings, self.trainer, fold.train, batch_size, seed, row.baseline)
        correct = []
        for batch in feature_loader(fold.val, 64):
            with torch.no_grad():
                logits = model(frame_features=batch["frame_features"]).logits
            if not logits.isfinite().all():
                raise UserError(f"{row.name}, fold {plan.fold}, seed {seed}: diverged; lower model.learning_rate")
            correct += (logits.argmax(-1) == batch["labels"]).tolist()
        return correct, num_trainable(model)

    def _probe(self, plan: Plan) -> tuple[list[bool], int]:
        """Returns the same of a probe."""
        fold = self.folds[plan.fold]
        views = (fold.train.train_views or 1) if fold.train.reader.augmentation else 1
        frames, labels = arrays([fold.train[view, index] for view in range(views) for index in range(len(fold.train))])
        probe = fit_probe(frames, labels, np.tile(fold.groups, views), **PROBES[plan.row.baseline])
        frames, labels = arrays([fold.val[index] for index in range(len(fold.val))])
        size = (probe["frames"].transform(frames[:1]).shape[-1] + 1) * len(self.model.id2label)
        return (probe.predict(frames) == labels).tolist(), size


def check_settings(data: VideoDataModule, model: VidPrismLightningModule) -> None:
    """Checks that settings train heads from cached features.

    Raises:
        UserError: If they do not.
    """
    if not data.hparams.feature_cache:
        raise UserError("data.feature_cache: name a folder for the features; recipes/ablations/head.yaml is an example")
    check_frozen(model.hparams.freeze_backbone)
    for name in ("checkpoint", "ema_decay", "reference_batch_size"):
        if model.hparams[name] is not None:
            raise UserError(f"model.{name}: is not supported in an ablation; remove it")
    if data.hparams.shots is not None:
        raise UserError("data.shots: is not supported in an ablation, whose folds take all videos; remove it")
    if (data.hparams.test_clips, data.hparams.test_crops) != (1, 1):
        raise UserError("data.test_clips, data.test_crops: an ablation tests a single view; set both to 1")


def own_settings(module: LightningModule | LightningDataModule) -> dict[str, Any]:
    """Returns the arguments that a module was built with, without those that Lightning notes for itself."""
    return {name: value for name, value in module.hparams.items() if not name.startswith("_")}


def hash_of(value: Any) -> str:
    """Returns the SHA-256 of a value as JSON, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def arrays(items: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns frame features (N, T, D) in float32 and labels (N,)."""
    frames = torch.stack([item["frame_features"].float() for item in items])
    return frames.numpy(), np.array([int(item["labels"]) for item in items])
