"""Runs of the command line in processes of their own that start at once, and end where a test wants them to.

A server imports what a run needs, once, and forks for each run: `RunServer` starts it and asks it. What is to happen to
a run is a plan, a dict; see `_arm`.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# With these no library that it imports starts a thread.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


class RunServer:
    """Starts runs; a context manager.

    Args:
        folder: Where the runs' output goes.
        environment: That of the server, and so of all runs.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None):
        self.folder, self._number = folder, 0
        environment = (environment or dict(os.environ)) | ONE_THREAD  # it forks
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.stdin.close()
        self._server.wait(60)

    def start(self, arguments: list[str], plan: dict | None = None, **environment: str) -> tuple[int, Path]:
        """Starts a run; gives its process, which leads a group of its own, and the file of its output."""
        self._number += 1
        log = self.folder / f"run{self._number}.log"
        pid = self._ask({"arguments": arguments, "plan": plan or {}, "environment": environment, "log": str(log)})
        return pid, log

    def wait(self, pid: int) -> int:
        """The exit status of a run; minus the signal's number if a signal ended it."""
        return self._ask({"wait": pid})

    def run(self, arguments: list[str], plan: dict | None = None, **environment: str) -> tuple[int, str]:
        """Runs to the end; gives status and output."""
        pid, log = self.start(arguments, plan, **environment)
        return self.wait(pid), log.read_text(errors="replace")

    def _ask(self, question: dict) -> int:
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def _serve() -> None:
    sys.path.insert(0, str(ROOT))
    import datasets  # noqa: F401
    import torch.distributed  # noqa: F401

    import vidprism_hf.training.finetune  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _run(**question)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run(arguments: list[str], plan: dict, environment: dict[str, str], log: str) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    from vidprism_hf.cli import main

    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # else found when Lightning is imported
    status = 1
    try:
        _arm(plan)
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _arm(plan: dict) -> None:
    """Prepares what is to happen.

    - `{"signals": ["SIGTERM"], "step": 3}`: signals in the middle of the 3rd step of this process; with `"to": "group"`
      also to its loaders.
    - `{"calls": 500, "step": 3}`: kill -9 so many Python calls after the 3rd step begins; step 0 is the start of fit.
    - `{"written": 0.5, "file": 2}`: kill -9 when so much of last.ckpt is written for the 2nd time.
    - `{"lost": 3}`: the loss of the 3rd step is NaN.
    - `{"renamed": 2, "file": 2}`: kill -9 before the 1st or 2nd rename after that, or after the 2nd (3).
    """
    if "signals" in plan:
        numbers = [getattr(signal, name) for name in plan["signals"]]
        send = _signal_group if plan.get("to") == "group" else signal.raise_signal
        _at_step(plan["step"], lambda: [send(number) for number in numbers])
    if "calls" in plan:
        _at_step(plan["step"], lambda: _count_calls(plan["calls"]))
    if "lost" in plan:
        _lose(plan["lost"])
    if "file" in plan:
        _at_file(plan["file"], plan.get("written"), plan.get("renamed"))


def _signal_group(number: int) -> None:
    # From another process, as a cluster would: loaders obey the run.
    code = f"import os; os.killpg({os.getpid()}, {int(number)})"
    subprocess.run([sys.executable, "-S", "-c", code], start_new_session=True, check=True)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_step(step: int, act) -> None:
    import lightning as L

    from vidprism_hf import VidPrismLightningModule

    seen = 0
    owner, name = (VidPrismLightningModule, "training_step") if step else (L.Trainer, "fit")
    whole = getattr(owner, name)

    def watched(*args, **kwargs):
        nonlocal seen
        seen += 1
        if seen == max(1, step):
            act()
        return whole(*args, **kwargs)

    setattr(owner, name, watched)


def _lose(step: int) -> None:
    from vidprism_hf import VidPrismLightningModule

    losses, whole = iter(range(1, 1 << 30)), VidPrismLightningModule.training_step
    VidPrismLightningModule.training_step = lambda *args: whole(*args) * (float("nan") if next(losses) == step else 1)


def _count_calls(left: int) -> None:
    def count(frame, event, argument):
        nonlocal left
        left -= event in ("call", "c_call")
        if left < 0:
            _die()

    sys.setprofile(count)


def _at_file(number: int, share: float | None, rename: int | None) -> None:
    import io

    import torch

    save, replace, files, renames = torch.save, os.replace, 0, 0

    def saving(content, file):
        nonlocal files, renames
        files, renames = files + Path(file.name).name.startswith("last."), 0
        if files == number and share is not None:
            whole = io.BytesIO()
            save(content, whole)
            file.write(whole.getvalue()[: int(share * whole.tell())])
            file.flush()
            _die()
        save(content, file)

    def renaming(source, target):
        nonlocal renames
        renames += 1
        if rename is not None and files == number and renames == rename:
            _die()
        replace(source, target)
        if rename == 3 and files == number and renames == 2:
            _die()

    torch.save, os.replace = saving, renaming


if __name__ == "__main__":
    _serve()
