"""`vidprism splits`: one recipe on several official splits, and the mean of their accuracies."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..errors import UserError
from ..util import atomic_write
from .trust import HELP, read_recipe, recipes_of

FILE_NAME = "splits.json"


def main(argv: list[str]) -> int:
    """Trains and evaluates on each split in a process of its own, then averages.

    Returns:
        0, or the status of the first run that failed.
    """
    args, recipe = _parse(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("vidprism splits starts its own runs: do not launch it with torchrun or srun")
    output = Path(args.output or _recipe_output(recipe))
    results: dict[str, dict[str, float]] = {}
    for split in args.splits:
        run = output / f"split{split}"
        settings = [*recipe, f"--data.split={split}", f"--output={run}"]
        status = subprocess.run([sys.executable, "-m", "vidprism_hf.cli", "finetune", *settings]).returncode
        if status:
            return status
        results[str(split)] = json.loads((run / "metrics.json").read_text())
    summary = {"splits": results, "mean": _mean(results)}
    atomic_write(output / FILE_NAME, f"{json.dumps(summary, indent=2, allow_nan=False)}\n".encode())
    _print(summary, output)
    return 0


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="vidprism splits",
        description="Runs a recipe on several official splits and averages; other options are those of finetune. "
        + HELP,
        allow_abbrev=False,
    )
    parser.add_argument("--splits", type=int, nargs="+", default=[1, 2, 3], choices=(1, 2, 3), help="which splits")
    parser.add_argument("--output", help="folder of the runs (default: the recipe's output)")
    return parser.parse_known_args(argv)


def _recipe_output(settings: list[str]) -> str:
    """The output that the last recipe given names."""
    for recipe in reversed(recipes_of(settings)):
        if named := read_recipe(recipe).get("output"):
            return named
    raise UserError("--output: name the folder of the runs, or a recipe with --config")


def _mean(results: dict[str, dict[str, float]]) -> dict[str, float]:
    names = next(iter(results.values()))
    return {name: statistics.fmean(metrics[name] for metrics in results.values()) for name in names if name != "clips"}


def _print(summary: dict, output: Path) -> None:
    names = list(summary["mean"])
    table = Table("split", *names)
    for split, metrics in [*summary["splits"].items(), ("mean", summary["mean"])]:
        table.add_row(split, *(f"{metrics[name]:.4f}" for name in names))
    Console().print(table)
    print(f"Written to {output / FILE_NAME}")
