"""Linear probes: ridge regression on mean frames, whose penalty training videos choose."""

import numpy as np
import pytest
import torch

from vidprism_hf.ablation.probes import TIME_WEIGHTS, FrameMeans, fit_probe


def clusters(noise: float, seed: int = 0):
    """Sixty videos of three classes around their centres, in channels of very different scales, in six groups."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(60) % 3
    points = (centres[labels] + noise * torch.randn(60, 16, generator=generator))[:, None]
    frames = points + 0.1 * torch.randn(60, 4, 16, generator=generator)
    constant = torch.full((60, 4, 1), 7.0)
    return torch.cat([frames + 5, constant], dim=2).numpy(), labels.numpy(), np.arange(60) // 10


@pytest.mark.parametrize("whitened", [False, True])
def test_the_probe_separates_what_a_line_can(whitened):
    frames, labels, groups = clusters(0.3)
    probe = fit_probe(frames, labels, groups, whitened=whitened)
    others, their_labels, _ = clusters(0.3, seed=2)
    assert (probe.predict(others) == their_labels).all()
    # It reads the mean frame alone.
    np.testing.assert_allclose(probe.decision_function(others[:, ::-1].copy()), probe.decision_function(others))


def test_the_probe_is_ridge_regression_of_the_classes():
    frames, labels, groups = clusters(2.0)
    probe = fit_probe(frames, labels, groups, penalties=(0.3,))
    inputs, targets = frames.astype(float).mean(axis=1), 2 * np.eye(3)[labels] - 1
    inputs, means = inputs - inputs.mean(axis=0), targets.mean(axis=0)
    penalty = 0.3 * np.square(inputs).sum(axis=1).mean() * np.eye(17)  # in units of the mean squared length
    weight = np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ (targets - means))
    np.testing.assert_allclose(probe.decision_function(frames), inputs @ weight + means, atol=1e-6)


def test_outputs_do_not_depend_on_the_towers_scale():
    frames, _, _ = clusters(2.0)
    for settings in ({}, {"whitened": True}, {"time_weight": 0.3}):
        vectors = FrameMeans(**settings).fit_transform(frames)
        assert np.square(vectors - vectors.mean(axis=0)).sum(axis=1).mean() == pytest.approx(1)
        scaled = FrameMeans(**settings).fit_transform(frames * 8)
        np.testing.assert_allclose(np.abs(scaled), np.abs(vectors), atol=1e-3)


def test_the_penalty_is_the_most_accurate_one_on_held_out_groups():
    frames, labels, groups = clusters(2.0)
    penalties = (10.0, 1e-1, 1e-4)
    correct = dict.fromkeys(penalties, 0)
    for penalty in penalties:
        for group in np.unique(groups):
            inner, held_out = groups != group, groups == group
            probe = fit_probe(frames[inner], labels[inner], groups[inner], penalties=(penalty,))
            correct[penalty] += (probe.predict(frames[held_out]) == labels[held_out]).sum()
    assert len(set(correct.values())) > 1
    best = max(penalty for penalty in penalties if correct[penalty] == max(correct.values()))  # the strongest of equals
    assert fit_probe(frames, labels, groups, penalties=penalties)["ridge"].alpha == best


def test_the_timed_probe_weights_time_where_the_order_separates_the_classes():
    frames, labels, groups = clusters(6.0)
    in_order = frames + 50 * np.linspace(-1, 1, 4)[None, :, None] * (labels - 1)[:, None, None]
    in_order = in_order.astype(np.float32)
    timed, plain = (
        fit_probe(in_order, labels, groups, penalties=(1e-2,), time_weights=weights) for weights in (TIME_WEIGHTS, (0,))
    )
    assert (timed["frames"].time_weight, plain["frames"].time_weight) == (TIME_WEIGHTS[1], 0)
    turned = labels != 1  # least squares miss a class between two others
    assert (timed.predict(in_order) == labels)[turned].all()
    assert (timed.predict(in_order[:, ::-1].copy()) == 2 - labels)[turned].mean() > 0.9
    # Elsewhere the plain probe wins unless time happens to help on held-out groups.
    still, labels, groups = clusters(0.3)
    still = np.broadcast_to(still.mean(axis=1, keepdims=True), still.shape).copy()
    probe = fit_probe(still, labels, groups, penalties=(1e-2,), time_weights=TIME_WEIGHTS)
    assert probe["frames"].time_weight == 0
