"""Parameter groups, and the learning rate of a real run step by step."""

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import LABELS, NUM_FRAMES, tiny_model
from synthetic import random_batches, trainer

from vidprism_hf import VidPrismConfig, VidPrismForVideoClassification, VidPrismLightningModule
from vidprism_hf.errors import UserError
from vidprism_hf.model import VISION_PRESETS
from vidprism_hf.training.optim import parameter_groups, tower_level

TOWER = "vidprism.vision_tower."


def groups_of(model, learning_rate=1e-3, backbone_lr_scale=0.06, weight_decay=0.2, layer_decay=1.0):
    """The groups, and the settings of each parameter by name."""
    groups = parameter_groups(model, learning_rate, backbone_lr_scale, weight_decay, layer_decay)
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


def deep_model(layers: int) -> VidPrismForVideoClassification:
    """A tower of so many layers; its weights have shapes alone."""
    config = VidPrismConfig(
        num_frames=NUM_FRAMES, vision_config=VISION_PRESETS["tiny"]["vision_config"] | {"num_hidden_layers": layers}
    )
    with torch.device("meta"):
        return VidPrismForVideoClassification(config)


def test_layer_decay_of_each_part():
    """As in BEiT: a factor for each layer below the top, and one more for the embeddings."""
    _, settings = groups_of(deep_model(3), learning_rate=1.0, backbone_lr_scale=0.1, layer_decay=0.5)
    rates = {name: rate for name, (rate, _) in settings.items()}
    expected = {
        "classifier.weight": 1.0,
        "vidprism.temporal_model.experts.0.attention_norm.weight": 1.0,
        f"{TOWER}visual_projection.weight": 0.1,
        f"{TOWER}vision_model.post_layernorm.weight": 0.1,
        f"{TOWER}vision_model.encoder.layers.2.mlp.fc1.weight": 0.1 * 0.5,
        f"{TOWER}vision_model.encoder.layers.1.layer_norm1.bias": 0.1 * 0.5**2,
        f"{TOWER}vision_model.encoder.layers.0.self_attn.q_proj.weight": 0.1 * 0.5**3,
        f"{TOWER}vision_model.pre_layrnorm.weight": 0.1 * 0.5**4,
        f"{TOWER}vision_model.embeddings.class_embedding": 0.1 * 0.5**4,
        f"{TOWER}vision_model.embeddings.patch_embedding.weight": 0.1 * 0.5**4,
        f"{TOWER}vision_model.embeddings.position_embedding.weight": 0.1 * 0.5**4,
    }
    missing = expected.keys() - rates.keys()
    assert not missing
    assert {name: rates[name] for name in expected} == pytest.approx(expected)


@settings(max_examples=20, deadline=None)
@given(layers=st.integers(1, 12), decay=st.floats(0.05, 1.0), data=st.data())
def test_layer_decay_loses_no_parameter_and_takes_none_twice(layers, decay, data):
    """With any part of the tower frozen; and lower never learns faster."""
    model = deep_model(layers)
    frozen = data.draw(st.integers(0, layers))
    for layer in model.vidprism.vision_tower.vision_model.encoder.layers[:frozen]:
        layer.requires_grad_(False)
    groups, with_decay = groups_of(model, layer_decay=decay)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)
    _, without = groups_of(model)
    assert {name: kept for name, (_, kept) in with_decay.items()} == {name: kept for name, (_, kept) in without.items()}
    tower = [name for name in with_decay if name.startswith(TOWER)]
    rates = [with_decay[name][0] for name in sorted(tower, key=lambda name: tower_level(name, layers))]
    assert rates == sorted(rates)
    # A frozen layer keeps its place: the rates of the others do not depend on it.
    level = {name: tower_level(name, layers) for name in tower}
    expected = {name: 6e-5 * decay ** (layers + 1 - level[name]) for name in tower}
    assert {name: with_decay[name][0] for name in tower} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("model.embeddings.patch_embeddings.projection.weight", 0),
        ("model.encoder.layer.3.attention.attention.query.weight", 4),  # the names of VideoMAE and DINOv2
        ("model.encoder.layers.11.mlp.fc2.bias", 12),
        ("model.layernorm.weight", 13),
    ],
)
def test_levels_of_other_towers(name, level):
    assert tower_level(TOWER + name, 12) == level


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


def test_schedule_counts_steps_of_the_optimiser(tmp_path):
    """Five batches an epoch, two a step: three steps, the last of one batch."""
    module = VidPrismLightningModule(
        "tiny", id2label=dict(enumerate(LABELS)), num_frames=NUM_FRAMES, learning_rate=1e-3, warmup_epochs=1
    )
    record = RecordRates()
    fit = trainer(tmp_path, max_epochs=3, accumulate_grad_batches=2, callbacks=[record])
    fit.fit(module, random_batches(5, size=2))
    head = [rates["head"] for rates in record.rates]
    assert len(head) == fit.global_step == 9
    assert head[:4] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3])
    assert fit.lr_scheduler_configs[0].scheduler.get_last_lr() == pytest.approx([0] * 4, abs=1e-12)


class Data(L.LightningDataModule):
    """Random batches of a stated size."""

    def __init__(self, batch_size: int):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return random_batches(4, size=self.hparams.batch_size)


def peak(folder, data, **settings) -> float:
    """The highest learning rate of the head."""
    module = VidPrismLightningModule(
        "tiny", id2label=dict(enumerate(LABELS)), num_frames=NUM_FRAMES, learning_rate=1e-3, warmup_epochs=0, **settings
    )
    record = RecordRates()
    trainer(folder, accumulate_grad_batches=2, callbacks=[record]).fit(module, data)
    return max(rates["head"] for rates in record.rates)


@pytest.mark.parametrize(("reference", "rate"), [(None, 1e-3), (4, 1e-3), (1, 2e-3), (16, 5e-4)])
def test_learning_rate_grows_with_the_root_of_the_clips_a_step(tmp_path, reference, rate):
    assert peak(tmp_path, Data(batch_size=2), reference_batch_size=reference) == pytest.approx(rate)


def test_scaling_needs_a_batch_size(tmp_path):
    with pytest.raises(UserError, match=r"model\.reference_batch_size: the data have no batch_size"):
        peak(tmp_path, random_batches(4), reference_batch_size=4)
