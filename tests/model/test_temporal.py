"""The temporal blocks: equal to the loop-by-loop reference, and the properties that the paper's formulas imply."""

import pytest
import slow_reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vidprism_hf import VidPrismConfig, VidPrismTemporalModel
from vidprism_hf.model.temporal_vidprism import expert_diversity_loss, gate_balance_loss, pool_windows

WIDTH = 16


def small_model(seed=0, gain=1.0, **fields):
    fields = {"num_frames": 16, **fields}
    config = VidPrismConfig(vision_config={"projection_dim": WIDTH}, **fields)
    torch.manual_seed(seed)
    model = VidPrismTemporalModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that each one counts
            parameter.add_(gain * 0.1 * torch.randn_like(parameter))
    return model


def features(seed, clips, frames, width=WIDTH):
    return torch.randn(clips, frames, width, generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 1000),
    num_frames=st.integers(1, 23),
    rates=st.lists(st.integers(1, 16), min_size=1, max_size=4).map(sorted),
    kept=st.integers(1, 3),
    fields=st.fixed_dictionaries(
        {
            "merge_normalization": st.sampled_from(["kept", "rest"]),
            "interaction": st.sampled_from(["both", "slow_to_fast", "fast_to_slow", "none"]),
            "interaction_pairs": st.sampled_from(["all", "slow_fast"]),
            "interaction_gates": st.sampled_from(["pair", "edge"]),
            "interaction_update": st.sampled_from(["sum", "last"]),
            "gate_threshold": st.sampled_from([0.0, 0.3, 0.5]),
            "hidden_size": st.sampled_from([WIDTH, 8]),
        }
    ),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_loops(seed, num_frames, rates, kept, fields):
    model = small_model(seed, rates=rates, kept_per_window=kept, **fields).double()
    x = features(seed + 1, 2, num_frames).double()
    with torch.no_grad():
        fast = model(x, output_streams=True, output_losses=True)
        clips, rank_loss = slow_reference.temporal_model(model.state_dict(), model.config, x)
    # The blocks take scores and similarities in float32 whatever the precision.
    close = {"rtol": 1e-4, "atol": 1e-5}
    for b, slow in enumerate(clips):
        for i in range(len(rates)):
            assert fast.kept_indices[i][b].tolist() == slow["kept"][i]
            torch.testing.assert_close(fast.streams[i][b], slow["streams"][i], **close)
            torch.testing.assert_close(fast.interacted_streams[i][b], slow["interacted"][i], **close)
        torch.testing.assert_close(fast.frame_scores[b].double(), slow["scores"], **close)
        torch.testing.assert_close(fast.gates[b], slow["gates"], **close)
        torch.testing.assert_close(fast.last_hidden_state[b], torch.cat(slow["outputs"]), **close)
        torch.testing.assert_close(fast.pooler_output[b], slow["pooled"], **close)
        torch.testing.assert_close(fast.expert_weights[b].double(), slow["weights"], **close)
    torch.testing.assert_close(fast.rank_loss.double(), rank_loss, **close)


@given(num_frames=st.integers(1, 40), rate=st.integers(1, 16))
@settings(max_examples=40, deadline=None)
def test_a_stream_has_one_frame_for_each_window(num_frames, rate):
    for how in ("rgsta", "stride", "mean", "max"):
        model = small_model(rates=[rate], aggregation=how)
        stream = model(features(0, 1, num_frames), output_streams=True).streams[0]
        assert stream.shape[1] == -(-num_frames // rate)


def test_windows_of_the_ablation():
    frames = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0]).view(1, 5, 1)
    assert pool_windows(frames, 2, "stride").flatten().tolist() == [1, 3, 20]
    assert pool_windows(frames, 2, "mean").flatten().tolist() == [1.5, 6.5, 20]
    assert pool_windows(-frames, 2, "max").flatten().tolist() == [-1, -3, -20]


@pytest.mark.parametrize("fields", [{}, {"merge_normalization": "rest"}, {"interaction_update": "last"}])
@pytest.mark.parametrize("num_frames", [1, 13, 16])
def test_a_clip_does_not_depend_on_its_neighbours(fields, num_frames):
    model = small_model(**fields)
    x = features(0, 6, num_frames)
    with torch.no_grad():
        together = model(x, output_streams=True)
        for b in range(len(x)):
            alone = model(x[b : b + 1], output_streams=True)
            torch.testing.assert_close(alone.pooler_output[0], together.pooler_output[b], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(alone.gates[0], together.gates[b], rtol=1e-6, atol=1e-6)
            # Bit for bit beside other neighbours in a batch of the same size: the same kernels run.
            swapped = torch.cat([x[b : b + 1], torch.randn(5, num_frames, WIDTH) * 10])
            mirrored = torch.cat([x[b : b + 1], x.roll(1, 0)[1:]])
            assert torch.equal(model(swapped).pooler_output[0], model(mirrored).pooler_output[0])


def test_a_closed_gate_adds_nothing():
    closed, without = small_model(gate_threshold=1.1), small_model(interaction="none")
    without.load_state_dict(closed.state_dict(), strict=False)
    x = features(0, 3, 16)
    with torch.no_grad():
        a, b = closed(x, output_streams=True), without(x, output_streams=True)
    assert torch.equal(a.pooler_output, b.pooler_output)
    assert all(torch.equal(i, s) for i, s in zip(a.interacted_streams, a.streams, strict=True))


def test_tau_matters_only_where_the_formula_has_it():
    x = features(0, 2, 16)

    def streams(**fields):
        with torch.no_grad():
            return torch.cat(small_model(**fields)(x, output_streams=True).streams, dim=1)

    # k = 1: each rest frame's weight is e / (e + eps), the constant 1 while e is far above the released code's eps.
    kept = [streams(merge_temperature=tau) for tau in (0.5, 5.0)]
    torch.testing.assert_close(*kept, rtol=1e-3, atol=1e-3)
    rest = [streams(merge_temperature=tau, merge_normalization="rest") for tau in (0.1, 1.0)]
    assert (rest[0] - rest[1]).abs().max() > 0.05
    several = [streams(merge_temperature=tau, kept_per_window=2) for tau in (0.1, 1.0)]
    assert (several[0] - several[1]).abs().max() > 0.05


def test_kept_normalisation_with_one_kept_frame_adds_the_rest():
    model = small_model(rates=[4], merge_temperature=1.0)
    x = features(0, 1, 4)
    output = model(x, output_streams=True)
    kept = output.kept_indices[0][0, 0]
    expected = x[0, kept] + 0.5 * (x[0].sum(0) - x[0, kept])
    torch.testing.assert_close(output.streams[0][0, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("readout", ["query", "mean", "max"])
def test_expert_weights_sum_to_one(readout):
    weights = small_model(readout=readout)(features(0, 5, 16)).expert_weights
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))


def test_gate_loss_is_one_at_balance_and_n_at_collapse():
    assert gate_balance_loss(torch.full((4,), 0.25)).item() == pytest.approx(1)
    assert gate_balance_loss(torch.tensor([1.0, 0, 0, 0])).item() == pytest.approx(4)


def test_diversity_loss():
    base = torch.randn(6, 3, WIDTH)
    assert expert_diversity_loss([base, base, base]).item() == pytest.approx(1, abs=1e-5)
    axes = [torch.eye(WIDTH)[i].expand(6, 3, WIDTH) for i in range(3)]
    assert expert_diversity_loss(axes).item() == 0
    outputs = [torch.randn(6, length, WIDTH) for length in (8, 4, 2)]
    order = torch.randperm(6)
    permuted = expert_diversity_loss([output[order] for output in outputs])
    torch.testing.assert_close(permuted, expert_diversity_loss(outputs))
    assert expert_diversity_loss([base]).item() == 0


def test_learned_positions_tell_order_and_follow_the_length():
    model = small_model(time_position="learned")
    for num_frames in (1, 16, 21):
        assert model(features(0, 2, num_frames)).pooler_output.shape == (2, WIDTH)
    plain = small_model(aggregation="mean", interaction="none", rates=[1])
    x = features(0, 1, 16)
    # Without positions and interaction nothing tells the order of frames ...
    torch.testing.assert_close(plain(x).pooler_output, plain(x.flip(1)).pooler_output)
    # ... T-Conv does, and positions do.
    for fields in (
        {"rates": [1, 2], "aggregation": "stride"},
        {"time_position": "learned", "interaction": "none"},
    ):
        ordered = small_model(**fields)
        assert (ordered(x).pooler_output - ordered(x.flip(1)).pooler_output).abs().max() > 1e-3


def test_ties_keep_the_first_frame():
    x = features(0, 1, 1).expand(1, 16, WIDTH)
    kept = small_model(rates=[4])(x, output_streams=True).kept_indices[0]
    assert kept.tolist() == [[0, 4, 8, 12]]


class CountOperations(TorchDispatchMode):
    """Counts what is computed, forward and backward."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fields", [{}, {"merge_normalization": "rest", "interaction_update": "last"}])
def test_no_loop_over_clips_frames_or_windows(fields):
    counts = set()
    for clips, num_frames in ((2, 32), (5, 32), (2, 64)):
        model = small_model(**fields).train()
        with CountOperations() as operations:
            output = model(features(0, clips, num_frames), output_losses=True)
            (output.pooler_output.square().mean() + output.rank_loss + output.diversity_loss).backward()
        counts.add(operations.count)
    assert len(counts) == 1


def test_optional_outputs_come_only_when_asked_for():
    model, x = small_model(), features(0, 1, 16)
    assert set(model(x).keys()) == {"last_hidden_state", "pooler_output", "expert_weights", "gates"}
    extra = model(x, output_streams=True, output_losses=True, output_hidden_states=True).keys()
    assert {
        "streams",
        "interacted_streams",
        "frame_scores",
        "kept_indices",
        "rank_loss",
        "hidden_states",
    } <= set(extra)
