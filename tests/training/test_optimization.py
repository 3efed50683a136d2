"""Parameter groups, and the learning rate of a real run step by step."""

import lightning as L
import pytest
from small import LABELS, NUM_FRAMES, tiny_model
from synthetic import random_batches, trainer

from vidprism_hf import VidPrismLightningModule
from vidprism_hf.training.optimization import parameter_groups

TOWER = "vidprism.vision_tower."


def groups_of(model, learning_rate=1e-3, backbone_lr_scale=0.06, weight_decay=0.2):
    """The groups, and the settings of each parameter by name."""
    groups = parameter_groups(model, learning_rate, backbone_lr_scale, weight_decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    settings = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    return groups, settings


def test_every_parameter_exactly_once():
    model = tiny_model(time_position="learned")
    groups, _ = groups_of(model)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert {group["name"] for group in groups} == {"backbone_no_decay", "backbone", "head", "head_no_decay"}


def test_learning_rates():
    _, settings = groups_of(tiny_model())
    for name, (rate, _) in settings.items():
        assert rate == pytest.approx(6e-5 if name.startswith(TOWER) else 1e-3), name


def test_weight_decay():
    _, settings = groups_of(tiny_model())
    for name, (_, decay) in settings.items():
        spared = name.endswith(".bias") or "norm" in name or "class_embedding" in name
        spared = spared or name.endswith("readout.query")
        assert decay == (0.0 if spared else 0.2), name


def test_frozen_parameters_are_absent():
    model = tiny_model()
    model.vidprism.vision_tower.requires_grad_(False)
    groups, settings = groups_of(model)
    assert not [name for name in settings if name.startswith(TOWER)]
    assert {group["name"] for group in groups} == {"head", "head_no_decay"}


class RecordRates(L.Callback):
    """The learning rates each step is taken with, by name of the group."""

    def __init__(self):
        self.rates: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})


@pytest.mark.parametrize(("warmup_epochs", "warmup_steps"), [(2, 8), (0.5, 2), (0, 0)])
def test_warmup_and_cosine(tmp_path, warmup_epochs, warmup_steps):
    module = VidPrismLightningModule(
        backbone="tiny",
        id2label=dict(enumerate(LABELS)),
        num_frames=NUM_FRAMES,
        learning_rate=1e-3,
        backbone_lr_scale=0.1,
        warmup_epochs=warmup_epochs,
    )
    record = RecordRates()
    fit = trainer(tmp_path, max_epochs=5, callbacks=[record])
    fit.fit(module, random_batches(4, size=2))
    head = [rates["head"] for rates in record.rates]
    assert len(head) == 20
    # Linear: the first step is taken at zero, the peak comes right after the warm-up.
    rising = [1e-3 * step / warmup_steps for step in range(warmup_steps)]
    assert head[:warmup_steps] == pytest.approx(rising)
    assert head[warmup_steps] == pytest.approx(1e-3)
    falling = head[warmup_steps:]
    assert falling == sorted(set(falling), reverse=True)
    assert falling[len(falling) // 2] == pytest.approx(5e-4)  # a cosine is half way down half way through
    assert falling[-1] < 5e-5
    assert fit.lr_scheduler_configs[0].scheduler.get_last_lr() == pytest.approx([0] * 4, abs=1e-12)
    assert [rates["backbone"] for rates in record.rates] == pytest.approx([0.1 * rate for rate in head])
