"""The report of a study: a table in Markdown and CSV, and a figure.

An accuracy is the mean over folds of the mean over seeds. Its 95 % interval is Student's over folds, since videos of
one fold (a person, a recording) are alike and seeds share their videos; it is widened for the training videos that
folds share. Rows are compared with the recipe and with a linear probe of the mean frame by differences within folds, on
the seeds that both have. Of twenty rows that differ by chance alone, one is expected outside its interval.
"""

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from matplotlib.figure import Figure
from scipy.stats import t as student

from ..errors import UserError
from ..evaluation.figures import name, png
from ..evaluation.intervals import wilson_interval
from ..util import atomic_write
from .trials import Trials


@dataclass(frozen=True)
class Estimate:
    """A mean over folds with its 95 % interval; NaN where undefined, such as the interval of equal folds."""

    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Result:
    """A row of the table; accuracies are from 0 to 1.

    Attributes:
        grid: Grid of the row.
        row: Name of the row.
        seeds: Number of finished seeds.
        parameters: Number of trainable parameters.
        top1: Accuracy.
        seed_deviation: Standard deviation over seeds of the accuracy over all folds; NaN for one seed, as of probes.
        over_recipe: Accuracy minus the recipe's.
        over_probe: Accuracy minus that of the linear probe of the mean frame.
        seconds: Median duration of a trial.
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


def summarise(rows: dict[tuple[str, str], Trials], recipe: Trials, probe: Trials) -> list[Result]:
    """Returns the rows of the table, without those that have no trials and grids with a single row left.

    Args:
        rows: Grid and row name to trials.
        recipe: Trials of the unchanged recipe.
        probe: Trials of the linear probe of the mean frame.

    Raises:
        UserError: If the recipe is not finished, or no row beside it.
    """
    if not recipe:
        raise UserError("trials.jsonl: the recipe itself is not finished on all folds; run the study first")
    results = [
        _result(grid, row, trials, over_recipe, _difference(trials, probe))
        for (grid, row), trials in rows.items()
        if not math.isnan((over_recipe := _difference(trials, recipe)).mean)
    ]
    sizes = Counter(result.grid for result in results)
    results = [result for result in results if sizes[result.grid] > 1 or len(sizes) == 1]
    if not results:
        raise UserError("trials.jsonl: no row of these grids is finished on all folds; run the study first")
    return results


def _result(grid: str, row: str, trials: Trials, over_recipe: Estimate, over_probe: Estimate) -> Result:
    folds, every = _by_fold(trials), [trial for of_seed in trials.values() for trial in of_seed]
    if len(folds) > 1:
        top1 = _estimate(folds)
    else:
        top1 = Estimate(folds[0], *wilson_interval(folds[0], len(every[0].correct)))
    seeds = [statistics.fmean(trial.top1 for trial in of_seed) for of_seed in trials.values()]
    return Result(
        grid,
        row,
        len(trials),
        every[0].parameters,
        Estimate(top1.mean, max(0.0, top1.low), min(1.0, top1.high)),
        statistics.stdev(seeds) if len(seeds) > 1 else math.nan,
        over_recipe,
        over_probe,
        statistics.median(trial.seconds for trial in every),
    )


def _difference(trials: Trials, others: Trials) -> Estimate:
    """Returns accuracy minus the others', on the seeds that both have; a probe is compared with all of them."""
    if None not in trials and None not in others:
        trials, others = ({seed: of[seed] for seed in trials.keys() & others.keys()} for of in (trials, others))
    if not trials or not others:
        return Estimate()
    pairs = zip(_by_fold(trials), _by_fold(others), strict=True)
    return _estimate([one - other for one, other in pairs])


def _by_fold(trials: Trials) -> list[float]:
    """Returns each fold's accuracy, as the mean over seeds."""
    return [statistics.fmean(trial.top1 for trial in fold) for fold in zip(*trials.values(), strict=True)]


def _estimate(folds: Sequence[float]) -> Estimate:
    mean = statistics.fmean(folds)
    if max(folds) - min(folds) < 1e-9:
        return Estimate(mean)
    return Estimate(mean, *student_interval(folds, 1 / (len(folds) - 1)))


def student_interval(values: Sequence[float], overlap: float = 0.0) -> tuple[float, float]:
    """Returns Student's 95 % interval of the mean of at least two values, one per fold.

    Args:
        values: One per fold.
        overlap: Validation videos of a fold per training video. Folds share training videos, so that their results
            are not independent: the variance of the mean is (1 / k + overlap) times that of the k values (Nadeau and
            Bengio, 2003, "Inference for the generalization error"). 0 for independent values.
    """
    if len(values) < 2:
        raise ValueError(f"no interval of {len(values)} values")
    error = statistics.stdev(values) * math.sqrt(1 / len(values) + overlap)
    low, high = student.interval(0.95, len(values) - 1, statistics.fmean(values), error)
    return float(low), float(high)


def write_report(results: Sequence[Result], about: str, folder: Path) -> list[Path]:
    """Writes ablations.md, ablations.csv and ablations.png, each atomically, and returns their paths.

    Args:
        results: Rows of the table.
        about: Paragraph on what was trained and how.
        folder: Existing folder.
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
    """Returns the table for people."""
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
        grid, before = (result.grid if result.grid != before else ""), result.grid
        spread = "" if math.isnan(result.seed_deviation) else f"± {100 * result.seed_deviation:.1f}"
        lines.append(
            f"| {grid} | {result.row} | {result.seeds} | {result.parameters:,} | {_points(result.top1)} | {spread} | "
            f"{_points(result.over_recipe, '+')} | {_points(result.over_probe, '+')} |"
        )
    return "\n".join(lines) + "\n"


def _points(estimate: Estimate, sign: str = "") -> str:
    """Returns two columns: a mean in points, and its interval."""
    mean, low, high = (
        "" if math.isnan(share) else f"{round(100 * share, 1) + 0.0:{sign}.1f}" for share in vars(estimate).values()
    )
    return f"{mean} | {low} to {high}" if low else f"{mean} | "


def table_csv(results: Sequence[Result]) -> str:
    """Returns the table for programs, in full precision; an estimate `x` has columns x, x_low and x_high."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rows = []
    for result in results:
        row = {}
        for field in fields(result):
            value = getattr(result, field.name)
            if isinstance(value, Estimate):
                row |= {field.name: value.mean, f"{field.name}_low": value.low, f"{field.name}_high": value.high}
            else:
                row[field.name] = value
        rows.append(row)
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


def figure(results: Sequence[Result]) -> bytes:
    """Returns a PNG of accuracies and differences with their intervals, grid by grid."""
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
