"""Records videos that cannot be decoded, with causes, and stops a run that meets too many."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..util import atomic_write, shorten
from .tables import DataError

FILE_NAME = "bad_clips.csv"


# Name, class index and cause.
Note = tuple[str, int, str]


@dataclass(frozen=True, order=True)
class BadClip:
    """One video that cannot be decoded.

    Attributes:
        split: `train` or `val`.
        name: Its name in the table.
        label: The name of its label.
        cause: Why it cannot be decoded.
    """

    split: str
    name: str
    label: str
    cause: str


@dataclass
class BadClipLog:
    """The bad videos found so far, each once.

    Attributes:
        notes: Class index and cause, by split and name.
    """

    notes: dict[str, dict[str, tuple[int, str]]] = field(default_factory=lambda: {"train": {}, "val": {}})

    def __len__(self) -> int:
        return sum(map(len, self.notes.values()))

    def add(self, split: str, met: Iterable[Note]) -> list[Note]:
        """Adds notes and returns the new ones."""
        known, new = self.notes[split], []
        for name, label, cause in met:
            if name not in known:
                known[name] = (label, cause)
                new.append((name, label, cause))
        return new

    def merge(self, other: dict[str, dict[str, tuple[int, str]]]) -> None:
        """Adds the notes of another rank."""
        for split, notes in other.items():
            self.add(split, ((name, *note) for name, note in notes.items()))

    def clips(self, id2label: dict[int, str], split: str | None = None) -> list[BadClip]:
        """Returns the bad videos of one split or both, sorted."""
        return sorted(
            BadClip(kind, name, id2label[label], cause)
            for kind, notes in self.notes.items()
            if split in (None, kind)
            for name, (label, cause) in notes.items()
        )


@dataclass(frozen=True)
class ClipCounts:
    """Counts of the videos of a split.

    Attributes:
        expected: Videos that the source lists.
        missing: Listed videos that are not on disk and were skipped.
        undecodable: Videos on disk that cannot be decoded; in evaluation they count as wrong.
    """

    expected: int
    missing: int = 0
    undecodable: int = 0

    def __str__(self) -> str:
        """Returns `160`, or `157 of 160 (2 missing, 1 undecodable)`."""
        return self.phrase("")

    def phrase(self, noun: str) -> str:
        """Returns the same with a noun: `160 clips`, or `157 of 160 clips (2 missing, 1 undecodable)`."""
        lost = {"missing": self.missing, "undecodable": self.undecodable}
        reasons = ", ".join(f"{count} {what}" for what, count in lost.items() if count)
        used = self.expected - self.missing - self.undecodable
        noun = f" {noun}" if noun else ""
        return f"{used} of {self.expected}{noun} ({reasons})" if reasons else f"{used}{noun}"


def write_bad_clips(clips: Iterable[BadClip], path: Path) -> None:
    """Writes the bad videos as CSV: split, name, label, cause."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("split", "name", "label", "cause"))
    writer.writerows((clip.split, clip.name, clip.label, clip.cause) for clip in clips)
    # File names may contain bytes that are not valid text.
    atomic_write(path, text.getvalue().encode("utf-8", "surrogateescape"))


def bad_clip_table(clips: list[BadClip], most: int = 20) -> str:
    """Returns the first bad videos as a text table."""
    table = Table(
        "split", "clip", "label", "cause", title=f"{len(clips)} bad clips" if len(clips) > 1 else "1 bad clip"
    )
    for clip in clips[:most]:
        # As Text, since file names may look like rich markup.
        table.add_row(*(Text(shorten(part)) for part in (clip.split, clip.name, clip.label, clip.cause)))
    if len(clips) > most:
        table.add_row("", f"and {len(clips) - most} more", "", "")
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    return text.getvalue().rstrip()


class TooManyBadClips(DataError):
    """Raised when too many training videos cannot be decoded.

    Attributes:
        clips: The bad videos of the training split.
    """

    def __init__(self, message: str, clips: list[BadClip]):
        super().__init__(message)
        self.clips = clips


def check_bad_clips(clips: list[BadClip], num_clips: int, max_fraction: float, num_unreadable: int = 0) -> None:
    """Checks whether training can continue.

    Args:
        clips: Bad videos of the training split.
        num_clips: Size of the training split.
        max_fraction: Fraction of it that may be bad.
        num_unreadable: Examples for which no other video of the class could be decoded either.

    Raises:
        TooManyBadClips: If it cannot.
    """
    if not clips:
        return
    first = f"(first: {shorten(clips[0].name)}: {clips[0].cause})"
    if len(clips) > max_fraction * num_clips:
        raise TooManyBadClips(
            f"{len(clips)} of {num_clips} training clips cannot be decoded, more than data.max_bad_fraction="
            f"{max_fraction:g} {first}; `vidprism data check` lists them all: fix or remove them, or raise the limit",
            clips,
        )
    if num_unreadable:
        raise TooManyBadClips(
            f"{num_unreadable} training examples have no clip of their class that decodes {first}; fix or remove them",
            clips,
        )
