"""The rivals of the head: they learn what they can, and see time where they should."""

import pytest
import torch
from small import tiny_model

from vidprism_hf.ablation.baselines import TIME_WEIGHTS, LinearProbe, parameters_of, with_baseline

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
    sizes = [parameters_of(model.vidprism.temporal_model) for model in (head, baseline)]
    assert abs(sizes[0] - sizes[1]) < 0.25 * sizes[0]
    forward, backward = (baseline(frame_features=x).logits for x in (features, features.flip(1)))
    assert not torch.allclose(forward, backward)


def test_the_mixture_is_equal_experts_with_a_router(features):
    model = with_baseline(tiny_model(), "mixture")
    weights = model(frame_features=features).expert_weights
    assert weights.shape == (3, len(model.config.rates))
    assert weights.std(dim=0).max() > 0  # it depends on the clip


def clusters(noise: float, seed: int = 0):
    """Sixty clips of three classes around their centres, in channels of very different scales, in six groups."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(60) % 3
    points = (centres[labels] + noise * torch.randn(60, 16, generator=generator))[:, None]
    frames = points + 0.1 * torch.randn(60, 4, 16, generator=generator)
    constant = torch.full((60, 4, 1), 7.0)
    return torch.cat([frames + 5, constant], dim=2), labels, torch.arange(60) // 10


def test_the_probe_separates_what_a_line_can():
    frames, labels, groups = clusters(0.3)
    probe = LinearProbe(3).fit(frames, labels, groups)
    others, their_labels, _ = clusters(0.3, seed=2)
    assert torch.equal(probe(others).argmax(-1), their_labels)
    # It reads the mean frame alone.
    torch.testing.assert_close(probe(others.flip(1)), probe(others))


def test_the_probe_is_ridge_regression_of_the_classes():
    frames, labels, groups = clusters(2.0)
    probe = LinearProbe(3, (0.3,)).fit(frames, labels, groups)
    inputs, targets = frames.mean(dim=1).double(), torch.eye(3).double()[labels]
    inputs, means = inputs - inputs.mean(dim=0), targets.mean(dim=0)
    penalty = 0.3 * inputs.square().sum(dim=1).mean() * torch.eye(17).double()
    weight = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ (targets - means))
    torch.testing.assert_close(probe(frames), inputs @ weight + means)


def test_the_probes_penalty_is_the_one_that_serves_held_out_groups_best():
    frames, labels, groups = clusters(2.0)
    penalties = (1e-4, 1e-1, 10.0)
    right = dict.fromkeys(penalties, 0)
    for penalty in penalties:
        for group in groups.unique():
            inner, held_out = groups != group, groups == group
            probe = LinearProbe(3, (penalty,)).fit(frames[inner], labels[inner], groups[inner])
            right[penalty] += (probe(frames[held_out]).argmax(-1) == labels[held_out]).sum().item()
    assert len(set(right.values())) > 1
    best = max(penalty for penalty in penalties if right[penalty] == max(right.values()))  # of equals the strongest
    assert LinearProbe(3, penalties).fit(frames, labels, groups).penalty == best


def test_the_timed_probe_weights_time_where_the_order_tells_the_classes():
    frames, labels, groups = clusters(6.0)
    rising = torch.linspace(-1, 1, 4)[None, :, None] * (labels - 1)[:, None, None]
    in_order = frames + 50 * rising
    timed, plain = (
        LinearProbe(3, (1e-2,), weights).fit(in_order, labels, groups) for weights in (TIME_WEIGHTS, (0.0,))
    )
    assert (timed.time_weight, plain.time_weight) == (TIME_WEIGHTS[1], 0)
    turned = labels != 1  # what stands between two others least squares do not see
    assert (timed(in_order).argmax(-1) == labels)[turned].all()
    assert (timed(in_order.flip(1)).argmax(-1) == 2 - labels)[turned].float().mean() > 0.9
    # Where it does not, the plain probe is taken unless time happens to serve held-out groups better.
    still, their_labels, their_groups = clusters(0.3)
    still = still.mean(dim=1, keepdim=True).expand(-1, 4, -1)
    assert LinearProbe(3, (1e-2,), TIME_WEIGHTS).fit(still, their_labels, their_groups).time_weight == 0
