"""How a run begins: anew, or from the last checkpoint of its folder; and what a checkpoint needs for that.

`resume: auto` goes on where the same command was stopped. A checkpoint is written between two batches; it holds where
in the epoch that was (VideoDataModule.state_dict), Lightning's counters as they have to be for the next batch to follow
(`settle_progress`), and the states of all random generators.
"""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from ..errors import UserError
from .checkpointing import BEST, LAST, PREVIOUS, UNFINISHED, read_checkpoint

METRICS = "metrics.json"  # written last: it tells that a run is finished

# Settings without which the training would be the same; of the trainer, those that make it another one.
HARMLESS = {
    "model": {"gradient_checkpointing"},
    "data": {
        *("root", "num_workers", "verify_counts", "max_bad_fraction", "clip_time_limit", "test_clips", "test_crops"),
        *("feature_cache", "feature_cache_limit"),
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
        data: State of the data module in it.
    """

    checkpoint: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


def begin(output: Path, resume: str | bool | None, settings: dict[str, Any]) -> Start:
    """Decides how a run begins, says so, and makes its folder ready. For the first process alone.

    Args:
        output: The run's folder.
        resume: "auto" (or True), "none" (or False, None), or a checkpoint of the folder.
        settings: All settings of the run.

    Raises:
        UserError: If the folder cannot be used, or the run in it cannot or should not be gone on with.
    """
    if resume not in ("auto", "none", True, False, None):
        return _go_on(output, Path(resume), settings)
    check_writable(output)
    if not any(path.suffix != UNFINISHED for path in output.iterdir()):
        print(f"A new run: {output}", flush=True)
        return Start()
    if not (output / "config.yaml").is_file():
        raise UserError(f"output {output}: exists and is not a run's folder; choose another one")
    found, why = None, "asked for"
    if resume in ("auto", True):
        if (output / METRICS).is_file():
            why = "it is finished"
        else:
            found, why = last_good(output / "checkpoints"), "it has no checkpoint"
    if found is None:
        kept = free_name(output)
        output.rename(kept)
        print(f"The earlier run in {output} is kept as {kept} ({why}); a new one begins", flush=True)
        return Start()
    changes = changed_settings(output, settings)
    if changes:
        raise UserError(
            f"output {output}: its run was stopped, and had other settings ({'; '.join(changes)}); type them again, "
            f"or go on with the new ones by --resume {found[0]}, or begin anew by --resume none, which keeps the folder"
        )
    return _start(output, *found)


def _go_on(output: Path, checkpoint: Path, settings: dict[str, Any]) -> Start:
    """From a checkpoint that was named."""
    try:
        content = read_checkpoint(checkpoint)
    except UserError as error:
        raise UserError(f"resume {checkpoint}: {error}; --resume auto finds the last good one") from error
    if checkpoint.resolve().parent != (output / "checkpoints").resolve():
        raise UserError(f"resume {checkpoint}: not in {output / 'checkpoints'}; set output to the folder of its run")
    changes = changed_settings(output, settings)
    if changes:
        print(f"With other settings than before: {'; '.join(changes)}", flush=True)
    return _start(output, checkpoint, content)


def _start(output: Path, checkpoint: Path, content: dict[str, Any]) -> Start:
    for unfinished in checkpoint.parent.glob(f"*{UNFINISHED}"):
        unfinished.unlink()
    last = checkpoint.with_name(LAST)
    if checkpoint.name != LAST and last.exists():
        # Damaged or unwanted: the next one would make it previous.ckpt, which may be the one that is gone on from.
        os.replace(last, last.with_name(f"{LAST}.aside"))
    (output / METRICS).unlink(missing_ok=True)  # the run is not finished any more
    epochs = content.get("loops", {}).get("fit_loop", {}).get("epoch_progress")
    where = f"step {content['global_step']}, epoch {epochs['current']['processed'] + 1}" if content else "its last step"
    print(f"Going on with the run in {output} from {where} ({checkpoint.name})", flush=True)
    return Start(str(checkpoint), dict(content.get("VideoDataModule", {})))


def last_good(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The last whole checkpoint of a run and its content, None if there is none; damaged ones are told.

    Raises:
        UserError: If there are checkpoints, but none is whole.
    """
    damaged = []
    for path in (folder / name for name in (LAST, PREVIOUS, BEST)):
        if not path.exists():
            continue
        try:
            content = read_checkpoint(path)
        except UserError as error:
            damaged.append(f"{path} {error}")
            continue
        for line in damaged:
            print(f"{line}: going on from the one before", flush=True)
        return path, content
    if damaged:
        raise UserError(f"{'; '.join(damaged)}: there is no other; --resume none begins anew and keeps the folder")
    return None


def changed_settings(output: Path, settings: dict[str, Any]) -> list[str]:
    """What of a run's settings was otherwise when it was started, as far as it makes another training of it."""
    try:
        before = yaml.safe_load((output / "config.yaml").read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{output / 'config.yaml'}: cannot be read ({type(error).__name__}); mend it") from error
    found = []
    for section, key, value in _leaves(settings):
        had = before.get(section, {}).get(key, value) if section else before.get(key, value)
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
        raise UserError(f"output {output}: cannot be written ({error.strerror}); choose another folder") from error


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


def gathered(value: Any) -> list[Any]:
    """The value of each process, by rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
