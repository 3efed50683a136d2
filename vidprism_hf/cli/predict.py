"""`vidprism predict`: predicts the top labels of video files."""

import argparse
import json
import sys
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import UserError, first_line, printable
from ..evaluation.predict import Prediction, list_files, predict_files


def main(argv: list[str]) -> int:
    """Prints the predictions; returns 1 if a file could not be read."""
    parser = argparse.ArgumentParser(prog="vidprism predict", description="Top labels of video files.")
    parser.add_argument("model", help="exported folder or Hub id")
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="video file, URL, folder of videos, or - for a list on standard input"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub (main)")
    parser.add_argument("--top-k", type=int, default=5, help="labels per file (5)")
    parser.add_argument("--json", action="store_true", help="one JSON object per file and line instead of a table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=8, help="files per forward pass (8)")
    parser.add_argument(
        "--workers", type=int, help="processes that decode the next batches (one per core, none for a single batch)"
    )
    args = parser.parse_args(argv)
    for name, least in (("top_k", 1), ("batch_size", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # unknown device type, or not available
        raise UserError(f"--device {args.device}: {first_line(error)}") from error

    files = list_files(args.files)
    settings = {"device": args.device, "revision": args.revision, "workers": args.workers}
    predictions = predict_files(args.model, files, top_k=args.top_k, batch_size=args.batch_size, **settings)
    failed = print_predictions(predictions, as_json=args.json)
    if failed:
        print(f"{failed} of {len(files)} files could not be decoded", file=sys.stderr, flush=True)
    return int(failed > 0)


def print_predictions(predictions: Iterable[Prediction], as_json: bool) -> int:
    """Prints predictions as JSON as they come, or as a table at the end; returns the number of errors."""
    failed = 0
    table = Table("file", "label", "score")
    for prediction in predictions:
        failed += prediction.error is not None
        if as_json:
            print(json.dumps(vars(prediction), allow_nan=False), flush=True)
        elif prediction.error:
            print(f"vidprism predict: {printable(prediction.error)}", file=sys.stderr, flush=True)
        else:
            for place, (label, score) in enumerate(zip(prediction.labels, prediction.scores, strict=True)):
                # As Text: names may look like rich's markup.
                name = Text(printable(prediction.file) if place == 0 else "")
                table.add_row(name, Text(printable(label)), f"{score:.4f}")
            table.add_section()
    if table.row_count:
        Console().print(table)
    return failed
