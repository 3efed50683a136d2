"""How a run begins: anew, or from the last checkpoint of its folder; and what a checkpoint needs for that.

The same command typed again goes on where it was stopped, whatever its `resume`: a checkpoint holds the one that its
run, or branch of it, was begun with. A checkpoint is written between two batches; it holds where
in the epoch that was (VideoDataModule.state_dict), Lightning's counters as they have to be for the next batch to follow
(`settle_progress`), and the states of all random generators.
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

from ..errors import UserError
from ..safe_yaml import read_mapping
from ..util import preview
from .checkpointing import BEST, LAST, PREVIOUS, UNFINISHED, read_checkpoint
from .run_lock import INSIDE, not_writable

IDENTITY = re.compile(r"# Run (\w+)$", re.MULTILINE)
METRICS = "metrics.json"  # written last: it tells that a run is finished
AUTO, NONE = "auto", "none"
ASIDE = "aside"  # in the checkpoints' folder: those of the branch that was left last

# Settings without which the training would be the same; of the trainer, those that make it another one.
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
    """How a run begins.

    Attributes:
        checkpoint: What it goes on from; None begins anew.
        begun: The `resume` that the run, or its present branch, begins with: "auto", "none" or a file's name. Its
            checkpoints hold it, and so the same command typed again goes on. None is what the checkpoint says.
        data: State of the data module in it.
        run: The run's identity, which config.yaml and each of its checkpoints have: a hash of the settings that it was
            first started with, whatever later ones changed.
    """

    checkpoint: str | None = None
    begun: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    run: str | None = field(default=None, compare=False)


def begin(output: Path, resume: str, settings: dict[str, Any]) -> Start:
    """Decides how a run begins, says so, and makes its folder ready. For the first process alone.

    Args:
        output: The run's folder.
        resume: "auto", "none", or a checkpoint of the folder.
        settings: All settings of the run.

    Raises:
        UserError: If the folder cannot be used, or the run in it cannot or should not be gone on with.
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
            print(f"The run in {output} was stopped before its first checkpoint; it begins again", flush=True)
            return Start(begun=resume)
        return _anew(output, settings) if resume == NONE else _go_on(output, settings)
    except OSError as error:
        raise not_writable(output, error) from error


def _go_on(output: Path, settings: dict[str, Any]) -> Start:
    """With the run in the folder, if there is something to go on with."""
    if (output / METRICS).is_file():
        return _keep(output, AUTO, "it is finished")
    if (found := last_good(output / "checkpoints")) is None:
        return _keep(output, AUTO, "it has no checkpoint")
    if changes := changed_settings(output, settings):
        raise UserError(
            f"output {output}: its run was stopped, and had other settings ({preview(changes, 9, '; ')}); type them "
            f"again, or go on with the new ones by --resume {found[0]}, or begin anew by --resume none, which keeps "
            "the folder"
        )
    return _start(output, *found)


def _anew(output: Path, settings: dict[str, Any]) -> Start:
    """Without the run in the folder, unless this command has begun it."""
    checkpoints = output / "checkpoints"
    same = not (output / METRICS).is_file() and has_begun(checkpoints, NONE) and not changed_settings(output, settings)
    if not same:
        return _keep(output, NONE, "asked for")
    print(f"--resume {NONE} has begun this run already; to begin once more, rename {output} first", flush=True)
    return _start(output, *last_good(checkpoints))


def _keep(output: Path, begun: str, why: str) -> Start:
    """Renames the folder."""
    kept, here = free_name(output), Path.cwd()
    if output.resolve() in (here, *here.parents):
        raise UserError(
            f"output {output}: its run would be kept as {kept} ({why}), and the current folder with it; call from "
            "elsewhere, or choose another output"
        )
    try:
        output.rename(kept)
    except OSError as error:
        raise UserError(
            f"output {output}: its run cannot be kept as {kept} ({why}, and {error.strerror}); choose another output"
        ) from error
    print(f"The earlier run in {output} is kept as {kept} ({why}); a new one begins", flush=True)
    return Start(begun=begun)


def _from_checkpoint(output: Path, checkpoint: Path, settings: dict[str, Any]) -> Start:
    """From a checkpoint that was named, or with the branch that this command has begun there."""
    checkpoints = output / "checkpoints"
    ours = checkpoint.resolve().parent == checkpoints.resolve() and (output / "config.yaml").is_file()
    changes = changed_settings(output, settings) if ours else []
    if ours and not changes and has_begun(checkpoints, checkpoint.name):
        if checkpoint.name != LAST:
            print(
                f"--resume {checkpoint} has begun this branch already; to begin from there once more, move {LAST} and "
                f"{PREVIOUS} away first",
                flush=True,
            )
        return _start(output, *last_good(checkpoints))
    try:
        content = read_checkpoint(checkpoint)
    except UserError as error:
        raise UserError(
            f"resume {checkpoint}: {error}; --resume auto finds the last good one, none begins anew"
        ) from error
    if not ours:
        raise UserError(f"resume {checkpoint}: not in {checkpoints}; set output to the folder of its run")
    done, most = epochs_done(content), settings["trainer"].get("max_epochs")
    if most is not None and 0 <= most < done:
        raise UserError(f"trainer.max_epochs={most}: {checkpoint} has had {done} epochs; set it to more")
    identity(output, checkpoint, content)  # before anything is moved
    if changes:
        print(f"With other settings than before: {preview(changes, 9, '; ')}", flush=True)
    if left := later(checkpoints, checkpoint.name, content):
        set_aside(left, checkpoints / ASIDE)
        print(f"What came after {checkpoint.name} is moved to {checkpoints / ASIDE}", flush=True)
    return _start(output, checkpoint, content, checkpoint.name)


def _start(output: Path, checkpoint: Path, content: dict[str, Any], begun: str | None = None) -> Start:
    run = identity(output, checkpoint, content)
    _sweep(output)
    last = checkpoint.with_name(LAST)
    if checkpoint.name != LAST and last.exists():
        # The next one would make it previous.ckpt, which may be the one that is gone on from.
        os.replace(last, last.with_name(f"{LAST}.damaged"))
    (output / METRICS).unlink(missing_ok=True)  # the run is not finished any more
    where = f"step {content['global_step']}, epoch {epochs_done(content) + 1}" if content else "its last step"
    print(f"Going on with the run in {output} from {where} ({checkpoint.name})", flush=True)
    return Start(str(checkpoint), begun, dict(content.get("VideoDataModule", {})), run)


def identity(output: Path, checkpoint: Path, content: dict[str, Any]) -> str | None:
    """The identity of a run that goes on from a checkpoint. Where one of the two has none, the other's counts;
    None where neither has.

    Raises:
        UserError: If the checkpoint is another run's.
    """
    with open(output / "config.yaml", encoding="utf-8", errors="replace") as file:
        found = IDENTITY.match(file.readline())
    known, its_own = found and found[1], content.get("callbacks", {}).get("Safeguard", {}).get("run")
    if known and its_own and known != its_own:
        raise UserError(
            f"{checkpoint}: is of another run than {output / 'config.yaml'}; put the run's own there, or begin anew by "
            f"--resume {NONE}, which keeps the folder"
        )
    return known or its_own


def settings_hash(settings: dict[str, Any]) -> str:
    """A hash of the settings that make a training what it is: the identity of a run that they start."""
    return hashlib.sha256(json.dumps(list(_leaves(settings)), sort_keys=True, default=str).encode()).hexdigest()[:32]


def identified(run: str, settings: str) -> str:
    """The text of config.yaml: a run's settings, and its identity above them."""
    return f"# Run {run}\n{settings}"


def epochs_done(content: dict[str, Any]) -> int:
    """How many epochs a checkpoint has behind it; 0 where it does not tell."""
    return content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] if content else 0


def _sweep(output: Path) -> None:
    """Removes what a kill has left half-written."""
    for unfinished in (*output.glob(f"*{UNFINISHED}"), *(output / "checkpoints").glob(f"*{UNFINISHED}")):
        unfinished.unlink()


def had_just_begun(output: Path) -> bool:
    """Whether the run in a folder has left nothing that could be gone on from, or kept."""
    return not (output / METRICS).is_file() and not any((output / "checkpoints").glob("*.ckpt"))


def last_good(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The last whole checkpoint of a run and its content, None if there is none; damaged ones are told.

    Raises:
        UserError: If there are checkpoints, but none is whole.
    """
    found, damaged = _last_whole(folder, (LAST, PREVIOUS, BEST))
    if damaged and found is None:
        raise UserError(f"{'; '.join(damaged)}: there is no other; --resume none begins anew and keeps the folder")
    for line in damaged:
        print(f"{line}: going on from the one before", flush=True)
    return found


def _last_whole(folder: Path, names: tuple[str, ...]) -> tuple[tuple[Path, dict[str, Any]] | None, list[str]]:
    """The first whole checkpoint of some, and what is wrong with those before it."""
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
    """Whether the run in whose checkpoints' folder this is, or its present branch, was begun by that `resume`."""
    found, _ = _last_whole(folder, (LAST, PREVIOUS))
    return found is not None and found[1].get("callbacks", {}).get("Safeguard", {}).get("begun") == resume


def later(folder: Path, name: str, content: dict[str, Any]) -> list[Path]:
    """A run's own checkpoints that came after one of them, with their exports, the last one last.

    last.ckpt and previous.ckpt are among them where that cannot be told; nothing comes after last.ckpt.
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
    """Moves files to a folder, in the place of all that is in it."""
    beside = folder.with_name(f"{folder.name}.new")
    beside.mkdir(exist_ok=True)
    for path in paths:
        os.replace(path, beside / path.name)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def changed_settings(output: Path, settings: dict[str, Any]) -> list[str]:
    """What of a run's settings was otherwise when it was started, as far as it makes another training of it."""
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
    """The first process's decision, on all processes: the others may look at the folder when it has changed.

    Processes that Lightning is to launch are launched here, and connected; Lightning does it again for what follows.
    """
    launcher = trainer.strategy.launcher
    if trainer.world_size == 1 or isinstance(launcher, _MultiProcessingLauncher):
        return start  # there is one process so far

    def tell() -> Start:
        trainer.strategy.connect(module)  # FSDP2 gives it the mesh of devices
        trainer.strategy.setup_environment()
        return trainer.strategy.broadcast(start)

    return tell() if launcher is None else launcher.launch(tell, trainer=trainer)


def check_writable(output: Path) -> None:
    """Makes a folder if it is not there.

    Raises:
        UserError: If that cannot be done, or nothing can be written to it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f"writable{UNFINISHED}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise not_writable(output, error) from error


def free_name(path: Path) -> Path:
    """The path, or the first of `<path>.1`, `<path>.2`, ... that is not there yet."""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


# What a checkpoint holds for it


def settle_progress(checkpoint: dict[str, Any], validating: bool) -> None:
    """Makes Lightning's counters in a checkpoint such that exactly the next batch follows.

    Lightning guesses from them where a checkpoint was written, and takes some places for others: a validation would
    be left out, a step logged under another's number. There are three places, and for each the counters that it does
    understand: between two epochs (as at the start of the next), within a validation (which is done again from its
    start), and between two batches (as its own at the end of a batch, where validation is over).

    Args:
        checkpoint: As Lightning is about to write it.
        validating: Whether a validation of the training is under way.
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
    """Lets an epoch begin that was not begun before: with `max_steps`, Lightning would count a step for going on."""
    epochs = trainer.fit_loop.epoch_progress.current
    if epochs.started == epochs.processed:
        trainer.fit_loop.epoch_loop.restarting = False


def random_states() -> dict[str, Any]:
    """The states of this process's random generators, as plain numbers."""
    kind, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest)}
    states["torch"] = torch.get_rng_state().tolist()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state().tolist()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Sets the states that `random_states` gave."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))
