"""Locate, or fetch, transformers' own tests, which its wheel lacks and its source package holds.

`require_suite()` makes `import tests.test_modeling_common` (and `test_configuration_common`,
`test_video_processing_common`) mean the files of exactly the installed version, although this folder is
called tests too: a package wins over a folder without `__init__.py`. They lie where the environment variable
VIDPRISM_TRANSFORMERS_TESTS says, else in `.venv/transformers-tests`, and `python tests/transformers_suite.py
DEST` puts them there from PyPI.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath

DEFAULT = Path(__file__).resolve().parents[1] / ".venv" / "transformers-tests"

# What the suite imports and the source package leaves out. Empty mixins drop tests that these models have no
# use for (export to other runtimes, text generation); the common arguments are those of any configuration.
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": """config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}
""",
}


def require_suite() -> None:
    """Make `tests` mean transformers' tests, or skip the calling module, saying how to get them."""
    import pytest

    folder = Path(os.environ.get("VIDPRISM_TRANSFORMERS_TESTS", DEFAULT))
    installed, found = version("transformers"), suite_version(folder)
    if found != installed:
        pytest.skip(
            f"needs the tests of transformers {installed} (found: {found}): "
            "run `python tests/transformers_suite.py .venv/transformers-tests`",
            allow_module_level=True,
        )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    import tests

    if Path(tests.__file__).resolve().parent != (folder / "tests").resolve():
        raise ImportError(f"`tests` is {tests.__file__} already: something imported it before the suite.")


def suite_version(folder: Path) -> str | None:
    """Version of transformers whose tests a folder holds, None if it holds none."""
    stamp = folder / "VERSION"
    return stamp.read_text().strip() if stamp.is_file() else None


def fetch(dest: Path) -> None:
    """Put the tests of the installed transformers into a folder, from its source package on PyPI."""
    installed = version("transformers")
    if suite_version(dest) == installed:
        print(f"{dest} holds the tests of transformers {installed} already")
        return
    with tempfile.TemporaryDirectory() as folder:
        # Of this package alone: without wheels for what builds it, pip would build its builders too.
        options = ["--quiet", "--no-deps", "--no-binary", "transformers", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, f"transformers=={installed}"]
        subprocess.run(command, check=True)
        unpack(next(Path(folder).glob("*.tar.gz")), dest)
    for name, text in STAND_INS.items():
        path = dest / "tests" / name
        if not path.exists():
            _write(path, text.encode())
    for folder in {dest / "tests", *(path.parent for path in (dest / "tests").rglob("*.py"))}:
        (folder / "__init__.py").touch()
    (dest / "VERSION").write_text(installed + "\n")  # last: only a whole folder carries it
    print(f"{dest} holds the tests of transformers {installed}")


def unpack(archive: Path, dest: Path) -> None:
    """Copy the suite's Python files, but no model's own tests, out of a source package."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            wanted = path.parent.as_posix() in ("tests", "tests/utils", "tests/exporters", "tests/generation")
            if wanted and path.suffix == ".py" and member.isfile():
                _write(dest / path, tar.extractfile(member).read())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/transformers_suite.py DEST")
    fetch(Path(sys.argv[1]))
