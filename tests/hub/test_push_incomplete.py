"""What is no whole export is not pushed: one error, before the Hub is asked for anything."""

import json
import shutil

import pytest
from push_helpers import failed, grown, push, pushed_once

pytest_plugins = ["hub_server.fixtures"]


@pytest.fixture
def folder(exported, tmp_path):
    """An export of its own, which a test may change."""
    return shutil.copytree(exported, tmp_path / "export")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors"),
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
        lambda folder: shutil.rmtree(folder),
        lambda folder: (folder / "README.md").write_bytes(b"\xff"),
        grown,
    ],
)
def test_what_is_no_export_is_not_published(hub, api, folder, spoil):
    spoil(folder)
    assert "export" in failed(hub, api.token, folder)
    assert hub.count() == {}


def test_all_that_is_missing_is_named(hub, api, folder):
    missing = ["README.md", "model.safetensors", "temporal_vidprism.py", "video_preprocessor_config.json"]
    for name in missing:
        (folder / name).unlink()
    assert f"it lacks {', '.join(missing)}; export it again" in failed(hub, api.token, folder)
    for path in folder.glob("*.py"):
        path.unlink()
    # Of the code files those can be told that config.json names.
    lacking = [name for name in missing if "temporal" not in name]
    lacking += [f"{name}_vidprism.py" for name in ("configuration", "modeling", "video_processing")]
    assert f"it lacks {', '.join(sorted(lacking))};" in failed(hub, api.token, folder)
    assert hub.count() == {}


def test_an_export_that_names_no_code(hub, api, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": None}))
    assert "auto_map in config.json" in failed(hub, api.token, folder)


def test_an_export_of_a_version_with_other_code_files_is_one(hub, api, folder):
    for path in folder.glob("*_vidprism.py"):
        path.unlink()
    (folder / "all_vidprism.py").write_text("from .more_vidprism import VidPrismConfig\n")
    (folder / "more_vidprism.py").write_text("from .all_vidprism import VidPrismModel\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "all_vidprism.VidPrismConfig", "AutoModel": "org/other--model.VidPrismModel"}
    (folder / "config.json").write_text(json.dumps(config))
    push(hub, api.token, folder)
    pushed_once(hub, folder)
    (folder / "more_vidprism.py").unlink()
    assert "it lacks more_vidprism.py;" in failed(hub, api.token, folder)
