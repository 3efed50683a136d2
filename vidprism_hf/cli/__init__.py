"""The command line, one file a command: parse the arguments, build the objects, call the package's functions.

`vidprism_cli.COMMANDS` lists the commands. No other room imports from here.
"""

import importlib
import sys


def run(command: str, argv: list[str]) -> int:
    """Runs a command; errors in the input become one line on stderr.

    Args:
        command: The name of a module of this package, whose `main(argv)` returns an exit status.
        argv: What follows the command.
    """
    from ..errors import UserError, last_line
    from ..model import VideoDecodeError

    try:
        return importlib.import_module(f".{command}", __name__).main(argv)
    except (UserError, VideoDecodeError) as error:
        print(f"vidprism {command}: {last_line(error)}", file=sys.stderr)
        return 1
