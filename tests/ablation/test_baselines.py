"""Baselines that replace the temporal model."""

import pytest
import torch
from small import tiny_model

from vidprism_hf.ablation.baselines import num_trainable, with_baseline

CHANNELS = 64  # the tiny tower's features


@pytest.fixture
def features():
    return torch.randn(3, 8, CHANNELS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["transformer", "mixture"])
def test_it_takes_the_heads_place(features, name):
    model = with_baseline(tiny_model(), name)
    output = model(frame_features=features, labels=torch.tensor([0, 1, 0]))
    assert output.logits.shape == (3, 2)
    torch.testing.assert_close(output.expert_weights.sum(dim=1), torch.ones(3))
    output.loss.backward()
    temporal = dict(model.vidprism.temporal_model.named_parameters())
    assert [name for name, parameter in temporal.items() if parameter.grad is None] == []
    # A clip's logits are its own.
    alone = model(frame_features=features[1:2]).logits
    torch.testing.assert_close(alone[0], output.logits[1])


def test_the_transformer_is_of_the_heads_size_and_sees_the_order(features):
    head, baseline = tiny_model(), with_baseline(tiny_model(), "transformer")
    sizes = [num_trainable(model.vidprism.temporal_model) for model in (head, baseline)]
    assert abs(sizes[0] - sizes[1]) < 0.25 * sizes[0]
    forward, backward = (baseline(frame_features=x).logits for x in (features, features.flip(1)))
    assert not torch.allclose(forward, backward)


def test_the_mixture_is_equal_experts_with_a_router(features):
    model = with_baseline(tiny_model(), "mixture")
    weights = model(frame_features=features).expert_weights
    assert weights.shape == (3, len(model.config.rates))
    assert weights.std(dim=0).max() > 0  # it depends on the clip
