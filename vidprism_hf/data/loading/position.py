"""Resumes in the middle of an epoch, also with another number of ranks or another batch size.

An epoch is one order of the table's videos, and each rank takes every `world_size`-th. So after some batches the ranks
together have used a prefix of that order, whatever their number and the batch size, and a run that divides the epoch
differently resumes at the same video if one of its own batches starts there. The order of a stream also depends on
ranks and workers, and every order on the seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ...util import preview
from ..sources.splits import clip_list_hash
from ..tables import ClipSplits, DataError

IN_WORDS = {"processes": "processes", "batch_size": "data.batch_size", "seed": "data.seed"}
IN_WORDS["num_workers"] = "data.num_workers"


def fingerprint(splits: Any) -> dict[str, Any]:
    """Returns what identifies a run's training videos: labels, count and a hash of their names.

    Args:
        splits: `ClipSplits`, or the streams of a Hub dataset.
    """
    if isinstance(splits, ClipSplits):
        count, digest = len(splits.train), clip_list_hash(splits.train, in_order=True)
    else:
        count, digest = splits.num_train, splits.train_digest
    return {"labels": list(splits.id2label.values()), "num_clips": count, "clips": digest}


def check_same_clips(source: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks whether a run can resume with these videos.

    Args:
        source: The source's name, for the message.
        before: The fingerprint in the checkpoint.
        now: This run's fingerprint.

    Raises:
        DataError: If the labels or the training videos have changed.
    """
    if before["labels"] != now["labels"]:
        new, gone = (_names(one, other) for one, other in ((now, before), (before, now)))
        found = [f"{what}: {names}" for what, names in (("new", new), ("gone", gone)) if names]
        what = f"labels ({'; '.join(found) or 'in another order'})"
    elif before["clips"] != now["clips"]:
        counts = before["num_clips"], now["num_clips"]
        how = "the same number" if counts[0] == counts[1] else f"{counts[0]}, now {counts[1]}"
        what = f"training videos ({how})"
    else:
        return
    raise DataError(
        f"data.source {source}: the {what} have changed since the run stopped; restore them to resume, or start fresh "
        "with --resume none, which keeps the folder"
    )


def _names(labels: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """Previews the labels that the others lack."""
    return preview(sorted(set(labels["labels"]) - set(others["labels"])))


def go_on(
    batches: int, before: Mapping[str, int], now: Mapping[str, int], num_clips: int, harmless: Sequence[str]
) -> tuple[int, str, bool]:
    """Computes how many batches of the interrupted epoch to skip.

    Args:
        batches: Batches that each rank had finished.
        before: How the epoch was divided: `processes`, `batch_size` and whatever else its order depends on.
        now: How it is divided now, with the same keys.
        num_clips: Videos in the epoch.
        harmless: Keys that the order does not depend on.

    Returns:
        Batches to skip on each rank; a message, "" if nothing has changed; and whether every video of the epoch is
        still used exactly once.
    """
    changed = [name for name in now if before[name] != now[name]]
    if not batches or not changed:
        return batches, "", True
    had = min(batches * before["processes"] * before["batch_size"], num_clips)
    at_once = now["processes"] * now["batch_size"]
    batches = -(-had // at_once) if had == num_clips else had // at_once
    again = max(had - batches * at_once, 0)
    text = f"Resuming after {had} of the epoch's {num_clips} videos"
    if exact := set(changed) <= set(harmless) and not again:
        text += ", divided differently"
    elif set(changed) <= set(harmless):
        text = f"Resuming after {had - again} of the epoch's {num_clips} videos, so that {again} of them are repeated"
    else:
        text += ", but in another order: some are repeated and others skipped in this epoch"
    changes = ", ".join(f"{IN_WORDS[name]} {before[name]}, now {now[name]}" for name in changed)
    return batches, f"{text} ({changes})", exact
