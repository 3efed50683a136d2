"""Averaged weights: by hand, in validation, checkpoints, tests and exports; the tower between tuned and base."""

import json
import re
from collections.abc import Iterable
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from small import LABELS, NUM_FRAMES, complaint, run_arguments
from synthetic import random_batches, trainer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vidprism_cli import main
from vidprism_hf import VidPrismForVideoClassification, VidPrismLightningModule
from vidprism_hf.errors import UserError
from vidprism_hf.model import VISION_PRESETS
from vidprism_hf.training.callbacks.averaging import WeightEMA, WiseFT, base_tower, move_towards

TOWER = "vidprism.vision_tower."
DECAY = 0.6


def module(**settings) -> VidPrismLightningModule:
    torch.manual_seed(0)
    settings = {"learning_rate": 1e-2, "backbone_lr_scale": 1.0, "warmup_epochs": 0, "ema_decay": DECAY} | settings
    return VidPrismLightningModule("tiny", id2label=dict(enumerate(LABELS)), num_frames=NUM_FRAMES, **settings)


def weights(model: L.LightningModule) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Steps(L.Callback):
    """The weights after each step of the optimiser, which an average follows."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.steps):
            self.steps.append(weights(pl_module))


def last(folder, **settings) -> ModelCheckpoint:
    """Keeps last.ckpt as a run does."""
    return ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False, **settings)


def averaged(steps: Iterable[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """The average that begins with the weights after the first step."""
    steps = iter(steps)
    mean = next(steps)
    for step in steps:
        mean = {name: decay * mean[name] + (1 - decay) * value for name, value in step.items()}
    return mean


def assert_equal(one: dict, other: dict, **tolerance) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **tolerance, msg=lambda text, name=name: f"{name} {text}")


def fit(folder, model, callbacks, max_epochs=2, accumulate=1, validate=True, **settings) -> L.Trainer:
    run = trainer(
        folder,
        callbacks=callbacks,
        max_epochs=max_epochs,
        enable_checkpointing=True,
        accumulate_grad_batches=accumulate,
    )
    run.fit(model, random_batches(3), random_batches(1, seed=1) if validate else None, **settings)
    return run


class Stop(L.Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("stop")


def test_average_is_validated_kept_and_tested(tmp_path):
    model, record = module(), Steps()
    run = fit(tmp_path, model, [record, last(tmp_path)], accumulate=2)
    assert len(record.steps) == 4  # two an epoch of three batches: one average each, not one a batch
    expected = averaged(record.steps, DECAY)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_equal(kept["state_dict"], expected, rtol=1e-5, atol=1e-7)
    assert_equal(kept["current_model_state"], record.steps[-1], rtol=0, atol=0)
    # What was validated: the loss of the average, not that of the weights in training.
    (batch,) = random_batches(1, seed=1)
    losses = {}
    for name, state in (("average", expected), ("training", record.steps[-1])):
        model.load_state_dict(state)
        with torch.no_grad():
            logits = model.model.eval()(batch["pixel_values_videos"]).logits
        losses[name] = cross_entropy(logits, batch["labels"]).item()
    seen = run.callback_metrics["val/classification_loss"].item()
    assert seen == pytest.approx(losses["average"], abs=1e-5)
    assert abs(losses["training"] - losses["average"]) > 1e-3
    # Lightning's own callback would load the weights in training here.
    run.test(model, random_batches(1), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    assert_equal(weights(model), kept["state_dict"], rtol=0, atol=0)


def test_buffers_are_no_averages(tmp_path):
    """0.9999 n + 0.0001 n, rounded down, is not always n: position indices would be wrong."""
    model = module(ema_decay=0.9999)
    model.configure_model()
    before = [buffer.clone() for buffer in model.buffers()]
    fit(tmp_path, model, [], validate=False)
    assert before
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))


def test_training_goes_on_with_its_own_weights_and_the_average(tmp_path):
    """Stopped and resumed is the same as run at once; and the average does not change what is trained."""
    record = Steps()
    fit(tmp_path, module(), [record, last(tmp_path / "whole")], max_epochs=3)
    without = Steps()
    fit(tmp_path, module(ema_decay=None), [without], max_epochs=3)
    for one, other in zip(record.steps, without.steps, strict=True):
        assert_equal(one, other, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, module(), [last(tmp_path / "halved"), Stop(2)], max_epochs=3)
    fit(
        tmp_path,
        module(),
        [last(tmp_path / "halved")],
        3,
        ckpt_path=tmp_path / "halved" / "last.ckpt",
        weights_only=True,
    )
    whole, halved = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "halved"))
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert_equal(whole[part], halved[part], rtol=0, atol=0)


def test_training_goes_on_without_the_average_from_the_weights_in_training(tmp_path):
    plain, later = Steps(), Steps()
    fit(tmp_path, module(ema_decay=None), [plain], max_epochs=2)
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, module(), [last(tmp_path), Stop(1)], max_epochs=2)
    fit(tmp_path, module(ema_decay=None), [later], 2, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert len(later.steps) == 3
    for one, other in zip(plain.steps[3:], later.steps, strict=True):
        assert_equal(one, other, rtol=0, atol=0)


def test_a_checkpoint_written_during_validation_has_both_in_their_places(tmp_path, monkeypatch):
    def interrupted(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            raise RuntimeError("stop")

    monkeypatch.setattr(VidPrismLightningModule, "validation_step", interrupted)
    record = Steps()
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, module(), [record, last(tmp_path, save_on_exception=True)])
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_equal(kept["current_model_state"], record.steps[-1], rtol=0, atol=0)
    assert_equal(kept["state_dict"], averaged(record.steps, DECAY), rtol=1e-5, atol=1e-7)


def test_refuses_what_cannot_be_averaged():
    run = type("Trainer", (), {"strategy": ModelParallelStrategy()})()
    with pytest.raises(UserError, match=r"model\.ema_decay: .*trainer\.strategy") as caught:
        WeightEMA(0.9).setup(run, module(), "fit")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.99, 1.0])
def test_tower_between_two(alpha):
    torch.manual_seed(0)
    tuned, base = (torch.nn.Linear(5, 4) for _ in range(2))
    expected = {
        name: alpha * tuned.state_dict()[name] + (1 - alpha) * base.state_dict()[name] for name in ("weight", "bias")
    }
    move_towards(tuned, base.state_dict(), 1 - alpha)
    exact = {"rtol": 0, "atol": 0} if alpha in (0, 1) else {"rtol": 1e-6, "atol": 1e-7}
    assert_equal(dict(tuned.state_dict()), expected, **exact)


def test_tower_whose_weights_are_shared_out():
    """As FSDP2 does; in one process here, which has all of them."""
    torch.manual_seed(0)
    tuned, base = (torch.nn.Linear(5, 4) for _ in range(2))
    expected = (tuned.weight + 3 * base.weight).detach() / 4
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(tuned, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        move_towards(tuned, base.state_dict(), 0.75)
        assert isinstance(tuned.weight, DTensor)
        torch.testing.assert_close(tuned.weight.full_tensor(), expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_refuses_a_bad_share(alpha):
    with pytest.raises(UserError, match=r"export\.wise_ft_alpha=.*between 0 and 1"):
        WiseFT(alpha, "b16")


def test_base_of_a_run_from_a_checkpoint_is_that_checkpoints_tower(exported, tmp_path):
    tower = VidPrismForVideoClassification.from_pretrained(exported).vidprism.vision_tower
    assert_equal(base_tower("b16", str(exported)), tower.state_dict(), rtol=0, atol=0)
    WiseFT(0.5, "tiny", str(exported))
    with pytest.raises(UserError, match="cannot be loaded again"):
        base_tower(str(tmp_path))
    with pytest.raises(UserError, match=r"export\.wise_ft_alpha: has no effect on a frozen tower"):
        WiseFT(0.5, "b16").setup(SimpleNamespace(strategy=None), module(freeze_backbone=True), "test")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A tower as small as the preset `tiny`, with weights of its own on disk."""
    folder = tmp_path_factory.mktemp("towers") / "tower"
    torch.manual_seed(7)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION_PRESETS["tiny"]["vision_config"])).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}})
    )
    return folder


def test_a_run_with_all_of_it(pretrained, motion_clips, tmp_path, capsys):
    """What is reported is what is exported: the average of the steps, its tower half way back to the base."""
    run = tmp_path / "run"
    settings = {
        "model.backbone": pretrained,
        "model.learning_rate": 1e-2,
        "model.warmup_epochs": 0,
        "model.reference_batch_size": 2,
        "model.backbone_lr_scale": 1.0,
        "model.layer_decay": 0.5,
        "model.label_smoothing": 0.1,
        "model.ema_decay": 0.5,
        "trainer.accumulate_grad_batches": 2,
        "trainer.gradient_clip_val": 1.0,
        "export.checkpoints": "true",
        "export.wise_ft_alpha": 0.5,
    }
    more = [f"--{name}={value}" for name, value in settings.items()]
    assert main(run_arguments(motion_clips, run, *more)) == 0
    assert "Learning rate: 0.02 = 0.01 x sqrt(8 / 2 clips per step)" in capsys.readouterr().out

    for name in ("last", "best"):
        average = load_file(run / "checkpoints" / name / "model.safetensors")
        kept = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert_equal({f"model.{key}": value for key, value in average.items()}, kept["state_dict"], rtol=0, atol=0)
        if name == "last":  # the best may be of the first step, which is its own average
            assert not torch.equal(average["classifier.weight"], kept["current_model_state"]["model.classifier.weight"])
    exported, base = load_file(run / "export" / "model.safetensors"), base_tower(str(pretrained))
    half = {name: (value + base[name.removeprefix(TOWER)]) / 2 for name, value in average.items() if TOWER in name}
    assert_equal(exported, average | half, rtol=1e-5, atol=1e-7)
    assert any((exported[name] - average[name]).abs().max() > 1e-3 for name in half)

    card = (run / "export" / "README.md").read_text().splitlines()
    for row in (
        "| batch size (clips) | 8 |",
        "| gradient accumulation (batches) | 2 |",
        "| learning rate | 0.02 = 0.01 x sqrt(8 / 2) |",
        "| backbone | learning rate x 1.0, x 0.5 for each layer below the top |",
        "| label smoothing | 0.1 |",
        "| gradient clipping | 1.0 |",
        "| weight averaging | exponential moving, decay 0.5 |",
        "| weight-space ensembling | tower: 0.5 x tuned + 0.5 x start (WiSE-FT) |",
    ):
        assert row in card
    # A kept checkpoint is exported as it was validated, without the ensembling.
    assert "WiSE-FT" not in (run / "checkpoints" / "best" / "README.md").read_text()

    capsys.readouterr()
    assert main(["evaluate", str(run / "export"), "--config", str(run / "config.yaml")]) == 0
    found = float(re.search(r"^ top1 +(\S+)", capsys.readouterr().out, flags=re.MULTILINE)[1])
    assert found == pytest.approx(json.loads((run / "metrics.json").read_text())["top1"], abs=1e-4)


def test_refuses_random_weights_as_a_base(motion_clips, tmp_path, capsys):
    assert main(run_arguments(motion_clips, tmp_path / "run", "--export.wise_ft_alpha=0.99")) == 1
    assert "export.wise_ft_alpha: model.backbone tiny has random weights" in complaint(capsys)
    assert not (tmp_path / "run").exists()
