"""What every test may use: the helpers of this folder on the import path, and the shared real data."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a job in the background: tests of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARGS"):  # of `make test`: not for the commands of its tests
    os.environ.pop(name, None)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # `from clips import ...`

import fork_watch  # noqa: E402

# A file for each of pytest's processes; those that tests start inherit it.
os.environ[fork_watch.VARIABLE] = FORKS = tempfile.mkstemp(prefix="forks-")[1]
SITE = str(Path(__file__).parent / "fork_watch_site")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [SITE, os.environ.get("PYTHONPATH")]))
fork_watch.arm()


# Marks in transformers' own suite, which strict markers would refuse.
SUITE_MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
)


def pytest_configure(config):
    for name in SUITE_MARKS:
        config.addinivalue_line("markers", f"{name}: set by transformers' tests")


@pytest.fixture(autouse=True)
def no_forks_of_several_threads():
    """Fails a test that has led to such a fork, in whatever process: see fork_watch."""
    yield
    if found := Path(FORKS).read_text():
        Path(FORKS).write_text("")
        pytest.fail(found, pytrace=False)


def pytest_unconfigure(config):
    Path(FORKS).unlink(missing_ok=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips, recorded tensors and weights, which is no part of the repository."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("VIDPRISM_SHARED", default))
    if not folder.is_dir():
        pytest.skip(f"needs the shared data: {folder} is missing (set VIDPRISM_SHARED)")
    return folder


@pytest.fixture(scope="session")
def motion_clips(tmp_path_factory) -> Path:
    """A folder of class folders: two motions of the demo, four training and two held-out clips each."""
    from small import motion_folder

    return motion_folder(tmp_path_factory.mktemp("data") / "motions")


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """An exported model of those two motions with random weights; read only."""
    from small import tiny_export

    return tiny_export(tmp_path_factory.mktemp("models") / "exported")


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    """The tree as git would commit it, with this environment as its `.venv`."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to know which files belong to the tree")
    folder = tmp_path_factory.mktemp("readme") / "vidprism_hf"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=True)
    # `make` takes an environment with this file, newer than setup.cfg, as installed.
    venv = folder / ".venv"
    venv.mkdir()
    (venv / "bin").symlink_to(Path(sys.executable).parent)
    (venv / ".ready").touch()
    return folder
