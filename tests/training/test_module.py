"""The LightningModule: what it logs, what it leaves alone when frozen, what it refuses, its checkpoints."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from small import LABELS, NUM_FRAMES, tiny_export
from synthetic import random_batches, trainer
from torch.utils.data import DataLoader

from vidprism_hf import VidPrismLightningModule
from vidprism_hf.errors import UserError

LOSSES = ("loss", "classification_loss", "rank_loss", "gate_loss", "diversity_loss")


def module(labels=LABELS, **settings) -> VidPrismLightningModule:
    settings = {"backbone": "tiny", "learning_rate": 1e-2, "warmup_epochs": 0} | settings
    return VidPrismLightningModule(id2label=dict(enumerate(labels)), num_frames=NUM_FRAMES, **settings)


def test_logs_losses_and_accuracies(tmp_path):
    labels = tuple("abcdefg")
    model, batches = module(labels), random_batches(3, num_labels=len(labels))
    fit = trainer(tmp_path)
    fit.fit(model, random_batches(2, num_labels=len(labels), seed=1), batches)
    logged = {name: float(value) for name, value in fit.logged_metrics.items()}
    assert {f"{stage}/{name}" for stage in ("train", "val") for name in LOSSES} <= logged.keys()
    config = model.model.config
    for stage in ("train", "val"):
        weighted = (
            logged[f"{stage}/classification_loss"]
            + config.rank_loss_weight * logged[f"{stage}/rank_loss"]
            + config.gate_loss_weight * logged[f"{stage}/gate_loss"]
            + config.diversity_loss_weight * logged[f"{stage}/diversity_loss"]
        )
        assert logged[f"{stage}/loss"] == pytest.approx(weighted, rel=1e-4)
    # The accuracies, counted by hand over all batches.
    with torch.no_grad():
        ranks = torch.cat(
            [
                (model.model(batch["pixel_values_videos"]).logits.argsort(-1, descending=True))
                == batch["labels"][:, None]
                for batch in batches
            ]
        )
    assert logged["val/top1"] == pytest.approx(ranks[:, :1].any(-1).float().mean().item())
    assert logged["val/top5"] == pytest.approx(ranks[:, :5].any(-1).float().mean().item())
    shares = [logged[f"val/expert_{i}_rate_{rate}_weight"] for i, rate in enumerate(config.rates)]
    assert sum(shares) == pytest.approx(1, abs=1e-5)


def test_test_metrics_have_the_same_meaning(tmp_path):
    model, batches = module(), random_batches(2)
    fit = trainer(tmp_path)
    (val,), (test,) = (run(model, batches, verbose=False) for run in (fit.validate, trainer(tmp_path).test))
    assert "test/mean_class" in test  # of which no validation speaks
    for name, value in val.items():
        assert test[name.replace("val/", "test/")] == value


class WatchTower(L.Callback):
    """Whether the tower's output hangs on an autograd graph, and its gradients after each backward pass."""

    def __init__(self):
        self.graphs, self.gradients = [], []

    def on_fit_start(self, trainer, pl_module):
        pl_module.model.vidprism.vision_tower.register_forward_hook(
            lambda _, __, features: self.graphs.append(features.requires_grad) if pl_module.training else None
        )

    def on_after_backward(self, trainer, pl_module):
        tower = pl_module.model.vidprism.vision_tower
        self.gradients.append(any(parameter.grad is not None for parameter in tower.parameters()))


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_backbone(tmp_path, frozen):
    model, watch = module(freeze_backbone=frozen, backbone_lr_scale=1.0), WatchTower()
    model.configure_model()
    tower = model.model.vidprism.vision_tower
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    trainer(tmp_path, callbacks=[watch]).fit(model, random_batches(3))
    assert {parameter.requires_grad for parameter in tower.parameters()} == {not frozen}
    assert watch.graphs == watch.gradients == [not frozen] * 3
    changed = {name for name, tensor in model.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("vidprism.vision_tower.") for name in changed) is not frozen
    assert {"classifier.weight", "vidprism.temporal_model.readout.query"} <= changed


class Unfreeze(BaseFinetuning):
    """Lightning's gradual unfreezing: the head first, the tower from epoch 1 on, ten times as fast."""

    def freeze_before_training(self, pl_module):
        pl_module.configure_model()

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            tower = pl_module.model.vidprism.vision_tower
            self.unfreeze_and_add_param_group(tower, optimizer, lr=0.1, initial_denom_lr=1)


class Rates(L.Callback):
    """The learning rates at each step, and the layers that moved in it."""

    def __init__(self):
        self.rates, self.patches = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        embeddings = pl_module.model.vidprism.vision_tower.vision_model.embeddings
        self.patches.append(embeddings.patch_embedding.weight.detach().clone())


def test_a_callback_unfreezes_the_backbone(tmp_path):
    watch = Rates()
    trainer(tmp_path, max_epochs=2, callbacks=[Unfreeze(), watch]).fit(module(freeze_backbone=True), random_batches(2))
    assert torch.equal(watch.patches[0], watch.patches[1])
    assert not torch.equal(watch.patches[1], watch.patches[2])
    assert len(watch.rates[1]) < len(watch.rates[2])
    head, tower = watch.rates[2][0], watch.rates[2][-1]  # both on the cosine
    assert tower == pytest.approx(head / 1e-2 * 0.1)


def test_partly_frozen_backbone(tmp_path):
    model = module(freeze_layers=1)
    model.configure_model()
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    trainer(tmp_path).fit(model, random_batches(2))
    changed = {name for name, tensor in model.model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    assert changed <= trained
    parts = {name.split(".")[3] for name in trained if ".vision_model." in name}
    assert parts == {"post_layernorm"}  # `tiny` has one layer
    with pytest.raises(UserError, match=r"model.freeze_layers: the tower has 1 layers: 2 of them"):
        module(freeze_layers=2).configure_model()


def test_trains_in_train_mode(tmp_path):
    """from_pretrained leaves eval mode, in which a dropout would do nothing."""
    folder = tiny_export(tmp_path / "model", head_dropout=0.5)
    model, modes = module(checkpoint=str(folder)), []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.append(pl_module.model.dropout.training)

    trainer(tmp_path, callbacks=[Watch()]).fit(model, random_batches(1), random_batches(1))
    assert modes == [True]


def test_gradient_checkpointing_gives_the_same_loss(tmp_path):
    losses = []
    for checkpointing in (False, True):
        L.seed_everything(0)
        fit = trainer(tmp_path)
        fit.fit(module(gradient_checkpointing=checkpointing), random_batches(2))
        losses.append(float(fit.logged_metrics["train/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_settings_reach_the_model():
    model = module(config={"readout": "mean", "aggregation": "max"})
    model.configure_model()
    config = model.model.config
    assert (config.readout, config.aggregation, config.num_frames) == ("mean", "max", NUM_FRAMES)
    assert config.id2label == dict(enumerate(LABELS))
    built = model.model
    model.configure_model()  # Lightning calls it again before the test
    assert model.model is built


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"readuot": "mean"}, "model.config.readuot: no such field"),
        ({"num_frames": 4}, "model.config.num_frames: no such field"),
        ({"hidden_act": "gelu"}, "model.config.hidden_act: no such field"),
        ({"readout": "median"}, "'readout' expected one of"),
        ({"rates": [8, 2]}, "rates must be positive integers that do not decrease"),
    ],
)
def test_refuses_a_bad_config(config, message):
    with pytest.raises(UserError, match=message) as caught:
        module(config=config)
    assert len(str(caught.value).splitlines()) == 1


def test_refuses_no_labels():
    for labels in ((), ("alone",)):
        with pytest.raises(UserError, match="needs at least two"):
            module(labels=labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("growing", "turning"), "only in the model: shrinking; only in the data: turning"),
        (("growing", "shrinking", "turning"), r"\(only in the data: turning\)"),
    ],
)
def test_refuses_a_checkpoint_with_other_labels(exported, labels, message):
    with pytest.raises(UserError, match=message):
        module(labels, checkpoint=str(exported))


def test_a_checkpoints_classes_are_put_into_the_datas_order(tmp_path):
    """Three in a cycle, whose order and its inverse differ."""
    folder, clip = tiny_export(tmp_path / "model", labels=("a", "b", "c")), torch.randn(1, NUM_FRAMES, 3, 32, 32)
    logits = []
    for labels in (("a", "b", "c"), ("C", "A ", "b")):
        model = module(labels, checkpoint=str(folder))
        model.configure_model()
        with torch.no_grad():
            logits.append(model.model.eval()(clip).logits[0])
        assert model.model.config.id2label == dict(enumerate(labels))
        assert model.model.config.label2id == {label: index for index, label in enumerate(labels)}
    assert torch.allclose(logits[1], logits[0][[2, 0, 1]], atol=1e-6)


def test_learned_positions_are_for_their_number_of_frames(tmp_path):
    folder = tiny_export(tmp_path / "model", time_position="learned", num_frames=4)
    with pytest.raises(UserError, match=r"has learned positions for 4 frames; set model\.num_frames to that, not 8"):
        module(checkpoint=str(folder))


def test_each_clip_keeps_its_views(tmp_path):
    """Four views of two clips, all of them others; also from kept features."""
    model, given = module(), []
    model.configure_model()
    clips, labels = torch.randn(2, 4, NUM_FRAMES, 3, 32, 32), torch.tensor([0, 1])
    with torch.no_grad():
        alone = [[model.model.eval()(view[None]) for view in clip] for clip in clips]
        features = model.model.vidprism.get_frame_features(clips.flatten(0, 1)).unflatten(0, (2, 4))

    class Keep(L.Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, *_):
            given.append(outputs)

    batches = [{"pixel_values_videos": clips, "labels": labels}, {"frame_features": features, "labels": labels}]
    trainer(tmp_path, callbacks=[Keep()]).test(model, DataLoader(batches, batch_size=None), verbose=False)
    for name, mean in (("logits", False), ("expert_weights", True)):
        expected = torch.stack([torch.cat([output[name] for output in outputs]) for outputs in alone])
        for outputs in given:
            assert torch.allclose(outputs[name], expected.mean(1) if mean else expected, atol=1e-5)
        assert expected.flatten().unique().numel() == expected.numel()
    assert len(given) == 2


def test_refuses_what_is_no_checkpoint(tmp_path):
    for settings in ({"checkpoint": str(tmp_path)}, {"backbone": str(tmp_path)}):
        with pytest.raises(UserError, match="cannot be loaded") as caught:
            module(**settings).configure_model()
        assert len(str(caught.value).splitlines()) == 1


def test_starts_from_a_checkpoint(exported):
    model = module(checkpoint=str(exported))
    model.configure_model()
    from vidprism_hf import VidPrismForVideoClassification

    expected = VidPrismForVideoClassification.from_pretrained(exported).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.model.state_dict().items())


def test_checkpoint_files_hold_no_code(tmp_path):
    model = module(config={"readout": "mean"}, backbone_lr_scale=1.0)
    fit = trainer(tmp_path)
    fit.fit(model, random_batches(2))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["config"] == {"readout": "mean"}
    loaded = VidPrismLightningModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_builds_under_an_accelerators_device_context(tmp_path):
    """Lightning calls configure_model so; transformers would want to place the weights itself."""
    model = module(checkpoint=str(tiny_export(tmp_path / "export")))
    with torch.device("meta"):
        model.configure_model()
    assert {parameter.device.type for parameter in model.model.parameters()} == {"cpu"}


def test_refuses_a_configuration_beside_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="brings its own configuration"):
        module(checkpoint=str(tiny_export(tmp_path / "export")), config={"readout": "mean"})


def test_heads_that_fit_the_towers_width_are_taken():
    module(config={"num_attention_heads": 6})  # 768 / 6, though not the default width of 512
    with pytest.raises(UserError, match="num_attention_heads"):
        module(config={"num_attention_heads": 0})
