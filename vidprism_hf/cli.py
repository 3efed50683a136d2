"""The command line: `vidprism VERB …`, one function a verb."""

import sys
from collections.abc import Callable

USAGE = """usage: vidprism VERB ...

  data prepare|check|show ...              fetch a benchmark, decode every clip once, look at a source
  finetune --config RECIPE [--key value]   train by a recipe, evaluate, export
  splits --config RECIPE [--splits 1 2 3]  finetune on several official splits, and the mean
  ablate --config RECIPE [--grid NAME]     variants of the head on small data, compared in a table
  evaluate MODEL --config RECIPE           accuracy of any video classifier on held-out clips
  predict MODEL FILE [FILE ...]            top labels of video files
  push FOLDER --repo ORG/NAME              publish an export on the Hub
  convert CHECKPOINT OUT ...               an authors' checkpoint to the Hub's layout

`vidprism VERB --help` tells a verb's options.
"""


def _finetune(argv: list[str]) -> int:
    from .training.finetune import finetune

    finetune(argv)
    return 0


def _splits(argv: list[str]) -> int:
    from .training.splits import main

    return main(argv)


def _ablate(argv: list[str]) -> int:
    from .evaluation.ablate import main

    return main(argv)


def _evaluate(argv: list[str]) -> int:
    from .evaluation.evaluate import evaluate

    evaluate(argv)
    return 0


def _predict(argv: list[str]) -> int:
    from .evaluation.predict import main

    return main(argv)


def _push(argv: list[str]) -> int:
    from .hub.push import main

    return main(argv)


def _convert(argv: list[str]) -> int:
    from .convert.released import main

    return main(argv)


def _data(argv: list[str]) -> int:
    from .data.verbs import main

    return main(argv)


VERBS: dict[str, Callable[[list[str]], int]] = {
    "data": _data,
    "finetune": _finetune,
    "splits": _splits,
    "ablate": _ablate,
    "evaluate": _evaluate,
    "predict": _predict,
    "push": _push,
    "convert": _convert,
}


def main(argv: list[str] | None = None) -> int:
    """Runs a verb.

    Returns:
        The exit status: 0, 1 where something could not be done, 2 for wrong usage.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv[0] not in VERBS:
        print(f"vidprism: no verb {argv[0]!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    from .errors import UserError, last_line, printable
    from .model import VideoDecodeError

    try:
        return VERBS[argv[0]](argv[1:])
    except (UserError, VideoDecodeError) as error:
        print(f"vidprism {argv[0]}: {printable(last_line(error))}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
