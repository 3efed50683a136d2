"""Decides whether a run starts fresh or resumes, and prepares checkpoints for an exact resume.

Repeating a command resumes where it stopped, whatever its `resume`: checkpoints store the `resume` that their run, or
branch of it, started with. A checkpoint is written between two batches. It stores the position in the epoch
(VideoDataModule.state_dict), Lightning's counters, adjusted so that the next batch follows (`settle_progress`), and the
states of all random generators.
"""

import hashlib
import json
import os
import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from ...errors import UserError
from ...locks import INSIDE, not_writable
from ...safe_yaml import read_mapping
from ...util import preview
from .files import BEST, LAST, PREVIOUS, UNFINISHED, read_checkpoint

IDENTITY = re.compile(r"# Run (\w+)$", re.MULTILINE)
METRICS = "metrics.json"  # written last: marks a finished run
AUTO, NONE = "auto", "none"
ASIDE = "aside"  # in the checkpoints' folder: checkpoints of the last abandoned branch

# Settings of model and data that do not change the training, and settings of the trainer that do.
HARMLESS = {
    "model": {"gradient_checkpointing"},
    "data": {
        *("root", "num_workers", "verify_counts", "max_bad_fraction", "clip_time_limit", "test_clips", "test_crops"),
        *("feature_cache", "feature_cache_limit", "worker_timeout"),
    },
}
OF_THE_TRAINER = {
    *("devices", "num_nodes", "precision", "callbacks", "max_epochs", "max_steps", "limit_train_batches"),
    *("overfit_batches", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
}


@dataclass(frozen=True)
class Start:
    """How a run starts.

    Attributes:
        checkpoint: Checkpoint to resume from; None starts fresh.
        begun: The `resume` that the run, or its current branch, started with: "auto", "none" or a file name. It is
            stored in checkpoints, so that repeating the command resumes. None takes the checkpoint's.
        data: The data module's state in the checkpoint.
        run: The run's identity, stored in config.yaml and in every checkpoint: a hash of the settings it was first
            started with.
    """

    checkpoint: str | None = None
    begun: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    run: str | None = field(default=None, compare=False)


def begin(output: Path, resume: str, settings: dict[str, Any]) -> Start:
    """Decides how a run starts, prints the decision, and prepares the run's folder. Call it on rank 0 only.

    Args:
        output: The run's folder.
        resume: "auto", "none", or a checkpoint in the folder.
        settings: All settings of the run.

    Raises:
        UserError: If the folder cannot be used, or its run cannot or should not be resumed.
    """
    try:
        if resume not in (AUTO, NONE):
            return _from_checkpoint(output, Path(resume), settings)
        check_writable(output)
        if not any(path.suffix != UNFINISHED and path.name != INSIDE for path in output.iterdir()):
            print(f"A new run: {output}", flush=True)
            return Start(begun=resume)
        if not (output / "config.yaml").is_file():
            raise UserError(f"output {output}: exists and is not a run's folder; choose another one")
        if had_just_begun(output) and not changed_settings(output, settings):
            _sweep(output)
            print(f"The run in {output} was stopped before its first checkpoint; it starts again", flush=True)
            return Start(begun=resume)
        return _anew(output, settings) if resume == NONE else _go_on(output, settings)
    except OSError as error:
        raise not_writable(output, error) from error


def _go_on(output: Path, settings: dict[str, Any]) -> Start:
    """Resumes the run in the folder if it has a checkpoint."""
    if (output / METRICS).is_file():
        return _keep(output, AUTO, "it is finished")
    if (found := last_good(output / "checkpoints")) is None:
        return _keep(output, AUTO, "it has no checkpoint")
    if changes := changed_settings(output, settings):
        raise UserError(
            f"output {output}: its run was stopped and had different settings ({preview(changes, 9, '; ')}); repeat "
            f"them, or resume with the new ones by --resume {found[0]}, or start fresh by --resume none, which keeps "
            "the folder"
        )
    return _start(output, *found)


def _anew(output: Path, settings: dict[str, Any]) -> Start:
    """Starts a fresh run, or resumes the one in the folder if this same command started it."""
    checkpoints = output / "checkpoints"
    same = not (output / METRICS).is_file() and has_begun(checkpoints, NONE) and not changed_settings(output, settings)
    if not same:
        return _keep(output, NONE, "asked for")
    print(f"--resume {NONE} already started this run; to start another one, rename {output} first", flush=True)
    return _start(output, *last_good(checkpoints))


def _keep(output: Path, begun: str, why: str) -> Start:
    """Renames the folder and starts fresh."""
    kept, here = free_name(output), Path.cwd()
    if output.resolve() in (here, *here.parents):
        raise UserError(
            f"output {output}: its run would be renamed to {kept} ({why}), and the current folder with it; run the "
            "command from elsewhere, or choose another output"
        )
    try:
        output.rename(kept)
    except OSError as error:
        raise UserError(
            f"output {output}: its run cannot be renamed to {kept} ({why}; {error.strerror}); choose another output"
        ) from error
    print(f"The earlier run in {output} is kept as {kept} ({why}); a new one starts", flush=True)
    return Start(begun=begun)


def _from_checkpoint(output: Path, checkpoint: Path, settings: dict[str, Any]) -> Start:
    """Resumes from a named checkpoint, or continues the branch that this same command started there."""
    checkpoints = output / "checkpoints"
    ours = checkpoint.resolve().parent == checkpoints.resolve() and (output / "config.yaml").is_file()
    changes = changed_settings(output, settings) if ours else []
    if ours and not changes and has_begun(checkpoints, checkpoint.name):
        if checkpoint.name != LAST:
            print(
                f"--resume {checkpoint} already started this branch; to start from there again, move {LAST} and "
                f"{PREVIOUS} away first",
                flush=True,
            )
        return _start(output, *last_good(checkpoints))
    try:
        content = read_checkpoint(checkpoint)
    except UserError as error:
        raise UserError(
            f"resume {checkpoint}: {error}; --resume auto finds the last good one, none starts fresh"
        ) from error
    if not ours:
        raise UserError(f"resume {checkpoint}: not in {checkpoints}; set output to the folder of its run")
    done, most = epochs_done(content), settings["trainer"].get("max_epochs")
    if most is not None and 0 <= most < done:
        raise UserError(f"trainer.max_epochs={most}: {checkpoint} is already at {done} epochs; set it to more")
    identity(output, checkpoint, content)  # before anything is moved
    if changes:
        print(f"Changed settings: {preview(changes, 9, '; ')}", flush=True)
    if left := later(checkpoints, checkpoint.name, content):
        set_aside(left, checkpoints / ASIDE)
        print(f"Checkpoints after {checkpoint.name} are moved to {checkpoints / ASIDE}", flush=True)
    return _start(output, checkpoint, content, checkpoint.name)


def _start(output: Path, checkpoint: Path, content: dict[str, Any], begun: str | None = None) -> Start:
    run = identity(output, checkpoint, content)
    _sweep(output)
    last = checkpoint.with_name(LAST)
    if checkpoint.name != LAST and last.exists():
        # The next save would rename it to previous.ckpt, which may be the checkpoint resumed from.
        os.replace(last, last.with_name(f"{LAST}.damaged"))
    (output / METRICS).unlink(missing_ok=True)  # the run is no longer finished
    where = f"step {content['global_step']}, epoch {epochs_done(content) + 1}" if content else "its last step"
    print(f"Going on with the run in {output} from {where} ({checkpoint.name})", flush=True)
    return Start(str(checkpoint), begun, dict(content.get("VideoDataModule", {})), run)


def identity(output: Path, checkpoint: Path, content: dict[str, Any]) -> str | None:
    """Returns the identity of a resumed run, from config.yaml or the checkpoint; None if neither has one.

    Raises:
        UserError: If the checkpoint belongs to another run.
    """
    with open(output / "config.yaml", encoding="utf-8", errors="replace") as file:
        found = IDENTITY.match(file.readline())
    known, its_own = found and found[1], content.get("callbacks", {}).get("Safeguard", {}).get("run")
    if known and its_own and known != its_own:
        raise UserError(
            f"{checkpoint}: belongs to another run than {output / 'config.yaml'}; restore the run's own, or start "
            f"fresh by --resume {NONE}, which keeps the folder"
        )
    return known or its_own


def settings_hash(settings: dict[str, Any]) -> str:
    """Hashes the settings that determine a training: the identity of a run."""
    return hashlib.sha256(json.dumps(list(_leaves(settings)), sort_keys=True, default=str).encode()).hexdigest()[:32]


def identified(run: str, settings: str) -> str:
    """Returns the text of config.yaml: a run's identity and settings."""
    return f"# Run {run}\n{settings}"


def epochs_done(content: dict[str, Any]) -> int:
    """Returns the number of finished epochs of a checkpoint; 0 if unknown."""
    return content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] if content else 0


def _sweep(output: Path) -> None:
    """Removes temporary files left by a killed process."""
    for unfinished in (*output.glob(f"*{UNFINISHED}"), *(output / "checkpoints").glob(f"*{UNFINISHED}")):
        unfinished.unlink()


def had_just_begun(output: Path) -> bool:
    """Returns whether the run in a folder has no checkpoint and no result yet."""
    return not (output / METRICS).is_file() and not any((output / "checkpoints").glob("*.ckpt"))


def last_good(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Returns the last intact checkpoint of a run and its content; None if there is none. Prints damaged ones.

    Raises:
        UserError: If there are checkpoints, but all are damaged.
    """
    found, damaged = _last_whole(folder, (LAST, PREVIOUS, BEST))
    if damaged and found is None:
        raise UserError(f"{'; '.join(damaged)}: there is no other; --resume none starts fresh and keeps the folder")
    for line in damaged:
        print(f"{line}: resuming from the one before", flush=True)
    return found


def _last_whole(folder: Path, names: tuple[str, ...]) -> tuple[tuple[Path, dict[str, Any]] | None, list[str]]:
    """Returns the first intact checkpoint among some names, and a description of each damaged one before it."""
    damaged = []
    for path in (folder / name for name in names):
        if not path.exists():
            continue
        try:
            return (path, read_checkpoint(path)), damaged
        except UserError as error:
            damaged.append(f"{path} {error}")
    return None, damaged


def has_begun(folder: Path, resume: str) -> bool:
    """Returns whether the run of a checkpoints' folder, or its current branch, started with this `resume`."""
    found, _ = _last_whole(folder, (LAST, PREVIOUS))
    return found is not None and found[1].get("callbacks", {}).get("Safeguard", {}).get("begun") == resume


def later(folder: Path, name: str, content: dict[str, Any]) -> list[Path]:
    """Returns the run's checkpoints that are later than the named one, with their exports, last.ckpt at the end.

    last.ckpt and previous.ckpt are included when that is unknown; nothing is later than last.ckpt.
    """
    found, step = [], content.get("global_step")
    for other in () if name == LAST else (BEST, PREVIOUS, LAST):
        path = folder / other
        if other == name or not path.exists():
            continue
        try:
            reached = read_checkpoint(path).get("global_step")
        except UserError:
            reached = None
        known = step is not None and reached is not None
        if reached > step if known else other != BEST:
            found += [each for each in (path.with_suffix(""), path) if each.exists()]
    return found


def set_aside(paths: list[Path], folder: Path) -> None:
    """Replaces a folder's content by these files, moved there."""
    beside = folder.with_name(f"{folder.name}.new")
    beside.mkdir(exist_ok=True)
    for path in paths:
        os.replace(path, beside / path.name)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def changed_settings(output: Path, settings: dict[str, Any]) -> list[str]:
    """Lists settings that differ from the ones the run was started with and that change the training."""
    before = read_mapping(output / "config.yaml")
    found = []
    for section, key, value in _leaves(settings):
        had = (before.get(section) or {}).get(key, value) if section else before.get(key, value)
        if had != value:
            found.append(f"{section}{'.' * bool(section)}{key} {had!s:.60}, now {value!s:.60}")
    return found


def _leaves(settings: dict[str, Any]):
    yield "", "seed_everything", settings.get("seed_everything")
    harmless = HARMLESS["data"] - ({"num_workers"} if settings["data"].get("streaming") else set())
    for section, kept in (("model", HARMLESS["model"]), ("data", harmless)):
        for key, value in settings[section].items():
            if key not in kept:
                yield section, key, value
    for key in sorted(OF_THE_TRAINER & settings["trainer"].keys()):
        yield "trainer", key, settings["trainer"][key]


def agreed(trainer: L.Trainer, module: L.LightningModule, start: Start | None) -> Start:
    """Broadcasts rank 0's decision to all ranks; the folder may change before the others read it.

    Launches and connects the processes that Lightning has to launch; Lightning does so again afterwards.
    """
    launcher = trainer.strategy.launcher
    if trainer.world_size == 1 or isinstance(launcher, _MultiProcessingLauncher):
        return start  # only one process so far

    def tell() -> Start:
        trainer.strategy.connect(module)  # FSDP2 sets the module's device mesh
        trainer.strategy.setup_environment()
        return trainer.strategy.broadcast(start)

    return tell() if launcher is None else launcher.launch(tell, trainer=trainer)


def check_writable(output: Path) -> None:
    """Creates a folder if needed and checks that it is writable.

    Raises:
        UserError: If it is not.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f"writable{UNFINISHED}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise not_writable(output, error) from error


def free_name(path: Path) -> Path:
    """Returns the first of `<path>`, `<path>.1`, `<path>.2`, ... that does not exist."""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


# Checkpoint contents for an exact resume


def settle_progress(checkpoint: dict[str, Any], validating: bool) -> None:
    """Adjusts Lightning's counters in a checkpoint so that a resumed run starts with exactly the next batch.

    Lightning infers from them where a checkpoint was written and sometimes gets it wrong: it would skip a validation,
    or log a step under a wrong number. This sets counters that it understands for each of the three cases: between two
    epochs (as at the start of the next), within a validation (which restarts), and between two batches (as after a
    batch whose validation is over).

    Args:
        checkpoint: The checkpoint that Lightning is about to write.
        validating: Whether a validation is in progress.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    current, total = batches["current"], batches["total"]
    if epochs["current"]["started"] == epochs["current"]["processed"] or not current["processed"]:
        for counts in (epochs["current"], epochs["total"], total):
            counts.update(dict.fromkeys(counts, counts["processed"]))
        current.update(dict.fromkeys(current, 0))
        batches["is_last_batch"] = False
    elif validating:
        evaluated = loops["epoch_loop.val_loop.batch_progress"]
        for counts in (evaluated["current"], evaluated["total"]):
            counts.update(ready=1, started=1, processed=0, completed=0)
    elif current["completed"] == current["processed"]:
        for counts in (current, total):
            counts.update(ready=counts["processed"], started=counts["processed"], completed=counts["processed"] - 1)
        batches["is_last_batch"] = False
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def settle_loops(trainer: L.Trainer) -> None:
    """Starts an epoch normally if it was not started before; with `max_steps`, resuming would count an extra step."""
    epochs = trainer.fit_loop.epoch_progress.current
    if epochs.started == epochs.processed:
        trainer.fit_loop.epoch_loop.restarting = False


def random_states() -> dict[str, Any]:
    """Returns the states of this rank's random generators as plain numbers."""
    kind, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest)}
    states["torch"] = torch.get_rng_state().tolist()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state().tolist()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Restores the states returned by `random_states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))
