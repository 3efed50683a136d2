"""Where in an epoch a run was stopped, and where one goes on that divides the epoch otherwise.

An epoch of a table is an order of its clips, of which each process gets every so many'th one: what all processes have
had after some batches is the beginning of that order, whatever the number of processes and the size of a batch. So a
run with others of these goes on at the same clip, if a batch of its own begins there. The order of a stream depends on
who reads it, and every order on the seed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..util import preview
from .few_shot import clip_list_hash
from .tables import ClipSplits, DataError

if TYPE_CHECKING:
    from .streaming import ClipStreams

IN_WORDS = {"processes": "processes", "batch_size": "data.batch_size", "seed": "data.seed"}
IN_WORDS["num_workers"] = "data.num_workers"


def fingerprint(splits: "ClipSplits | ClipStreams") -> dict[str, Any]:
    """What tells whether a run has the clips of another: their labels, their number, and a hash of their list."""
    if isinstance(splits, ClipSplits):
        count, digest = len(splits.train), clip_list_hash(splits.train, in_order=True)
    else:  # the commit and the split tell the rest
        classes = b"".join(part.tobytes() + b"." for part in splits.train.classes)
        count, digest = splits.num_train, hashlib.sha256(splits.description.encode() + classes).hexdigest()
    return {"labels": list(splits.id2label.values()), "num_clips": count, "clips": digest}


def check_same_clips(source: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Looks whether a run can go on with these clips.

    Args:
        source: Of the clips, for the message.
        before: The fingerprint in the checkpoint.
        now: That of this run.

    Raises:
        DataError: If labels or training clips are others; it says which, or how many.
    """
    if before["labels"] != now["labels"]:
        new, gone = (_names(one, other) for one, other in ((now, before), (before, now)))
        found = [f"{what}: {names}" for what, names in (("new", new), ("gone", gone)) if names]
        what = f"the labels ({'; '.join(found) or 'in another order'})"
    elif before["clips"] != now["clips"]:
        counts = before["num_clips"], now["num_clips"]
        how = "as many, but others" if counts[0] == counts[1] else f"{counts[0]}, now {counts[1]}"
        what = f"the training clips ({how})"
    else:
        return
    raise DataError(
        f"data.source {source}: {what} are not those of the stopped run; bring those back to go on with it, or begin "
        "anew by --resume none, which keeps the folder"
    )


def _names(labels: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """Labels that the others lack."""
    return preview(sorted(set(labels["labels"]) - set(others["labels"])))


def go_on(
    batches: int, before: Mapping[str, int], now: Mapping[str, int], num_clips: int, harmless: Sequence[str]
) -> tuple[int, str, bool]:
    """How many batches of an epoch a run leaves out that divides it otherwise than the one that was stopped.

    Args:
        batches: Batches that each process has had.
        before: How the epoch was divided: `processes`, `batch_size` and whatever else its order may depend on.
        now: How it is divided now, with the same keys.
        num_clips: Clips of the epoch.
        harmless: Those of the keys that the order does not depend on.

    Returns:
        Batches of each process; what is to be said of it, "" if nothing is divided otherwise; and whether no clip of
        the epoch comes again, and none is left out.
    """
    changed = [name for name in now if before[name] != now[name]]
    if not batches or not changed:
        return batches, "", True
    had = min(batches * before["processes"] * before["batch_size"], num_clips)
    at_once = now["processes"] * now["batch_size"]
    batches = -(-had // at_once) if had == num_clips else had // at_once
    again = max(had - batches * at_once, 0)
    text = f"Going on after {had} of the epoch's {num_clips} clips"
    if exact := set(changed) <= set(harmless) and not again:
        text += ", which it shares out otherwise"
    elif set(changed) <= set(harmless):
        text = f"Going on after {had - again} of the epoch's {num_clips} clips, so that {again} of them come again"
    else:
        text += ", but in another order: some of them come again, and others not in this epoch"
    changes = ", ".join(f"{IN_WORDS[name]} {before[name]}, now {now[name]}" for name in changed)
    return batches, f"{text} ({changes})", exact
