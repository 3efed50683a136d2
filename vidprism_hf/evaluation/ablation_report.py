"""What a sweep of `vidprism ablate` comes to: a table in Markdown and CSV, and a figure.

An accuracy is the mean over folds of the mean over seeds. Its interval is Student's, of the folds, since clips of one
fold (a person, a recording) are alike and seeds share their clips; it is widened for the training clips that folds
share. Rows are compared with the recipe as it is, and with a linear probe of the mean frame, by the differences within
folds, which leave out how hard each is, on the seeds that both have. Of twenty rows that differ by chance alone one is
clear of its interval.
"""

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..errors import UserError
from ..util import atomic_write
from .ablation_cells import Cell, Cells
from .figures import name, png
from .intervals import student_interval, wilson_interval


@dataclass(frozen=True)
class Estimate:
    """A mean over folds with its 95 % interval; not a number where there is none, as of folds that are all the same."""

    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Result:
    """A row of the table; shares are from 0 to 1.

    Attributes:
        grid: Its grid.
        row: Its name.
        seeds: How many are complete.
        parameters: Numbers that its head learns.
        top1: Accuracy.
        seed_deviation: Standard deviation over seeds of the accuracy over all folds; not a number for one seed, as
            probes have.
        over_recipe: Accuracy above that of the recipe.
        over_probe: Accuracy above that of the linear probe of the mean frame.
        seconds: Median of a cell.
    """

    grid: str
    row: str
    seeds: int
    parameters: int
    top1: Estimate
    seed_deviation: float
    over_recipe: Estimate
    over_probe: Estimate
    seconds: float


def summarise(sweep: dict[tuple[str, str], Cells], recipe: Cells, probe: Cells) -> list[Result]:
    """The rows of the table; those without a cell are left out, and grids of which a single row is left.

    Args:
        sweep: Grid and row to its cells.
        recipe: The cells of the recipe as it is.
        probe: Those of the linear probe of the mean frame.

    Raises:
        UserError: If there are none of the recipe, or no row beside it.
    """
    if not recipe:
        raise UserError("cells.jsonl: not all folds of the recipe itself are there; run the sweep without --report")
    results = [
        _result(grid, row, cells, over_recipe, _difference(cells, probe))
        for (grid, row), cells in sweep.items()
        if not math.isnan((over_recipe := _difference(cells, recipe)).mean)
    ]
    rows = Counter(result.grid for result in results)
    results = [result for result in results if rows[result.grid] > 1 or len(rows) == 1]
    if not results:
        raise UserError("cells.jsonl: no row of these grids is there as a whole; run the sweep without --report")
    return results


def _result(grid: str, row: str, cells: Cells, over_recipe: Estimate, over_probe: Estimate) -> Result:
    folds = _by_fold(list(cells.values()))
    first = next(iter(cells.values()))
    if len(folds) > 1:
        top1 = _estimate(folds)
    else:
        top1 = Estimate(folds[0], *wilson_interval(folds[0], len(first[0].right)))
    seeds = [statistics.fmean(cell.top1 for cell in of_seed) for of_seed in cells.values()]
    return Result(
        grid,
        row,
        len(cells),
        first[0].parameters,
        Estimate(top1.mean, max(0.0, top1.low), min(1.0, top1.high)),
        statistics.stdev(seeds) if len(seeds) > 1 else math.nan,
        over_recipe,
        over_probe,
        statistics.median(cell.seconds for of_seed in cells.values() for cell in of_seed),
    )


def _difference(cells: Cells, others: Cells) -> Estimate:
    """How far cells are above others, on the seeds that both have; a probe stands beside the mean over all seeds."""
    if None not in cells and None not in others:
        shared = [seed for seed in cells if seed in others]
        cells, others = ({seed: both[seed] for seed in shared} for both in (cells, others))
    if not cells or not others:
        return Estimate()
    pairs = zip(_by_fold(list(cells.values())), _by_fold(list(others.values())), strict=True)
    return _estimate([one - other for one, other in pairs])


def _estimate(folds: Sequence[float]) -> Estimate:
    mean = statistics.fmean(folds)
    if max(folds) - min(folds) < 1e-9:
        return Estimate(mean)
    return Estimate(mean, *student_interval(folds, 1 / (len(folds) - 1)))


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
        atomic_write(path, content)
    return paths


def markdown(results: Sequence[Result], about: str) -> str:
    """The table for people."""
    lines = [
        "# Ablations",
        "",
        about,
        "",
        "| grid | row | seeds | parameters | top-1 | 95 % interval | over seeds | over the recipe | 95 % interval "
        "| over the linear probe | 95 % interval |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | --- | ---: | --- |",
    ]
    before = None
    for result in results:
        grid = result.grid if result.grid != before else ""
        before = result.grid
        over_recipe, over_probe = (_points(estimate, "+") for estimate in (result.over_recipe, result.over_probe))
        spread = "" if math.isnan(result.seed_deviation) else f"± {100 * result.seed_deviation:.1f}"
        lines.append(
            f"| {grid} | {result.row} | {result.seeds} | {result.parameters:,} | {_points(result.top1)} | {spread} | "
            f"{over_recipe} | {over_probe} |"
        )
    return "\n".join(lines) + "\n"


def _points(estimate: Estimate, sign: str = "") -> str:
    """Two columns: a mean in points, and its interval."""
    mean, low, high = (
        "" if math.isnan(share) else f"{round(100 * share, 1) + 0.0:{sign}.1f}" for share in vars(estimate).values()
    )
    return f"{mean} | {low} to {high}" if low else f"{mean} | "


def table_csv(results: Sequence[Result]) -> str:
    """The table for programs, in full precision: of an estimate `x` the columns x, x_low and x_high."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rows = [_flat(result) for result in results]
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


def _flat(result: Result) -> dict[str, Any]:
    columns = {}
    for field in fields(result):
        value = getattr(result, field.name)
        if isinstance(value, Estimate):
            columns |= {field.name: value.mean, f"{field.name}_low": value.low, f"{field.name}_high": value.high}
        else:
            columns[field.name] = value
    return columns


def figure(results: Sequence[Result]) -> bytes:
    """Accuracies and differences with their intervals, grid by grid, as PNG bytes."""
    places, place, before = [], 0.0, None
    for result in results:
        place += 1.0 if result.grid == before else 1.8
        before = result.grid
        places.append(place)
    panels = {
        "held-out top-1, %": [result.top1 for result in results],
        "over the recipe, points": [result.over_recipe for result in results],
        "over the linear probe, points": [result.over_probe for result in results],
    }
    picture = Figure(figsize=(12, 0.27 * place + 1), layout="constrained")
    every = picture.subplots(1, len(panels), sharey=True)
    for axes, (label, estimates) in zip(every, panels.items(), strict=True):
        if label.endswith("points"):
            axes.axvline(0, color="0.6")
        for estimate, place in zip(estimates, places, strict=True):
            axes.plot([100 * estimate.low, 100 * estimate.high], [place, place], color="tab:blue", alpha=0.5)
            axes.plot([100 * estimate.mean], [place], "o", color="tab:blue", markersize=5)
        axes.set_xlabel(f"{label}\nwith 95 % intervals")
        axes.grid(axis="x", alpha=0.3)
    name(every[0].yaxis, [f"{result.grid}: {result.row}" for result in results], places)
    every[0].set_ylim(places[-1] + 1, 0.5)
    return png(picture)
