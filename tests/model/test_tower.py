"""The frame encoder: CLIP's own numbers at less cost, and freezing it, as a whole or up to a layer."""

import pytest
import torch
from test_modeling import VISION, clips, enable_checkpointing, small
from torch.autograd.graph import saved_tensors_hooks
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
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no place is used twice
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


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
    assert not features.is_inference()
    # The step from pixels keeps what the step from finished features keeps.
    from_pixels = stored(lambda: model(pixels, labels=labels).loss)
    assert from_pixels == stored(lambda: model(frame_features=features, labels=labels).loss)
    model(pixels, labels=labels).loss.backward()
    assert all(parameter.grad is None for parameter in vision_tower.parameters())
    assert all(parameter.grad is not None for parameter in model.vidprism.temporal_model.parameters())


def test_a_frozen_tower_runs_in_inference_mode():
    frozen, inside = tower(), []
    for layer in frozen.vision_model.encoder.layers:
        layer.register_forward_hook(lambda _, __, output: inside.append(output.is_inference()))
    expected = frozen(clips())
    frozen.freeze()
    features = frozen(clips())
    assert inside == [False] * LAYERS + [True] * LAYERS
    torch.testing.assert_close(features, expected.detach())


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
