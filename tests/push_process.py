"""`vidprism push` as a process of its own, which a test may kill.

Processes are forked from one that has imported most of what a push needs: a fresh interpreter takes seconds for that.
"""

import importlib
import os
import sys
import tempfile
from pathlib import Path

import huggingface_hub.constants

from vidprism_hf.errors import UserError
from vidprism_hf.hub.push import main
from vidprism_hf.workers import CONTEXT


class PushProcess:
    """A push of `folder` to alice/m that has been started.

    Args:
        hub: The test Hub.
        token: Of the pusher.
        folder: An export.
        home: Caches and output of the process.
        xet: Whether it uses hf-xet.
        more: Further environment variables.
    """

    def __init__(self, hub, token: str, folder: Path, home: Path, xet: bool = False, **more: str):
        home.mkdir(exist_ok=True)
        environment = hub.environment(home, token, xet) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | more
        self.output = Path(tempfile.mkdtemp(dir=home)) / "output"
        arguments = (environment, self.output, str(folder), "--repo", "alice/m")
        self.process = CONTEXT.Process(target=run, args=arguments)
        self.process.start()

    def kill(self) -> None:
        """Ends it as `kill -9` does."""
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -9

    def lines(self, status: int = 0) -> list[str]:
        """What it has printed, on either stream, once it has ended with this status."""
        self.process.join(200)
        said = self.output.read_text() if self.output.exists() else ""
        assert self.process.exitcode == status, said[-3000:]
        return said.splitlines()


def run(environment: dict[str, str], output: Path, *arguments: str) -> None:
    """Pushes as `python -m vidprism_hf.hub.push` does, under these environment variables."""
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(huggingface_hub.constants)  # where the client keeps what it reads from them
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            sys.exit(main(list(arguments)))
        except UserError as error:
            sys.exit(f"vidprism push: {error}")
        finally:
            sys.stdout.flush()
