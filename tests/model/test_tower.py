"""The frame encoder: CLIP's own numbers at less cost, and freezing it, as a whole or up to a layer."""

import weakref

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from test_modeling import VISION, clips, enable_checkpointing, small
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader, TensorDataset
from transformers import CLIPVisionModelWithProjection

from vidprism_hf import VidPrismConfig
from vidprism_hf.model.modeling_vidprism import VidPrismVisionTower

LAYERS = 4


def tower(**settings):
    torch.manual_seed(0)
    return VidPrismVisionTower(VidPrismConfig(vision_config={**VISION, "num_hidden_layers": LAYERS, **settings}))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layers", [1, LAYERS])
def test_equals_clip(implementation, layers):
    ours = tower(num_hidden_layers=layers)
    clip = CLIPVisionModelWithProjection._from_config(ours.vision_model.config, attn_implementation=implementation)
    for parameter in clip.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    ours.load_state_dict(clip.state_dict())
    ours.vision_model.set_attn_implementation(implementation)
    features, expected = ours(clips()), clip(clips().flatten(0, 1)).image_embeds.unflatten(0, (2, 16))
    torch.testing.assert_close(features, expected)
    features.square().sum().backward()
    expected.square().sum().backward()
    for (name, mine), theirs in zip(ours.named_parameters(), clip.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_attentions_of_all_layers():
    eager = tower()
    eager.vision_model.set_attn_implementation("eager")
    attentions = eager.vision_model(clips().flatten(0, 1), output_attentions=True).attentions
    tokens = 1 + 4
    assert [tuple(layer.shape[-2:]) for layer in attentions] == [(tokens, tokens)] * (LAYERS - 1) + [(1, tokens)]
    torch.testing.assert_close(attentions[-1].sum(-1), torch.ones(32, VISION["num_attention_heads"], 1))


def stored(run) -> int:
    """Bytes of the activations that a forward pass keeps for the backward pass, each storage once."""
    kept = []

    class Saved:  # what the graph refers to: it goes when the graph lets go of the tensor
        def __init__(self, tensor):
            self.tensor = tensor
            if not isinstance(tensor, torch.nn.Parameter):
                kept.append(weakref.ref(self))

    with saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        output = run()
    storages = [saved().tensor.untyped_storage() for saved in kept if saved() is not None]
    del output
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_keeps_less_than_clip():
    ours = tower()
    clip = CLIPVisionModelWithProjection._from_config(ours.vision_model.config)
    assert stored(lambda: ours(clips())) < 0.85 * stored(lambda: clip(clips().flatten(0, 1)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_tower_stores_nothing(checkpointing):
    model, pixels, labels = small().train(), clips(), torch.tensor([0, 2])
    if checkpointing:
        enable_checkpointing(model)
    vision_tower = model.vidprism.vision_tower
    assert stored(lambda: vision_tower(pixels)) > 0
    vision_tower.freeze()
    assert stored(lambda: vision_tower(pixels)) == 0
    vision_tower.train()  # as model.train() would
    assert stored(lambda: vision_tower(pixels)) == 0
    features = model.vidprism.get_frame_features(pixels)
    assert not features.requires_grad
    # The step from pixels keeps what the step from finished features keeps.
    from_pixels = stored(lambda: model(pixels, labels=labels).loss)
    assert from_pixels == stored(lambda: model(frame_features=features, labels=labels).loss)
    model(pixels, labels=labels).loss.backward()
    assert all(parameter.grad is None for parameter in vision_tower.parameters())
    assert all(parameter.grad is not None for parameter in model.vidprism.temporal_model.parameters())


def test_a_frozen_tower_is_compiled_and_exported():
    """As a whole graph, below a layer that trains, and after a plain run."""
    frozen = tower(num_hidden_layers=1)
    frozen.freeze()
    model, pixels = torch.nn.Sequential(frozen, torch.nn.Linear(VISION["projection_dim"], 2)), clips()
    plain = model(pixels)
    plain.sum().backward()
    gradient, model[1].weight.grad = model[1].weight.grad, None
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(pixels)
    torch.testing.assert_close(compiled, plain)
    compiled.sum().backward()
    torch.testing.assert_close(model[1].weight.grad, gradient)
    torch.testing.assert_close(torch.export.export(model, (pixels,)).module()(pixels), plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_requires_grad_unfreezes_a_frozen_tower(checkpointing):
    model, labels = small().train(), torch.tensor([0, 2])
    if checkpointing:
        enable_checkpointing(model)
    vision_tower = model.vidprism.vision_tower
    model(clips(), labels=labels).loss.backward()
    expected = {name: p.grad for name, p in vision_tower.named_parameters()}
    model.zero_grad()
    vision_tower.freeze()
    model(clips(), labels=labels).loss.backward()
    vision_tower.requires_grad_(True).train()
    model.zero_grad()
    model(clips(), labels=labels).loss.backward()
    torch.testing.assert_close({name: p.grad for name, p in vision_tower.named_parameters()}, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_pixels_get_a_gradient_through_a_frozen_tower(checkpointing, training):
    model, saliency = small().train(training), []
    if checkpointing:
        enable_checkpointing(model)
    for _ in range(2):
        pixels = clips().requires_grad_()
        model(pixels).logits.sum().backward()
        saliency.append(pixels.grad)
        model.vidprism.vision_tower.freeze()
        model.train(training)
    assert saliency[0].abs().sum() > 0
    torch.testing.assert_close(*saliency)


def test_part_of_a_frozen_tower_can_learn():
    frozen = tower()
    frozen.freeze()
    frozen.vision_model.post_layernorm.requires_grad_(True)
    frozen(clips()).square().sum().backward()
    learns = {name for name, p in frozen.named_parameters() if p.grad is not None}
    assert learns == {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"}


def test_a_hook_can_add_what_learns_to_a_frozen_tower():
    frozen, shift = tower(), torch.nn.Parameter(torch.zeros(VISION["hidden_size"]))
    frozen.freeze()
    frozen.vision_model.encoder.layers[0].register_forward_hook(lambda _, __, output: output + shift)
    frozen(clips()).square().sum().backward()
    assert shift.grad.abs().sum() > 0


class Unfreeze(BaseFinetuning):
    """Lightning's gradual unfreezing: the head first, the tower from epoch 1 on."""

    def freeze_before_training(self, module):
        self.freeze(module.model.vidprism.vision_tower)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.model.vidprism.vision_tower, optimizer, lr=1e-2)


class Classifier(L.LightningModule):
    """Another project's module around the model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.moved = model, []
        self.start = self.patches()

    def patches(self):
        return self.model.vidprism.vision_tower.vision_model.embeddings.patch_embedding.weight.detach().clone()

    def training_step(self, batch, _):
        return self.model(pixel_values_videos=batch[0], labels=batch[1]).loss

    def on_train_epoch_end(self):
        self.moved.append(not torch.equal(self.patches(), self.start))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_lightning_unfreezes_a_frozen_tower():
    model = small()
    model.vidprism.vision_tower.freeze()
    module = Classifier(model)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=[Unfreeze()], **quiet)
    trainer.fit(module, DataLoader(TensorDataset(clips(), torch.tensor([0, 2])), 2))
    assert module.moved == [False, True]


def tower_gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.vidprism.vision_tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_partly_frozen_tower_stops_the_backward_pass(checkpointing):
    model, pixels, labels = small().train(), clips(), torch.tensor([0, 2])
    if checkpointing:
        enable_checkpointing(model)
    vision_tower, layers = model.vidprism.vision_tower, len(model.vidprism.vision_tower.vision_model.encoder.layers)
    model(pixels, labels=labels).loss.backward()
    whole = tower_gradients(model)
    in_graph = []
    for layer in vision_tower.vision_model.encoder.layers:
        layer.register_forward_hook(lambda _, __, output: in_graph.append(output.requires_grad))
    sizes = [stored(lambda: vision_tower(pixels))]
    for count in range(layers + 1):
        vision_tower.freeze(count)
        sizes.append(stored(lambda: vision_tower(pixels)))
        model.zero_grad()
        in_graph.clear()
        loss = model(pixels, labels=labels).loss
        assert in_graph == [False] * count + [True] * (layers - count)
        loss.backward()
        frozen = tuple(f"vision_model.encoder.layers.{index}." for index in range(count))
        frozen += ("vision_model.embeddings.", "vision_model.pre_layrnorm.")
        trained = tower_gradients(model)
        assert trained.keys() == {name for name in whole if not name.startswith(frozen)}
        for name, gradient in trained.items():
            torch.testing.assert_close(gradient, whole[name])
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[1] < sizes[0]


def test_freezing_more_layers_than_there_are():
    with pytest.raises(ValueError, match="the tower has 4 layers: 5 of them cannot be frozen"):
        tower().freeze(5)
