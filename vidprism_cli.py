"""The console script `vidprism`: picks the command, and answers what needs no library before any is imported.

A module outside the package, whose import loads transformers: `--help`, `--version` and a mistyped command answer at
the speed of plain Python.
"""

import difflib
import importlib
import importlib.metadata
import importlib.util
import sys

# Command -> (how it is called, what it does); `vidprism_hf.cli.<command>` has its `main(argv)`.
COMMANDS = {
    "data": ("data prepare|check|show ...", "fetch a benchmark, decode every video once, look at a source"),
    "finetune": ("finetune [CLIPS] [--config RECIPE] ...", "train by a recipe, evaluate, export"),
    "splits": ("splits --config RECIPE ...", "finetune on several official splits, and average"),
    "ablate": ("ablate --config RECIPE ...", "compare variants of the head on small data"),
    "evaluate": ("evaluate MODEL --config RECIPE", "accuracy of any video classifier on a validation split"),
    "predict": ("predict MODEL FILE [FILE ...]", "top labels of video files"),
    "push": ("push FOLDER --repo ORG/NAME", "publish an export on the Hub"),
    "convert": ("convert CHECKPOINT OUT ...", "convert an authors' checkpoint to the Hub's layout"),
    "recipes": ("recipes [NAME]", "list the recipes, or print one to copy it"),
}
HELP = {"-h", "--help"}


def usage() -> str:
    """Returns the help of the whole command line."""
    width = max(len(call) for call, _ in COMMANDS.values()) + 2
    lines = [f"  {call:<{width}}{what}" for call, what in COMMANDS.values()]
    return "\n".join(
        ["usage: vidprism COMMAND ...", "", *lines, "", "`vidprism COMMAND --help` lists a command's options.", ""]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0, 1 for an error that was printed in one line, 2 for wrong usage, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else "--help"
    if command in HELP:
        print(usage(), end="")
        return 0
    if command == "--version":
        print(f"vidprism {importlib.metadata.version('vidprism_hf')}")
        return 0
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        advice = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        print(f"vidprism: no command {command!r}; {advice}", file=sys.stderr)
        return 2
    if command == "finetune" and HELP.intersection(argv):
        return print_help()
    try:
        return importlib.import_module("vidprism_hf.cli").run(command, argv[1:])
    except KeyboardInterrupt:
        print(f"vidprism {command}: interrupted", file=sys.stderr)
        return 130


def print_help() -> int:
    """Prints the help of finetune, which is read from the package's source without importing it."""
    (folder,) = importlib.util.find_spec("vidprism_hf").submodule_search_locations
    spec = importlib.util.spec_from_file_location("vidprism_help", f"{folder}/cli/help.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(module.finetune_help(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
