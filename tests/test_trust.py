"""Other people's models and recipes: nothing of theirs is run, and each is refused or loaded in one line."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from small import complaint, run_arguments, tiny_export

import vidprism_hf
from vidprism_cli import main
from vidprism_hf.cli.trust import OPTION

PACKAGE = Path(vidprism_hf.__file__).parent
MODULE = "stranger_vidprism"  # as the code files of an export are called
CLASSES = ("Config", "Model", "Classifier", "Processor")
FOREIGN = {
    "a class": {"callbacks": [{"class_path": "stranger_module.Evil"}]},
    "a class by its path alone": {"callbacks": "stranger_module.Evil"},
    "a logger": {"logger": {"class_path": "stranger_module.Evil"}},
    "a strategy": {"strategy": {"class_path": "stranger_module.Evil"}},
    "a plugin": {"plugins": ["stranger_module.Evil"]},
    "a profiler": {"profiler": {"class_path": "stranger_module.Evil"}},
    "a function": {
        "callbacks": [{"class_path": "BackboneFinetuning", "init_args": {"lambda_func": "stranger_module.f"}}]
    },
    "a function of the system": {
        "callbacks": [{"class_path": "BackboneFinetuning", "init_args": {"lambda_func": "os.system"}}]
    },
    "a function that Lightning imports": {
        "callbacks": [
            {
                "class_path": "BackboneFinetuning",
                "init_args": {"lambda_func": "lightning.pytorch.callbacks.model_checkpoint.shutil.rmtree"},
            }
        ]
    },
    "functions of others": {
        "callbacks": [{"class_path": "LambdaCallback", "init_args": {"on_fit_start": "stranger_module.f"}}]
    },
    "a class in an argument": {
        "callbacks": [
            {"class_path": "BackboneFinetuning", "init_args": {"lambda_func": {"class_path": "stranger_module.Evil"}}}
        ]
    },
    "a server": {"callbacks": [{"class_path": "lightning.pytorch.serve.ServableModuleValidator"}]},
    "a logger that sends": {"logger": {"class_path": "lightning.pytorch.loggers.WandbLogger"}},
}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n"
    for below, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
UNBOUNDED = {
    "aliases of aliases": BOMB,
    "merges of merges": BOMB.replace("[x, x, x, x, x, x, x, x, x]", "{k: v}")
    .replace(" [*", " {<<: [*")
    .replace("]", "]}"),
    "an alias of itself": "a: &a [*a]\n",
    "brackets": "output: " + "[" * 10_000 + "]" * 10_000,
    "indents": "".join(" " * depth + "a:\n" for depth in range(1200)),
    "size": "output: " + "x" * 3_000_000,
    "keys": "".join(f"key{number}: 1\n" for number in range(60_000)),
    "a number": f"seed_everything: {'9' * 10_000}\n",
    "a Python object": "output: !!python/object/apply:os.system ['touch ran']\n",
    "bytes": bytes(range(256)),
    "UTF-16": "output: run\n".encode("utf-16-le"),
    "nothing": "",
}


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """What the code of strangers makes where it runs: a file."""
    (tmp_path / "path").mkdir()
    code = f"from pathlib import Path\nPath({str(tmp_path / 'MARKER')!r}).touch()\n"
    callback = "from lightning.pytorch.callbacks import Callback\nclass Evil(Callback): pass\ndef f(*_): pass\n"
    (tmp_path / "path" / "stranger_module.py").write_text(code + callback)
    (tmp_path / "path" / f"{MODULE}.py").write_text(code + "".join(f"class {name}: pass\n" for name in CLASSES))
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    yield tmp_path / "MARKER"
    sys.modules.pop("stranger_module", None)


def refused(arguments, capsys) -> str:
    """The one line in which a verb refuses."""
    assert main(arguments) == 1
    return complaint(capsys)


class Reduced:
    """Pickled, it is a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def strangers_model(folder: Path, marker: Path, model_type: str) -> Path:
    """A model whose configurations name code for each Auto class, with that code and pickles beside."""
    names = dict(
        zip(CLASSES, ("AutoConfig", "AutoModelForVideoClassification", "AutoModel", "AutoVideoProcessor"), strict=True)
    )
    auto_map = {auto: f"{MODULE}.{name}" for name, auto in names.items()} | {
        "AutoImageProcessor": f"{MODULE}.Processor"
    }
    if model_type == "vidprism":
        tiny_export(folder)
    folder.mkdir(exist_ok=True)
    shutil.copy(marker.with_name("path") / f"{MODULE}.py", folder)
    (folder / "labels.txt").write_text("growing\nshrinking\n")
    for name in ("config", "video_preprocessor_config", "preprocessor_config", "processor_config"):
        file = folder / f"{name}.json"
        content = json.loads(file.read_text()) if file.exists() else {"model_type": model_type}
        kinds = (
            {}
            if model_type == "vidprism"
            else {"video_processor_type": "Processor", "image_processor_type": "Processor"}
        )
        file.write_text(json.dumps(content | kinds | {"auto_map": auto_map}))
    if model_type != "vidprism":
        for name in ("pytorch_model.bin", "last.ckpt", "adapter_model.bin"):
            (folder / name).write_bytes(pickle.dumps(Reduced(marker)))
    return folder


def walk(folder: Path, clips: Path, out: Path) -> dict[str, list[str]]:
    """Every verb, on a model's folder wherever it takes one."""
    run, clip = run_arguments(clips, out / "run"), str(clips / "val" / "growing" / "0.mp4")
    data = [f"--data.source={clips}", "--data.num_workers=0", "--trainer.accelerator=cpu", "--model.num_frames=8"]
    return {
        "backbone": [*run, f"--model.backbone={folder}"],
        "checkpoint": [*run, f"--model.checkpoint={folder}"],
        "resume": [*run, f"--resume={folder / 'last.ckpt'}"],
        "splits": ["splits", *run[1:], "--splits", "1", f"--output={out / 'splits'}", f"--model.backbone={folder}"],
        "ablate": [
            *("ablate", *data, f"--output={out / 'ablation'}", f"--data.feature_cache={out / 'features'}"),
            *(
                "--data.train_views=1",
                "--model.freeze_backbone=true",
                f"--model.backbone={folder}",
                "--trainer.max_epochs=1",
            ),
        ],
        "evaluate": ["evaluate", str(folder), *data],
        "predict": ["predict", str(folder), clip],
        "push": ["push", str(folder), "--repo", "alice/m"],
        "convert": [
            "convert",
            str(folder / "pytorch_model.bin"),
            str(out / "converted"),
            "--num-frames=8",
            f"--labels={folder / 'labels.txt'}",
        ],
        "data check": ["data", "check", str(clips), "--processor", str(folder), "--workers", "1"],
        "data show": ["data", "show", str(clips), "--processor", str(folder), "--output", str(out / "sheet.png")],
    }


@pytest.fixture
def yes(monkeypatch):
    """Answers y, for ever, and keeps the Hub out."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("yes")
@pytest.mark.parametrize("model_type", ["stranger", "clip", "videomae"])
def test_no_verb_runs_or_offers_the_code_of_a_folder(marker, motion_clips, tmp_path, capsys, model_type):
    folder = strangers_model(tmp_path / "model", marker, model_type)
    for name, words in walk(folder, motion_clips, tmp_path / "out").items():
        if name == "splits":  # it starts a process: below
            continue
        status, said = main(words), capsys.readouterr()
        assert not marker.exists(), name
        assert "[y/N]" not in said.out + said.err, name
        if name not in ("data check", "data show"):  # which ask the processor for a size at most
            assert status == 1, name
            assert said.err.splitlines()[-1].startswith("vidprism "), (name, said.err)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["predict", "splits"])
def test_a_pipe_of_yes_runs_nothing(marker, motion_clips, tmp_path, name):
    words = walk(strangers_model(tmp_path / "model", marker, "stranger"), motion_clips, tmp_path / "out")[name]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PACKAGE.parent)}
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as yes:
        command = [sys.executable, "-m", "vidprism_hf", *words]
        done = subprocess.run(command, stdin=yes.stdout, capture_output=True, text=True, env=env)
        yes.kill()
    assert not marker.exists()
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("vidprism ")


@pytest.mark.slow
def test_an_export_is_loaded_by_the_package_and_not_by_its_own_code(marker, motion_clips, tmp_path, capsys):
    folder = strangers_model(tmp_path / "model", marker, "vidprism")
    for file in folder.glob("*_vidprism.py"):
        file.write_text((marker.with_name("path") / f"{MODULE}.py").read_text())
    words = walk(folder, motion_clips, tmp_path / "out")
    for name in ("checkpoint", "evaluate", "predict"):
        assert main(words[name]) == 0, capsys.readouterr().err
    assert not marker.exists()


def calls_outside_the_model():
    """Every call in the package; the files of model/ travel to the Hub, where their caller says what is trusted."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())) if file.parent.name != "model" else ():
            if isinstance(node, ast.Call):
                yield f"{file.name}:{node.lineno}", node, {word.arg: ast.unparse(word.value) for word in node.keywords}


def test_every_load_of_the_package_says_that_no_code_is_trusted():
    trusting = []
    for place, call, given in calls_outside_the_model():
        name = ast.unparse(call.func)
        if name.rpartition(".")[2] in ("from_pretrained", "pipeline") and given.get("trust_remote_code") != "False":
            trusting.append(place)
        if name == "torch.load" and "weights_only" not in given:
            trusting.append(place)
    assert trusting == []


@pytest.fixture
def recipe(tmp_path, motion_clips):
    """Writes a recipe; returns the arguments of a verb that runs it."""

    def write(content, verb="finetune") -> list[str]:
        file = tmp_path / "recipe.yaml"
        if not isinstance(content, str | bytes):
            content = yaml.safe_dump(content)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        arguments = run_arguments(motion_clips, tmp_path / "run", "--trainer.max_epochs=1")
        return [*verb.split(), "--config", str(file), *arguments[1:]]

    return write


@pytest.mark.parametrize("trainer", FOREIGN.values(), ids=FOREIGN)
def test_a_recipe_that_names_foreign_code_is_refused(marker, recipe, tmp_path, capsys, trainer):
    said = refused(recipe({"trainer": trainer}), capsys)
    assert f"trainer.{next(iter(trainer))}: names " in said
    assert said.endswith(f"add {OPTION}")
    assert not marker.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"class_path": "stranger_module.Evil"}},
        {"model": {"config": {"readout": {"class_path": "stranger_module.Evil"}}}},
        {"trainer": {"strategy": "stranger_module.Evil"}},
        {"trainer.callbacks": [{"class_path": "stranger_module.Evil"}]},
        {"trust_recipe": True, "trainer": {"callbacks": "stranger_module.Evil"}},
        {"trust-recipe": True},
        {OPTION: True},
        {"data": "other.yaml"},
        {"trainer": "other.yaml"},
        {"trainer": {"callbacks": "other.yaml"}},
        {"model": {"config": "other.yaml"}},
        {"config": "other.yaml"},
    ],
    ids=str,
)
def test_a_recipe_has_no_other_way_to_code_or_files(marker, recipe, tmp_path, monkeypatch, capsys, content):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("other.yaml")  # whoever reads it waits for ever
    refused(recipe(content), capsys)
    assert not marker.exists()


@pytest.mark.parametrize("verb", ["ablate", "evaluate MODEL"])
def test_other_verbs_refuse_foreign_code_too(marker, recipe, exported, capsys, verb):
    arguments = recipe({"trainer": FOREIGN["a class"]}, verb.replace("MODEL", str(exported)))
    assert "trainer.callbacks: names stranger_module.Evil" in refused(arguments, capsys)
    assert not marker.exists()


@pytest.mark.slow
def test_splits_hands_the_trust_on(marker, recipe, capfd):
    arguments = [*recipe({"trainer": FOREIGN["a class"]}, "splits"), "--splits", "1"]
    env = {"PYTHONPATH": f"{PACKAGE.parent}:{marker.with_name('path')}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", env["PYTHONPATH"])
        assert main(arguments) == 1
        assert "names stranger_module.Evil" in capfd.readouterr().err
        assert not marker.exists()
        main([*arguments, OPTION])
    assert marker.exists()


@pytest.mark.slow
def test_a_trusted_recipe_may_name_any_class(marker, recipe, tmp_path, capsys):
    arguments = recipe({"trainer": FOREIGN["a class"]})
    assert main([*arguments, OPTION]) == 0
    assert marker.exists()
    published = yaml.safe_load((tmp_path / "run" / "export" / "recipe.yaml").read_text())
    assert "callbacks" not in published["trainer"]  # whoever has the export can run it without trust
    # The trust ends with the command.
    assert "names stranger_module.Evil" in refused(arguments, capsys)


@pytest.mark.slow
def test_the_recipe_of_an_export_runs_without_trust(recipe, motion_clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the logger writes below the present folder
    stop = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/top1"}}
    log = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "elsewhere")}}
    assert main([*recipe({"trainer": {"callbacks": [stop], "logger": log}}), OPTION]) == 0
    published = tmp_path / "run" / "export" / "recipe.yaml"
    (callback,) = yaml.safe_load(published.read_text())["trainer"]["callbacks"]
    assert callback["class_path"].endswith("EarlyStopping")
    again = ["finetune", "--config", str(published), f"--data.source={motion_clips}", f"--output={tmp_path / 'again'}"]
    assert main(again) == 0


def test_a_recipe_does_not_publish_with_the_token_of_whoever_runs_it(motion_clips, tmp_path, capsys):
    push = {"class_path": "vidprism_hf.training.callbacks.push.PushToHub", "init_args": {"repo": "stranger/theirs"}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"trainer": {"callbacks": [push]}}))
    assert main(["finetune", f"--config={recipe}", *run_arguments(motion_clips, tmp_path / "run")[1:]]) == 1
    assert "the recipe publishes with your token (PushToHub, repo stranger/theirs)" in complaint(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "trainer",
    [
        {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "/tmp/elsewhere"}}]},
        {"callbacks": {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "~/elsewhere"}}},
        {"logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": "logs/../../elsewhere"}}]},
        {"logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": "logs\n/../../../elsewhere"}}]},
        {"logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "simplecache::file:///elsewhere"}}},
        {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"filename": "{step:c}{step:c}/elsewhere"}}]},
        {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"filename": "{epoch.__class__}"}}]},
        {"logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "s3://bucket"}}},
        {"profiler": {"class_path": "SimpleProfiler", "init_args": {"dirpath": ".."}}},
    ],
    ids=str,
)
def test_a_class_of_a_recipe_writes_nowhere_else(recipe, tmp_path, capsys, trainer):
    assert "is outside the run's folder" in refused(recipe({"trainer": trainer}), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", UNBOUNDED.values(), ids=UNBOUNDED)
@pytest.mark.parametrize("verb", ["finetune", "splits", "ablate", "data check"])
def test_a_recipe_out_of_bounds_is_one_line(recipe, tmp_path, capsys, verb, text):
    arguments = recipe(text, verb)
    if verb == "splits":
        arguments = [word for word in arguments if not word.startswith("--output")]
    assert str(tmp_path / "recipe.yaml") in refused(arguments[:4] if verb == "data check" else arguments, capsys)
    assert not (tmp_path / "run").exists()


def test_a_pipe_for_a_recipe_is_refused(recipe, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    arguments = recipe({})
    arguments[arguments.index("--config") + 1] = str(tmp_path / "pipe")
    assert "pipe: is not a file" in refused(arguments, capsys)
    assert "pipe: is not a file" in refused(["data", "check", "--config", str(tmp_path / "pipe")], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("text", [UNBOUNDED["aliases of aliases"], UNBOUNDED["brackets"]], ids=["aliases", "brackets"])
def test_a_card_or_a_runs_settings_out_of_bounds_do_no_harm(motion_clips, tmp_path, capsys, text):
    export = tiny_export(tmp_path / "model")
    (export / "README.md").write_text(f"---\n{text}\n---\n")
    assert (
        main(run_arguments(motion_clips, tmp_path / "run", f"--model.checkpoint={export}", "--trainer.max_epochs=1"))
        == 0
    )
    (tmp_path / "run" / "metrics.json").unlink()  # as if it had been stopped
    (tmp_path / "run" / "config.yaml").write_text(text)
    assert "config.yaml" in refused(run_arguments(motion_clips, tmp_path / "run"), capsys)


def test_help_says_what_a_recipe_may_do(capsys):
    for verb in ("finetune", "splits", "ablate", "evaluate"):
        with suppress(SystemExit):
            main([verb, "--help"])
        assert OPTION in capsys.readouterr().out, verb
