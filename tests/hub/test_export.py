"""The layout of an exported model, and that it is written whole or not at all."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from file_modes import modes, umask
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file
from small import LABELS, NUM_FRAMES, card_facts, files_of, tiny_export, tiny_model, tiny_processor
from transformers import pipeline

from vidprism_hf import VidPrismForVideoClassification, VidPrismVideoProcessor
from vidprism_hf.hub import export, export_model, render_card
from vidprism_hf.hub.export import ExportError
from vidprism_hf.workers import CONTEXT

CODE = {
    "configuration_vidprism.py",
    "modeling_vidprism.py",
    "outputs_vidprism.py",
    "temporal_vidprism.py",
    "tower_vidprism.py",
    "video_decoding_vidprism.py",
    "video_packets_vidprism.py",
    "video_processing_vidprism.py",
}


def card():
    return render_card(card_facts())


def test_layout(exported):
    assert set(files_of(exported)) == CODE | {
        "README.md",
        "config.json",
        "model.safetensors",
        "video_preprocessor_config.json",
    }
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["VidPrismForVideoClassification"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_vidprism.VidPrismConfig",
        "AutoModel": "modeling_vidprism.VidPrismModel",
        "AutoModelForVideoClassification": "modeling_vidprism.VidPrismForVideoClassification",
        "AutoVideoProcessor": "video_processing_vidprism.VidPrismVideoProcessor",
    }
    assert config["id2label"] == {str(index): label for index, label in enumerate(LABELS)}
    assert config["label2id"] == {label: index for index, label in enumerate(LABELS)}
    assert config["num_frames"] == NUM_FRAMES
    assert config["model_type"] == "vidprism"
    processor = json.loads((exported / "video_preprocessor_config.json").read_text())
    assert processor["auto_map"] == {"AutoVideoProcessor": "video_processing_vidprism.VidPrismVideoProcessor"}
    assert processor["num_frames"] == NUM_FRAMES
    assert exported.stat().st_mode & 0o777 == 0o755


def test_code_files_are_those_of_the_package(exported):
    import vidprism_hf.model

    for name in CODE:
        source = f"{vidprism_hf.model.__path__[0]}/{name}"
        with open(source) as file:
            assert (exported / name).read_text() == file.read()


def test_weights_have_the_names_of_the_model(exported):
    written, model = load_file(exported / "model.safetensors"), tiny_model().state_dict()
    assert written.keys() == model.keys()
    assert all(torch.equal(written[name], model[name]) for name in model)


def test_round_trip(exported, tmp_path):
    model = VidPrismForVideoClassification.from_pretrained(exported)
    processor = VidPrismVideoProcessor.from_pretrained(exported)
    pixels = torch.randn(1, NUM_FRAMES, 3, 32, 32)
    torch.testing.assert_close(model(pixels).logits, tiny_model()(pixels).logits, atol=1e-6, rtol=0)
    clip = torch.randint(0, 255, (20, 3, 40, 50), dtype=torch.uint8)
    ours, theirs = (each(clip, return_tensors="pt")["pixel_values_videos"] for each in (processor, tiny_processor()))
    assert torch.equal(ours, theirs)
    # Loaded and exported again: the same files, though transformers renames keys of CLIP's on its own accord.
    again = export_model(model, processor, tmp_path / "again", card())
    weights = load_file(again / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    first, second = files_of(exported), files_of(again)
    assert first.keys() == second.keys()
    assert [name for name in CODE if first[name] != second[name]] == []


def test_processor_takes_the_frames_of_the_model(tmp_path):
    folder = export_model(tiny_model(num_frames=12), tiny_processor(), tmp_path / "model", card())
    assert VidPrismVideoProcessor.from_pretrained(folder).num_frames == 12


def test_new_export_replaces_the_old_one(tmp_path):
    folder = tiny_export(tmp_path / "model")
    (folder / "left_over_vidprism.py").write_text("from an older version")
    (folder / "model-00001-of-00002.safetensors").write_text("a shard")
    tiny_export(folder, labels=("a", "b", "c"))
    assert VidPrismForVideoClassification.from_pretrained(folder).config.num_labels == 3
    assert not (folder / "left_over_vidprism.py").exists()
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


FULL_DISK = "No space left on device"


@pytest.mark.parametrize(
    "error", [RuntimeError("lost"), OSError(28, FULL_DISK), SafetensorError(f"I/O error: {FULL_DISK}")]
)
def test_nothing_changes_when_saving_fails(tmp_path, monkeypatch, error):
    folder = tiny_export(tmp_path / "model")
    before = files_of(tmp_path)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(VidPrismVideoProcessor, "save_pretrained", fail)  # the weights are written by then
    expected = RuntimeError if isinstance(error, RuntimeError) else ExportError
    with pytest.raises(expected, match=r"No space left|lost"):
        tiny_export(folder, labels=("a", "b", "c"))
    assert files_of(tmp_path) == before
    with pytest.raises(expected):
        tiny_export(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("loss", ["dropped", "altered", "narrowed"])
def test_weights_that_were_not_written_right_are_noticed(tmp_path, monkeypatch, loss):
    def save_wrong(state, folder, **settings):
        wrong = dict(state)
        name = "classifier.weight"
        if loss == "dropped":
            del wrong[name]
        else:
            wrong[name] = wrong[name] + 1e-3 if loss == "altered" else wrong[name].half()
        original(wrong, folder, **settings)

    original = export.save_torch_state_dict
    monkeypatch.setattr(export, "save_torch_state_dict", save_wrong)
    with pytest.raises(ExportError, match=r"1 of \d+ tensors were not written right: classifier\.weight"):
        tiny_export(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def partial(state):
    del state["vidprism.temporal_model.readout.query"]
    return "readout.query"


def empty(state):
    state.clear()
    return "gathered from all processes"


def diverged(state):
    state["classifier.bias"] = torch.full_like(state["classifier.bias"], torch.nan)
    return "classifier.bias: holds values that are not finite"


def foreign(state):
    state["optimizer.step"] = torch.zeros(())
    return "optimizer.step"


@pytest.mark.parametrize("spoil", [partial, empty, diverged, foreign])
def test_weights_that_are_no_whole_model_are_an_error(tmp_path, spoil):
    model = tiny_model()
    state = dict(model.state_dict())
    reason = spoil(state)
    with pytest.raises(ExportError, match=reason):
        export_model(model, tiny_processor(), tmp_path / "model", card(), state_dict=state)
    assert list(tmp_path.iterdir()) == []


def test_gathered_weights_give_the_bytes_of_the_models_own(exported, tmp_path):
    """Whatever the order in which a strategy gathers them, and the class that it wraps the model in."""

    class FSDPVidPrismForVideoClassification(VidPrismForVideoClassification):
        pass

    state = tiny_model().state_dict()
    gathered = {name: state[name].clone() for name in sorted(state, reverse=True)}
    sharded = FSDPVidPrismForVideoClassification(tiny_model().config)
    folder = export_model(sharded, tiny_processor(), tmp_path / "model", card(), state_dict=gathered)
    assert files_of(folder) == files_of(exported)


def test_leaves_model_and_random_numbers_as_they_are(tmp_path):
    model = tiny_model()
    before, config = torch.get_rng_state(), model.config.to_dict()
    export_model(model, tiny_processor(), tmp_path / "model", card(), dtype="bfloat16")
    assert torch.equal(torch.get_rng_state(), before)
    assert model.config.to_dict() == config
    assert model.dtype == torch.float32


def test_shards(tmp_path):
    model = tiny_model()
    folder = export_model(model, tiny_processor(), tmp_path / "model", card(), max_shard_size="300KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert (folder / "model.safetensors.index.json").is_file()
    loaded = VidPrismForVideoClassification.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    # One file again: no shard stays.
    assert [path.name for path in tiny_export(folder).glob("model*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_precision(tmp_path, motion_clips, dtype):
    folder = export_model(tiny_model(), tiny_processor(), tmp_path / "model", card(), dtype=dtype)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    assert {str(tensor.dtype) for tensor in load_file(folder / "model.safetensors").values()} == {f"torch.{dtype}"}
    clip = str(motion_clips / "val" / "growing" / "0.mp4")
    (best, _) = pipeline("video-classification", model=str(folder))(clip)
    (expected, _) = pipeline("video-classification", model=str(tiny_export(tmp_path / "full")))(clip)
    assert best["score"] == pytest.approx(expected["score"], abs=1e-6 if dtype == "float32" else 0.02)


def test_weights_too_large_for_half_precision_are_an_error(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.classifier.bias[0] = 1e5
    with pytest.raises(ExportError, match=r"classifier\.bias: holds values that are not finite as torch\.float16"):
        export_model(model, tiny_processor(), tmp_path / "model", card(), dtype="float16")
    assert list(tmp_path.iterdir()) == []


MORE = {
    "figures/curves.png": b"a picture",
    "recipe.yaml": b"output: run\n",
    "split.json": b"{}\n",
    "train_clips.txt": b"a.mp4\t0\n",
    ".eval_results/org--name.yaml": b"[]\n",
}


def test_further_files(tmp_path):
    folder = export_model(tiny_model(), tiny_processor(), tmp_path / "model", card(), files=MORE)
    written = files_of(folder)
    assert {name: written[name] for name in MORE} == MORE
    assert not MORE.keys() & files_of(tiny_export(folder)).keys()  # of the export that was replaced
    with pytest.raises(ValueError, match="thesis"):
        export_model(tiny_model(), tiny_processor(), folder, card(), files={"thesis.tex": b""})
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["figures/thesis.tex", "figures/more/a.png", "notes/a.png", ".eval_results/notes"])
def test_refuses_other_content_in_folders(tmp_path, name):
    folder = export_model(tiny_model(), tiny_processor(), tmp_path / "model", card(), files=MORE)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    before = files_of(tmp_path)
    with pytest.raises(ExportError, match="exists and is not an exported model"):
        tiny_export(folder)
    assert files_of(tmp_path) == before


def test_keeps_what_a_person_wrote_in_the_readme(tmp_path):
    folder = tiny_export(tmp_path / "model")
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("license: unknown", "license: mit") + "\nAsk me anything.\n")
    tiny_export(folder, labels=("a", "b", "c"))
    text = readme.read_text()
    assert "license: mit" in text
    assert text.endswith("\nAsk me anything.\n")
    assert "knows 3 classes" in text
    assert "knows 2 classes" not in text
    readme.write_text("My own words.")
    tiny_export(folder)
    assert readme.read_text() == "My own words."


def test_a_stated_licence_is_written_anew(tmp_path):
    def license_of(folder, license):
        card = render_card(card_facts(license=license))
        return ModelCard.load(export_model(tiny_model(), tiny_processor(), folder, card) / "README.md").data.license

    folder = tmp_path / "model"
    stated = [license_of(folder, license) for license in (None, "mit", None, "apache-2.0")]
    assert stated == ["unknown", "mit", "mit", "apache-2.0"]
    mine = "---\nlicense: gpl-3.0\n---\nMy own words.\n"
    (folder / "README.md").write_text(mine)
    license_of(folder, "mit")
    assert (folder / "README.md").read_text() == mine


ON_FULL_DISK = """
import sys
from pathlib import Path
from small import files_of, tiny_export
from vidprism_hf.hub.export import ExportError

disk = Path(sys.argv[1])
tiny_export(disk / "model")
before = files_of(disk)
try:
    tiny_export(disk / "model", labels=("a", "b", "c"))
except ExportError as error:
    print(error)
print(files_of(disk) == before)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_export_whole(tmp_path):
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    small_disk = f"mount -t tmpfs -o size=1600k tmpfs {shlex.quote(str(tmp_path))}"  # room for one export
    if shutil.which("unshare") is None or subprocess.run([*mount, small_disk], capture_output=True).returncode:
        pytest.skip("needs leave to mount a small disk")
    script = shlex.join([sys.executable, "-c", ON_FULL_DISK, str(tmp_path)])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run([*mount, f"{small_disk} && exec {script}"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    error, same = done.stdout.splitlines()
    assert error.startswith(f"{tmp_path / 'model'}: cannot be written (")
    assert FULL_DISK in error
    assert same == "True"


def test_refuses_a_folder_of_something_else(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists and is not an exported model"):
        tiny_export(folder)
    assert files_of(tmp_path) == {"model/notes.txt": b"mine"}


def foreign_file(folder):
    (folder / "thesis.tex").write_text("years of work")
    return "it holds 'thesis.tex'"


def foreign_folder(folder):
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    (folder / "README.md" / "notes.txt").write_text("mine")
    return "it holds 'README.md'"


def other_model(folder):
    (folder / "config.json").write_text('{"model_type": "videomae"}')
    return "it has no config.json of a VidPrism"


def broken_config(folder):
    (folder / "config.json").write_text("[]")
    return "it has no config.json of a VidPrism"


@pytest.mark.parametrize("spoil", [foreign_file, foreign_folder, other_model, broken_config])
def test_replaces_only_what_is_an_export_and_nothing_else(tmp_path, spoil):
    folder = tiny_export(tmp_path / "model")
    reason = spoil(folder)
    before = files_of(tmp_path)
    with pytest.raises(ExportError) as caught:
        tiny_export(folder)
    assert str(caught.value) == (
        f"{folder}: exists and is not an exported model ({reason}); choose another folder, or move that away"
    )
    assert files_of(tmp_path) == before


def test_a_file_that_comes_while_writing_stays(tmp_path, monkeypatch):
    def save_slowly(*args, **kwargs):
        (folder / "notes.txt").write_text("mine")
        return original(*args, **kwargs)

    folder = tiny_export(tmp_path / "model")
    original = VidPrismVideoProcessor.save_pretrained
    monkeypatch.setattr(VidPrismVideoProcessor, "save_pretrained", save_slowly)
    with pytest.raises(ExportError, match=r"it holds 'notes\.txt'"):
        tiny_export(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_old_export_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    def rename(path, target):
        calls.append(path)
        if len(calls) == 2:  # the first moved the old export aside
            raise PermissionError(13, "Permission denied")
        return original(path, target)

    folder = tiny_export(tmp_path / "model")
    before, calls, original = files_of(tmp_path), [], Path.rename
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ExportError, match="Permission denied"):
        tiny_export(folder, labels=("a", "b", "c"))
    assert files_of(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def killed(folder: Path, new: Path, call: str, number: int) -> bool:
    """Whether a process that replaces an export by another one was killed right before its n-th such call.

    As SIGKILL does it: nothing of the process runs any more.
    """
    child = CONTEXT.Process(target=replace_and_die, args=(folder, new, call, number))
    child.start()
    child.join()
    return child.exitcode == 9


def replace_and_die(folder: Path, new: Path, call: str, number: int) -> None:
    original, calls = getattr(os, call), []

    def kill(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            os._exit(9)
        return original(*args, **kwargs)

    setattr(os, call, kill)
    try:
        with export.written_beside(folder) as partial:
            shutil.copytree(new, partial, dirs_exist_ok=True)
    finally:
        os._exit(0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("call", ["rename", "rmdir"])
def test_a_killed_process_leaves_the_old_export_or_the_new_one(exported, tmp_path, call):
    new = tiny_export(tmp_path / "new", labels=("a", "b", "c"))
    old_files, new_files = files_of(exported), files_of(new)
    stood = []
    for number in range(1, 100):
        place = tmp_path / str(number) / "model"
        shutil.copytree(exported, place)
        if not killed(place, new, call, number):
            break
        stood.append(place.exists())
        export.recover_export(place)
        assert files_of(place) in (old_files, new_files), number
        # Another export has nothing left to find, and leaves nothing that could come back.
        with export.written_beside(place) as partial:
            shutil.copytree(new, partial, dirs_exist_ok=True)
        assert files_of(place) == new_files
        assert not list(place.parent.glob(".*-replaced"))
        shutil.rmtree(place)
        export.recover_export(place)
        assert not place.exists()
    assert len(stood) > 0
    assert stood.count(False) == (call == "rename")  # between the two


def test_content_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename

    def note(handle):
        events.append(os.fstat(handle).st_ino)
        fsync(handle)

    def note_renaming(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", note_renaming)
    folder = tiny_export(tmp_path / "model")
    synced = events[: events.index("rename")]
    assert {path.stat().st_ino for path in (folder, *folder.rglob("*"))} <= set(synced)
    assert tmp_path.stat().st_ino in events[events.index("rename") :]


def aside(folder: Path, letter: str = "a") -> Path:
    """Moves an export where a process that was killed leaves it."""
    return folder.rename(folder.with_name(f".{folder.name}-{letter * 8}-replaced"))


def test_an_export_that_was_left_aside_comes_back(tmp_path):
    for name, labels in (("model", ("a", "b", "c")), ("model-2", LABELS)):
        aside(tiny_export(tmp_path / name, labels))
    (tmp_path / "model").mkdir()  # as whoever looks for it may do
    export.recover_export(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model-2-aaaaaaaa-replaced", "model"]
    assert VidPrismForVideoClassification.from_pretrained(tmp_path / "model").config.num_labels == 3
    export.recover_export(tmp_path / "nowhere" / "model")
    assert not (tmp_path / "nowhere").exists()


def test_an_export_takes_up_the_readme_of_the_one_left_aside(tmp_path):
    folder = tiny_export(tmp_path / "model")
    readme = folder / "README.md"
    readme.write_text(readme.read_text() + "\nAsk me anything.\n")
    aside(folder)
    tiny_export(folder, labels=("a", "b", "c"))
    assert readme.read_text().endswith("\nAsk me anything.\n")
    assert "knows 3 classes" in readme.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_left_aside_stays_where_something_else_took_its_place(tmp_path):
    before = files_of(aside(tiny_export(tmp_path / "model")))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"it holds 'notes\.txt'"):
        tiny_export(tmp_path / "model")
    assert files_of(tmp_path / ".model-aaaaaaaa-replaced") == before


def test_remains_of_the_old_export_are_no_failure(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    folder = tiny_export(tmp_path / "model")
    monkeypatch.setattr(os, "unlink", refuse)  # by which shutil.rmtree removes files
    tiny_export(folder, labels=("a", "b", "c"))
    assert VidPrismForVideoClassification.from_pretrained(folder).config.num_labels == 3


def test_fills_an_empty_folder(tmp_path):
    (tmp_path / "model").mkdir()
    assert (tiny_export(tmp_path / "model") / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["file", "file/model", "file/deep/model"])
def test_unwritable(tmp_path, name):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ExportError) as caught:
        tiny_export(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert len(str(caught.value).splitlines()) == 1
    assert files_of(tmp_path) == {"file": b"no folder"}


@pytest.mark.parametrize(("mask", "size"), [(0o002, "5GB"), (0o027, "100KB")])
def test_an_export_has_the_modes_of_new_files(tmp_path, mask, size):
    with umask(mask):
        files = {"figures/curves.png": b"png"}
        folder = export_model(tiny_model(), tiny_processor(), tmp_path / "a", card(), max_shard_size=size, files=files)
    found = modes(folder)
    assert any(name.endswith(".safetensors") for name in found)
    assert found == {name: (0o777 if name in ("", "figures") else 0o666) & ~mask for name in found}


def test_a_pipe_is_no_file_of_an_export(tmp_path):
    folder = tiny_export(tmp_path / "export")
    (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")
    with pytest.raises(ExportError, match=r"exists and is not an exported model \(it holds 'README\.md'\)"):
        tiny_export(folder)
