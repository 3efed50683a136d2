"""What a sweep of `vidprism ablate` comes to: a table in Markdown and CSV, and a figure.

An accuracy is the mean over folds of the mean over seeds. Its interval is Student's, of the folds, since clips of one
fold (a person, a recording) are alike and seeds share their clips; it is widened for the training clips that folds
share. Rows are compared with the recipe as it is by the differences within folds, which leave out how hard each is, on
the seeds that both have. Of twenty rows that differ by chance alone one is clear of its interval.
"""

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ..data.clip_contents import write_whole
from ..errors import UserError
from .ablation_cells import Cell, Cells
from .figures import png
from .intervals import student_interval, wilson_interval


@dataclass(frozen=True)
class Result:
    """A row of the table; shares are from 0 to 1.

    Attributes:
        grid: Its grid.
        row: Its name.
        seeds: How many are complete.
        parameters: Numbers that its head learns.
        top1: Mean accuracy.
        low: Lower end of its interval.
        high: Upper end.
        seed_deviation: Standard deviation over seeds of the accuracy over all folds; 0 for one seed, as probes have.
        difference: Accuracy above that of the reference.
        difference_low: Lower end of its interval; not a number for a single fold.
        difference_high: Upper end.
        seconds: Median of a cell.
    """

    grid: str
    row: str
    seeds: int
    parameters: int
    top1: float
    low: float
    high: float
    seed_deviation: float
    difference: float
    difference_low: float
    difference_high: float
    seconds: float


def summarise(sweep: dict[tuple[str, str], Cells], reference: Cells) -> list[Result]:
    """The rows of the table; those without a cell are left out, and grids of which a single row is left.

    Args:
        sweep: Grid and row to its cells.
        reference: The cells that all are compared with, on the seeds that both have.

    Raises:
        UserError: If there are none of the reference.
    """
    if not reference:
        raise UserError("cells.jsonl: not all folds of the recipe itself are there; run the sweep without --report")
    results = []
    for (grid, row), cells in sweep.items():
        shared = list(reference) if None in cells else [seed for seed in cells if seed in reference]
        if not cells or not shared:
            continue
        base, folds = _by_fold([reference[seed] for seed in shared]), _by_fold(list(cells.values()))
        compared = folds if None in cells else _by_fold([cells[seed] for seed in shared])
        seeds = [statistics.fmean(cell.top1 for cell in of_seed) for of_seed in cells.values()]
        first = next(iter(cells.values()))
        top1 = statistics.fmean(folds)
        differences = [one - other for one, other in zip(compared, base, strict=True)]
        several = len(folds) > 1
        overlap = 1 / (len(folds) - 1) if several else 0.0
        low, high = student_interval(folds, overlap) if several else wilson_interval(top1, len(first[0].right))
        results.append(
            Result(
                grid,
                row,
                len(cells),
                first[0].parameters,
                top1,
                max(0.0, low),
                min(1.0, high),
                statistics.stdev(seeds) if len(seeds) > 1 else 0.0,
                statistics.fmean(differences),
                *(student_interval(differences, overlap) if several else (math.nan, math.nan)),
                statistics.median(cell.seconds for of_seed in cells.values() for cell in of_seed),
            )
        )
    rows = Counter(result.grid for result in results)
    return [result for result in results if rows[result.grid] > 1 or len(rows) == 1]


def _by_fold(cells: list[list[Cell]]) -> list[float]:
    """Mean over seeds of each fold's accuracy."""
    return [statistics.fmean(cell.top1 for cell in of_fold) for of_fold in zip(*cells, strict=True)]


def write_report(results: Sequence[Result], about: str, folder: Path) -> list[Path]:
    """Writes ablations.md, ablations.csv and ablations.png, each whole or not at all, and returns their paths.

    Args:
        results: The rows.
        about: What was trained and how, a paragraph.
        folder: It must exist.
    """
    contents = {
        "md": markdown(results, about).encode("utf-8"),
        "csv": table_csv(results).encode("utf-8"),
        "png": figure(results),
    }
    paths = [folder / f"ablations.{kind}" for kind in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        write_whole(path, content)
    return paths


def markdown(results: Sequence[Result], about: str) -> str:
    """The table for people."""
    lines = [
        "# Ablations",
        "",
        about,
        "",
        "| grid | row | seeds | parameters | top-1 | 95 % interval | over seeds | against the recipe | 95 % interval |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    before = None
    for result in results:
        low, high = result.difference_low, result.difference_high
        interval = "" if math.isnan(low) or low == high == 0 else f"{100 * low:+.1f} to {100 * high:+.1f}"
        grid = result.grid if result.grid != before else ""
        before = result.grid
        lines.append(
            f"| {grid} | {result.row} | {result.seeds} | {result.parameters / 1e6:.2f} M | {100 * result.top1:.1f} | "
            f"{100 * result.low:.1f} to {100 * result.high:.1f} | ± {100 * result.seed_deviation:.1f} | "
            f"{100 * result.difference:+.1f} | {interval} |"
        )
    return "\n".join(lines) + "\n"


def table_csv(results: Sequence[Result]) -> str:
    """The table for programs, in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(Result.__dataclass_fields__)
    writer.writerow(names)
    writer.writerows([getattr(result, name) for name in names] for result in results)
    return text.getvalue()


def figure(results: Sequence[Result]) -> bytes:
    """Accuracies with their intervals, grid by grid, as PNG bytes."""
    places, place, before = [], 0.0, None
    for result in results:
        place += 1.0 if result.grid == before else 1.8
        before = result.grid
        places.append(place)
    picture = Figure(figsize=(8, 0.27 * place + 1), layout="constrained")
    axes = picture.subplots()
    reference = 100 * (results[0].top1 - results[0].difference)
    axes.axvline(reference, color="0.8", zorder=0)
    for result, at in zip(results, places, strict=True):
        axes.plot([100 * result.low, 100 * result.high], [at, at], color="tab:blue", alpha=0.5)
        axes.plot([100 * result.top1], [at], "o", color="tab:blue", markersize=5)
    axes.set_yticks(places, [f"{result.grid}: {result.row}" for result in results])
    axes.set_ylim(place + 1, 0.5)
    axes.set_xlabel("held-out top-1, %, with 95 % intervals over folds")
    axes.grid(axis="x", alpha=0.3)
    return png(picture)
