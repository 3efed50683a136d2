"""How benchmarks print what they measured: a Markdown table with the date and the versions that it holds for."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "transformers", "av", "numpy", "pyarrow")


def add_report_options(parser, output="--output"):
    """Adds what `write_report` takes from the command line; `output` is the name of the option for the file."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument(output, dest="output", help="Markdown file for the table")
    parser.add_argument("--machine", default=f"{cores} CPU cores", help="the machine, in words")


def write_report(title, about, header, rows, args, notes=()):
    """Prints a report, and writes it to a file if one is named.

    Args:
        title: Its headline.
        about: What was measured and how to read it.
        header: Names of the columns.
        rows: Rows of texts.
        args: The parsed options; the file is written whole or not at all.
        notes: Paragraphs below the table.
    """
    versions = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)])
    lines = [
        f"# {title}",
        "",
        about,
        "",
        "| " + " | ".join(header) + " |",
        "| --- " * len(header) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"{datetime.date.today().isoformat()}, {args.machine}; {versions}.",
        *(line for note in notes for line in ("", note)),
    ]
    text = "\n".join(lines) + "\n"
    print(text, end="", flush=True)
    if args.output is not None:
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".tmp")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
