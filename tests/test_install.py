"""The package as it is installed: what the wheel has, and how fast the console script answers."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_every_folder_of_the_package_is_installed():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    named = set(settings["options"]["packages"].split())
    folders = {".".join(path.relative_to(ROOT).parts[:-1]) for path in (ROOT / "vidprism_hf").rglob("__init__.py")}
    assert named == folders | {"vidprism_hf.recipes"}


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["fintune"], ["finetune", "--help"]])
def test_what_needs_no_library_imports_none(words):
    """The console script answers at the speed of plain Python."""
    code = f"import sys, vidprism_cli; vidprism_cli.main({words}); print('|', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(done.stdout.rpartition("|")[2].split())
    assert not {"torch", "transformers", "lightning", "numpy", "vidprism_hf"} & imported


@pytest.mark.slow
def test_the_wheel_brings_the_recipes(tmp_path):
    """Run from a folder that is no checkout, with nothing of the checkout on the path."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(clean(tmp_path))]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "work").mkdir()

    def vidprism(*words: str) -> str:
        command = [sys.executable, "-m", "vidprism_hf", *words]
        done = subprocess.run(command, cwd=tmp_path / "work", env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    names = [line.split()[0] for line in vidprism("recipes").splitlines()]
    checkout = {path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in recipes()}
    assert set(names) == checkout
    assert vidprism("recipes", "few_shot/ucf101") == (ROOT / "recipes" / "few_shot" / "ucf101.yaml").read_text()
    assert "source: demo" in vidprism("finetune", "--config", "demo", "--print_config")


def recipes() -> list[Path]:
    return sorted((ROOT / "recipes").rglob("*.yaml"))


def clean(tmp_path: Path) -> Path:
    """A copy of what is built, so that the build leaves nothing in the checkout."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "vidprism_cli.py"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("vidprism_hf", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder
