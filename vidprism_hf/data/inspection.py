"""A look at clips before a training: which of them decode, what they measure, and a picture of some.

Clips are read in processes of their own, which a clip may hang or crash: that process is ended, the clip is noted
with the cause, and the others go on.
"""

import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from .. import fonts
from ..errors import UserError, first_line
from ..model import VideoDecodeError, check_video
from ..util import atomic_path, preview
from ..workers import CONTEXT, start_server
from .dataset import ClipReader
from .tables import ClipTable, stable_hash

SHEET_FRAMES = 8
TILE_HEIGHT, LABEL_WIDTH, GAP = 112, 220, 2  # pixels of a contact sheet

Parts = Sequence[tuple[str, ClipTable]]  # tables with the name of the split that each belongs to


@dataclass(frozen=True)
class Outcome:
    """What became of one clip.

    Attributes:
        part: Which of the tables it is in.
        index: Its row there.
        result: What the reading function returned.
        cause: Why there is no result; None if there is one.
    """

    part: int
    index: int
    result: Any = None
    cause: str | None = None


@dataclass(frozen=True)
class ClipFigures:
    """What a clip measures.

    Attributes:
        num_frames: Frames that decode.
        fps: Frames per second, None where the file declares none.
        width: Pixels, upright.
        height: Pixels, upright.
        num_bytes: Size of the file, None of what is not a local file.
    """

    num_frames: int
    fps: float | None
    width: int
    height: int
    num_bytes: int | None


def clip_figures(video: str | bytes) -> ClipFigures:
    """Decodes a whole clip and measures it.

    Raises:
        VideoDecodeError: If it does not decode.
    """
    info = check_video(video)
    is_file = isinstance(video, str) and os.path.exists(video)
    num_bytes = len(video) if isinstance(video, bytes) else os.path.getsize(video) if is_file else None
    return ClipFigures(info.num_frames, info.fps, info.width, info.height, num_bytes)


def all_clips(parts: Parts) -> Iterator[tuple[int, int]]:
    """Every clip as (part, row), in order."""
    return ((part, index) for part, (_, table) in enumerate(parts) for index in range(len(table)))


def draw_clips(parts: Parts, count: int, seed: int) -> list[tuple[int, int]]:
    """At most `count` clips as (part, row), drawn at random, in the order of the draw."""
    ends = np.cumsum([len(table) for _, table in parts])
    order = np.random.default_rng(stable_hash("inspection", seed)).permutation(ends[-1])[:count]
    chosen = np.searchsorted(ends, order, side="right")
    return [(int(part), int(row - ends[part] + len(parts[part][1]))) for part, row in zip(chosen, order, strict=True)]


# --- processes that read clips


def read_clips(
    parts: Parts,
    clips: Iterable[tuple[int, int]],
    read: Callable[[str | bytes], Any],
    num_workers: int,
    time_limit: float | None = None,
) -> Iterator[Outcome]:
    """Reads clips in processes beside this one, and survives what they do to those.

    Args:
        parts: The tables.
        clips: Which clips to read, as (part, row).
        read: Called with each clip's path, URL or bytes; it and what it returns must pickle.
        num_workers: Processes.
        time_limit: Seconds that one clip may take; None is no limit.

    Yields:
        One outcome for each clip, in the order in which they are done.

    Raises:
        UserError: If the processes do not start.
    """
    start_server()
    waiting = iter(clips)
    limit = math.inf if time_limit is None else time_limit
    workers: list[_Worker] = []
    try:
        workers.extend(_Worker(parts, read) for _ in range(num_workers))
        while workers:
            patience = max(0.0, min(worker.deadline for worker in workers) - time.monotonic())
            wait([worker.connection for worker in workers], None if patience == math.inf else patience)
            for place in reversed(range(len(workers))):
                worker = workers[place]
                # Asked here, not above: an answer may come while this process is busy with another one's.
                answered = worker.connection.poll()
                if not answered and time.monotonic() < worker.deadline:
                    continue
                outcome = worker.outcome(answered, limit)
                if outcome is not None:
                    yield outcome
                if not worker.alive:
                    workers[place] = _Worker(parts, read)
                elif (clip := next(waiting, None)) is not None:
                    worker.give(clip, limit)
                else:
                    worker.end()
                    del workers[place]
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that reads clips one by one, until it is ended from here."""

    def __init__(self, parts: Parts, read: Callable[[str | bytes], Any]):
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(theirs, parts, read), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process shows here as the end of the connection
        self.clip: tuple[int, int] | None = None  # none until it says that it has started
        self.deadline = math.inf
        self.alive = True

    def give(self, clip: tuple[int, int], limit: float) -> None:
        """Hands over the next clip."""
        self.clip, self.deadline = clip, time.monotonic() + limit
        with suppress(OSError):  # a process that is gone shows when its answer is awaited
            self.connection.send(clip)

    def outcome(self, answered: bool, limit: float) -> Outcome | None:
        """What became of the clip; None if there was none yet. Ends a process that has not answered in time."""
        if not answered:
            self.end()
            return Outcome(*self.clip, cause=f"took longer than {limit:g} s")
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            self.end()
            how = signal.strsignal(-code) if code < 0 else f"exit status {code}"
            if self.clip is None:
                raise UserError(f"processes to read clips in do not start ({how}); free some memory") from None
            return Outcome(*self.clip, cause=f"crashed the decoder ({how})")
        return None if self.clip is None else Outcome(*self.clip, *answer)

    def end(self) -> None:
        """Ends the process, whatever it does."""
        if self.alive:
            self.alive = False
            self.process.kill()
            self.process.join()
            self.connection.close()


def _serve(connection: Connection, parts: Parts, read: Callable[[str | bytes], Any]) -> None:
    """What a worker does: says that it has started, then answers each (part, row) with (result, cause)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    if hasattr(signal, "pthread_sigmask"):  # the server that has forked this process blocks it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    with suppress(EOFError, BrokenPipeError):  # the first process is gone
        connection.send(None)
        while True:
            part, index = connection.recv()
            connection.send(_read(parts[part][1], index, read))


def _read(table: ClipTable, index: int, read: Callable[[str | bytes], Any]) -> tuple[Any, str | None]:
    try:
        return read(table.video(index)), None
    except VideoDecodeError as error:
        return None, error.cause or str(error)
    except Exception as error:  # whatever it is belongs to the clip
        return None, f"{type(error).__name__}: {first_line(error)}"


# --- figures and picture


def length_rows(figures: Sequence[ClipFigures]) -> list[tuple[str, str, str, str]]:
    """Rows of (what, smallest, median, largest) of frames, seconds and file sizes, as text."""
    columns = (
        ("frames", "{:g}", [clip.num_frames for clip in figures]),
        ("seconds", "{:.2f}", [clip.num_frames / clip.fps for clip in figures if clip.fps]),
        ("file size, MB", "{:.3f}", [clip.num_bytes / 1e6 for clip in figures if clip.num_bytes is not None]),
    )
    return [
        (name, *(form.format(value) for value in (min(values), np.median(values), max(values))))
        for name, form, values in columns
        if values
    ]


def commonest(values: Iterable[str], most: int = 5) -> str:
    """The commonest values with their counts, as text."""
    counts = Counter(values)
    # Of equal counts the smaller value first, so that the order of reading does not show.
    ordered = sorted(counts, key=lambda value: (-counts[value], value))
    return preview([f"{value} ({counts[value]})" for value in ordered], most)


def spread_over_classes(parts: Parts, clips: Iterable[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Some of the clips, of as many classes as possible, ordered by class; earlier ones are preferred."""
    seen: Counter[int] = Counter()
    ranked = []
    for place, (part, index) in enumerate(clips):
        label = int(parts[part][1].labels[index])
        ranked.append((seen[label], place, label, (part, index)))
        seen[label] += 1
    return [clip for _, _, _, clip in sorted(sorted(ranked)[:count], key=lambda row: (row[2], row[3]))]


@dataclass(frozen=True)
class SheetTiles:
    """Reads a clip as a row of a contact sheet: uint8 (frames, height, width, 3).

    Attributes:
        reader: Makes evaluation input.
    """

    reader: ClipReader

    def __call__(self, video: str | bytes) -> np.ndarray:
        pixels = self.reader(video, ())
        width = round(TILE_HEIGHT * pixels.shape[-1] / pixels.shape[-2])
        size = (TILE_HEIGHT, width)
        tiles = torch.nn.functional.interpolate(pixels.float(), size, mode="bicubic", antialias=True)
        return tiles.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def contact_sheet(rows: Sequence[tuple[str, str, np.ndarray]]) -> Image.Image:
    """A picture of clips: one a row, its frames from left to right.

    Args:
        rows: Label, name and tiles (frames, height, width, 3) of each clip; all tiles have one shape.
    """
    frames, height, width = rows[0][2].shape[:3]
    sheet = Image.new("RGB", (LABEL_WIDTH + frames * (width + GAP), len(rows) * (height + GAP)), "white")
    picture = ImageDraw.Draw(sheet)
    for row, (label, name, tiles) in enumerate(rows):
        top = row * (height + GAP)
        fonts.draw(picture, (8, top + 8), label, 16, "black", LABEL_WIDTH - 16)
        fonts.draw(picture, (8, top + 32), name, 12, "dimgray", LABEL_WIDTH - 16)
        for column, tile in enumerate(tiles):
            sheet.paste(Image.fromarray(tile), (LABEL_WIDTH + column * (width + GAP), top))
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture whole or not at all."""
    with atomic_path(path) as beside:
        picture.save(beside, format=Image.registered_extensions()[path.suffix.lower()])
