"""Callbacks: reports videos that cannot be decoded, and corrects the batch count of a resumed epoch."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only

from ...data.bad_videos import FILE_NAME, BadClip, BadClipLog, check_bad_clips, write_bad_clips
from ...distributed import gathered
from ...errors import printable


class BadClipReport(L.Callback):
    """Counts videos that cannot be decoded, lists them in the run's folder, and stops a run with too many.

    Each rank records the bad videos of its own loaders. Every `interval` steps and at the end of each epoch the ranks
    merge their records and make the same decision at the same step, so that none raises or waits alone.

    Args:
        folder: Folder of the list; None writes no list.
        interval: Training steps between two checks.
    """

    def __init__(self, folder: str | Path | None = None, interval: int = 50):
        self.folder = folder
        self.interval = interval
        self.account = BadClipLog()
        self._before = BadClipLog()  # from before a resume: reported, but cannot stop the run again once repaired
        self._unreadable = 0  # training examples without pixels
        self._printed: set[tuple[str, str]] = set()
        self._agreed: int | None = 0  # number of notes over all ranks after the last check

    def clips(self, id2label: dict[int, str], split: str | None = None) -> list[BadClip]:
        """Returns the bad videos of one split or both, sorted, including those found before a resume."""
        return self._all().clips(id2label, split)

    def state_dict(self) -> dict[str, Any]:
        return {"notes": self._all().notes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before.merge(state_dict["notes"])
        if len(self._before):
            self._agreed = None  # the list may not be written yet

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._note("train", batch)
        self._unreadable += batch.get("num_unreadable", 0)
        if (batch_idx + 1) % self.interval == 0:
            self._look(trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        self._look(trainer)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._note("val", batch)

    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_start(self, trainer, pl_module):
        # Report the final evaluation only: a video may have timed out in an earlier one.
        self._before.notes["val"].clear()
        if self.account.notes["val"]:  # the same on all ranks since the last validation
            self.account.notes["val"].clear()
            self._agreed = None

    def on_validation_epoch_end(self, trainer, pl_module):
        self._look(trainer)

    on_test_epoch_end = on_validation_epoch_end

    def _all(self) -> BadClipLog:
        both = BadClipLog()
        both.merge(self._before.notes)
        both.merge(self.account.notes)
        return both

    def _note(self, split: str, batch: dict[str, Any]) -> None:
        fate = "replaced by another clip" if split == "train" else "counts as wrong"
        # Other data modules provide no notes. Printed by the rank that found it: a hung file system may affect one
        # machine only.
        for name, _, cause in self.account.add(split, batch.get("bad_clips", ())):
            if (split, name) in self._printed:
                continue
            self._printed.add((split, name))
            print(printable(f"Bad clip ({split}, {fate}): {name}: {cause}"), flush=True)

    def _look(self, trainer: L.Trainer) -> None:
        """Merges the notes of all ranks, writes the list, and stops all ranks if there are too many."""
        counts = torch.tensor([len(self.account), self._unreadable])
        counts = trainer.strategy.reduce(counts.to(trainer.strategy.root_device), reduce_op="sum")
        total, unreadable = counts.tolist()
        if total == self._agreed and not unreadable:
            return
        for notes in gathered(self.account.notes):
            self.account.merge(notes)
        self._agreed = trainer.world_size * len(self.account)
        data = trainer.datamodule
        self._write(data.id2label)
        bad = self.account.clips(data.id2label, "train")
        check_bad_clips(bad, data.num_clips["train"], data.hparams.max_bad_fraction, unreadable)

    @rank_zero_only
    def _write(self, id2label: dict[int, str]) -> None:
        if self.folder is not None:
            write_bad_clips(self.clips(id2label), Path(self.folder) / FILE_NAME)


class EpochPlace(L.Callback):
    """Sets Lightning's batch count of a resumed epoch to the data module's; the batch size may have changed."""

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        place = checkpoint.get("VideoDataModule", {})
        if trainer.state.fn == "fit" and place.get("batches") and hasattr(trainer.datamodule, "batches_had"):
            counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
            more = trainer.datamodule.batches_had(place) - counts["processed"]
            counts.update({name: count + more for name, count in counts.items()})
