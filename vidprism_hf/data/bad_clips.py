"""Clips that cannot be decoded: which they are, why, and when there are too many of them."""

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


# What is known of a bad clip where it is met: its name, its class index and the cause.
Note = tuple[str, int, str]


@dataclass(frozen=True, order=True)
class BadClip:
    """One clip that cannot be decoded.

    Attributes:
        split: `train` or `val`.
        name: What its table calls it.
        label: Its label's name.
        cause: Why it cannot be decoded.
    """

    split: str
    name: str
    label: str
    cause: str


@dataclass
class BadClipLog:
    """The bad clips met so far, each once.

    Attributes:
        notes: By split and name, the class index and the cause.
    """

    notes: dict[str, dict[str, tuple[int, str]]] = field(default_factory=lambda: {"train": {}, "val": {}})

    def __len__(self) -> int:
        return sum(map(len, self.notes.values()))

    def add(self, split: str, met: Iterable[Note]) -> list[Note]:
        """Takes notes and returns those that are new."""
        known, new = self.notes[split], []
        for name, label, cause in met:
            if name not in known:
                known[name] = (label, cause)
                new.append((name, label, cause))
        return new

    def merge(self, other: dict[str, dict[str, tuple[int, str]]]) -> None:
        """Adds the notes of another process."""
        for split, notes in other.items():
            self.add(split, ((name, *note) for name, note in notes.items()))

    def clips(self, id2label: dict[int, str], split: str | None = None) -> list[BadClip]:
        """The bad clips of one split or both, sorted."""
        return sorted(
            BadClip(kind, name, id2label[label], cause)
            for kind, notes in self.notes.items()
            if split in (None, kind)
            for name, (label, cause) in notes.items()
        )


@dataclass(frozen=True)
class ClipCounts:
    """What became of the clips of a split.

    Attributes:
        expected: Clips that the source lists.
        missing: Of these, clips that are not on disk, and were left out.
        undecodable: Of the others, clips that cannot be decoded; in evaluation they count as wrong.
    """

    expected: int
    missing: int = 0
    undecodable: int = 0

    def __str__(self) -> str:
        """`160`, or `157 of 160 (2 missing, 1 undecodable)`."""
        return self.phrase("")

    def phrase(self, noun: str) -> str:
        """The same with a noun: `160 clips`, or `157 of 160 clips (2 missing, 1 undecodable)`."""
        lost = {"missing": self.missing, "undecodable": self.undecodable}
        reasons = ", ".join(f"{count} {what}" for what, count in lost.items() if count)
        used = self.expected - self.missing - self.undecodable
        noun = f" {noun}" if noun else ""
        return f"{used} of {self.expected}{noun} ({reasons})" if reasons else f"{used}{noun}"


def write_bad_clips(clips: Iterable[BadClip], path: Path) -> None:
    """Writes the list as CSV: split, name, label, cause."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("split", "name", "label", "cause"))
    writer.writerows((clip.split, clip.name, clip.label, clip.cause) for clip in clips)
    # File names may hold bytes that are no text.
    atomic_write(path, text.getvalue().encode("utf-8", "surrogateescape"))


def bad_clip_table(clips: list[BadClip], most: int = 20) -> str:
    """The first bad clips as a text table."""
    table = Table(
        "split", "clip", "label", "cause", title=f"{len(clips)} bad clips" if len(clips) > 1 else "1 bad clip"
    )
    for clip in clips[:most]:
        # As Text: file names may look like rich's markup.
        table.add_row(*(Text(shorten(part)) for part in (clip.split, clip.name, clip.label, clip.cause)))
    if len(clips) > most:
        table.add_row("", f"and {len(clips) - most} more", "", "")
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    return text.getvalue().rstrip()


class TooManyBadClips(DataError):
    """A run that stops since too many of its training clips cannot be decoded.

    Attributes:
        clips: The bad clips of the training split.
    """

    def __init__(self, message: str, clips: list[BadClip]):
        super().__init__(message)
        self.clips = clips


def check_bad_clips(clips: list[BadClip], num_clips: int, max_fraction: float, num_unreadable: int = 0) -> None:
    """Looks whether training can go on.

    Args:
        clips: Bad clips of the training split.
        num_clips: Clips of the training split.
        max_fraction: Share of them that may be bad.
        num_unreadable: Examples for which no other clip of the class could be decoded either.

    Raises:
        TooManyBadClips: If it cannot.
    """
    if not clips:
        return
    first = f"(first: {shorten(clips[0].name)}: {clips[0].cause})"
    if len(clips) > max_fraction * num_clips:
        raise TooManyBadClips(
            f"{len(clips)} of {num_clips} training clips cannot be decoded, more than data.max_bad_fraction="
            f"{max_fraction:g} {first}; `vidprism data check` finds them all: mend or remove them, or allow more",
            clips,
        )
    if num_unreadable:
        raise TooManyBadClips(
            f"{num_unreadable} training examples have no clip of their class that decodes {first}; mend or remove them",
            clips,
        )
