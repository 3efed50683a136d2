"""The table of a study: means, intervals over folds, differences within folds."""

import csv
import io
import math
import statistics

import pytest

from vidprism_hf.ablation.report import markdown, student_interval, summarise, table_csv, write_report
from vidprism_hf.ablation.trials import Trial
from vidprism_hf.errors import UserError


def trials(*shares):
    """Seed to one trial per fold, from accuracies on ten videos."""
    return {
        seed: [Trial([video < share for video in range(10)], 1000, 1.5) for share in of_seed]
        for seed, of_seed in enumerate(shares)
    }


REFERENCE = trials((7, 7, 9), (7, 9, 9))
OTHER = trials((8, 8, 10), (8, 10, 10))
PROBE = {None: trials((6, 8, 9))[0]}  # has nothing random


def test_means_and_intervals():
    base, other = summarise({("g", "as it is"): REFERENCE, ("g", "other"): OTHER}, REFERENCE, PROBE)
    folds = [0.7, 0.8, 0.9]
    assert base.top1.mean == pytest.approx(statistics.fmean(folds))
    half = 4.302653 * statistics.stdev(folds) * math.sqrt(1 / 3 + 1 / 2)  # of three folds two are trained on
    assert base.top1.low == pytest.approx(max(0.0, base.top1.mean - half))
    assert base.top1.high == 1.0  # an accuracy is at most that
    assert base.seed_deviation == pytest.approx(statistics.stdev([2.3 / 3, 2.5 / 3]))
    assert base.over_recipe.mean == 0
    assert math.isnan(base.over_recipe.low)  # equal folds have no interval
    # One video in ten more in every fold: how hard the folds are does not matter.
    assert other.over_recipe.mean == pytest.approx(0.1)
    assert math.isnan(other.over_recipe.low)
    # The probe has 6, 8, 9 of ten: the seeds' means are one video above it, or equal.
    differences = [0.1, 0.0, 0.0]
    half = 4.302653 * statistics.stdev(differences) * math.sqrt(1 / 3 + 1 / 2)
    mean = statistics.fmean(differences)
    assert (base.over_probe.mean, base.over_probe.low, base.over_probe.high) == pytest.approx(
        (mean, mean - half, mean + half)
    )


def test_rows_are_compared_on_the_seeds_that_both_have():
    later = {1: OTHER[1]}
    (result,) = summarise({("g", "row"): later}, REFERENCE, PROBE)
    assert result.seeds == 1
    assert result.over_recipe.mean == pytest.approx(0.1)
    # A probe has nothing random: it stands beside the recipe's mean.
    (probe,) = summarise({("g", "probe"): PROBE}, REFERENCE, PROBE)
    assert probe.seeds == 1
    assert math.isnan(probe.seed_deviation)
    assert probe.over_recipe.mean == pytest.approx(2.3 / 3 - statistics.fmean([0.7, 0.8, 0.9]))
    assert probe.over_probe.mean == 0
    with pytest.raises(UserError, match="no row of these grids"):
        summarise({("g", "row"): {7: OTHER[1]}}, REFERENCE, PROBE)


def test_nothing_but_the_recipe():
    with pytest.raises(UserError, match="no row of these grids"):
        summarise({("g", "as it is"): REFERENCE, ("h", "as it is"): REFERENCE}, REFERENCE, PROBE)


def test_a_single_fold_has_no_paired_interval():
    (result,) = summarise({("g", "row"): trials((6,))}, trials((5,)), {})
    assert 0 < result.top1.low < 0.6 < result.top1.high < 1
    assert result.over_recipe.mean == pytest.approx(0.1)
    assert math.isnan(result.over_recipe.low)
    assert math.isnan(result.over_probe.mean)  # there are none
    assert math.isnan(result.seed_deviation)


def test_the_table_and_its_files(tmp_path):
    results = summarise({("h", "as it is"): REFERENCE, ("h", "other"): OTHER, ("i", "alone"): OTHER}, REFERENCE, PROBE)
    text = markdown(results, "What was trained.")
    assert "|  | other | 2 | 1,000 | 90.0 |" in text
    assert "| +10.0 |  | +13.3 |" in text
    assert "alone" not in text  # nothing stands beside it in its grid
    rows = list(csv.DictReader(io.StringIO(table_csv(results))))
    for estimate in ("top1", "over_recipe", "over_probe"):
        for column, name in ((estimate, "mean"), (f"{estimate}_low", "low"), (f"{estimate}_high", "high")):
            values = [getattr(getattr(result, estimate), name) for result in results]
            assert [float(row[column]) for row in rows] == pytest.approx(values, nan_ok=True)
    assert "nan" not in markdown(summarise({("g", "row"): trials((6,))}, trials((5,)), {}), "What was trained.")
    paths = write_report(results, "What was trained.", tmp_path)
    assert [path.name for path in paths] == ["ablations.md", "ablations.csv", "ablations.png"]
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)


def test_students_interval():
    low, high = student_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    wider = student_interval([1.0, 2.0, 3.0], overlap=0.5)
    assert wider[1] - 2 == pytest.approx((high - 2) * math.sqrt((1 / 3 + 0.5) / (1 / 3)))
    assert student_interval([0.0, 1.0] * 20)[1] == pytest.approx(
        0.5 + 2.022691 * statistics.stdev([0, 1] * 20) / 40**0.5
    )
    with pytest.raises(ValueError, match="no interval"):
        student_interval([1.0])
