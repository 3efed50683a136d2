"""Recorded numbers: the authors' released head (in shared/), and this package's own model (shipped here).

`python tests/model/test_recorded.py` writes the shipped recording anew; do so only when the mathematics is meant
to change, and say so.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vidprism_hf import VidPrismConfig, VidPrismTemporalModel
from vidprism_hf.convert.released import map_weights

OWN = Path(__file__).with_name("recorded_head.safetensors")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def released_head(file):
    """The released head of a recording as our temporal model, with the recording and its classifier's weights."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    recorded = load_file(file)
    state = {name.removeprefix("state."): value for name, value in recorded.items() if name.startswith("state.")}
    rates, width = json.loads(metadata["rates"]), int(metadata["d_model"])
    config = VidPrismConfig.released(
        vision_config={"projection_dim": width},
        num_frames=int(metadata["frames"]),
        rates=rates,
        num_attention_heads=int(metadata["heads"]),
        merge_temperature=float(metadata["tau"]),
        merge_weight=float(metadata["delta"]),
        score_mix=float(metadata["alpha"]),
        score_temperature=float(metadata["score_temp"]),
        slow_rate=int(metadata["slow_rate"]),
        gate_threshold=float(metadata["threshold"]),
        projection_head=True,
        num_labels=int(metadata["classes"]),
    )
    weights, _, _ = map_weights(state, config)
    model = VidPrismTemporalModel(config).eval()
    prefix = "vidprism.temporal_model."
    model.load_state_dict(
        {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    )
    return model, recorded, weights


@pytest.mark.parametrize("num_frames", [8, 16, 32])
def test_released_head(shared, num_frames):
    model, recorded, weights = released_head(shared / "reference" / f"official_head_t{num_frames}.safetensors")
    with torch.no_grad():
        output = model(recorded["features"], output_streams=True, output_losses=True)
    for i in range(len(model.config.rates)):
        torch.testing.assert_close(output.streams[i], recorded[f"stream.{i}"], **CLOSE)
        torch.testing.assert_close(output.interacted_streams[i], recorded[f"interacted.{i}"], **CLOSE)
    assert model.interaction.edges
    for i, j in model.interaction.edges:
        torch.testing.assert_close(output.gates[:, i, j], recorded["gates"][:, i, j], **CLOSE)
    torch.testing.assert_close(output.pooler_output, recorded["pooled"], **CLOSE)
    torch.testing.assert_close(output.expert_weights, recorded["expert_weights"], **CLOSE)
    torch.testing.assert_close(output.rank_loss, recorded["rank_loss"][0], **CLOSE)
    torch.testing.assert_close(output.gate_loss, recorded["gate_loss"][0], **CLOSE)
    logits = torch.nn.functional.linear(output.pooler_output, weights["classifier.weight"], weights["classifier.bias"])
    torch.testing.assert_close(logits, recorded["logits"], **CLOSE)
    hidden = torch.nn.functional.linear(
        output.pooler_output,
        weights["vidprism.projection_head.0.weight"],
        weights["vidprism.projection_head.0.bias"],
    ).relu()
    projected = torch.nn.functional.linear(
        hidden, weights["vidprism.projection_head.2.weight"], weights["vidprism.projection_head.2.bias"]
    )
    torch.testing.assert_close(projected, recorded["projected"], **CLOSE)


def recorded_variants():
    """The configurations that the shipped recording holds: the defaults, and each switch the other way."""
    return {
        "defaults": {},
        "released": {
            "interaction_pairs": "slow_fast",
            "interaction_gates": "edge",
            "interaction_update": "last",
        },
        "rest": {"merge_normalization": "rest", "kept_per_window": 2},
        "learned": {"time_position": "learned", "readout": "mean", "aggregation": "mean"},
    }


def own_model(fields):
    config = VidPrismConfig(vision_config={"projection_dim": 16}, num_frames=12, rates=[2, 4, 8], **fields)
    return VidPrismTemporalModel(config).eval()


def stages(model, x):
    """The stages of a run by name, as the recording keeps them."""
    with torch.no_grad():
        output = model(x, output_streams=True, output_losses=True)
    named = {f"stream.{i}": value for i, value in enumerate(output.streams)}
    named |= {f"interacted.{i}": value for i, value in enumerate(output.interacted_streams)}
    scalars = ("gates", "pooler_output", "expert_weights", "rank_loss", "gate_loss", "diversity_loss")
    return named | {name: output[name] for name in scalars}


@pytest.mark.parametrize("variant", recorded_variants())
def test_own_head(variant):
    recorded = load_file(OWN)
    part = {name.removeprefix(f"{variant}."): v for name, v in recorded.items() if name.startswith(f"{variant}.")}
    model = own_model(recorded_variants()[variant])
    model.load_state_dict({n.removeprefix("state."): v for n, v in part.items() if n.startswith("state.")})
    now = stages(model, recorded["features"])
    expected = {name: value for name, value in part.items() if not name.startswith("state.")}
    assert now.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(now[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def record():
    generator = torch.Generator().manual_seed(0)
    tensors = {"features": torch.randn(3, 12, 16, generator=generator)}
    for variant, fields in recorded_variants().items():
        model = own_model(fields)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        tensors |= {f"{variant}.state.{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"{variant}.{name}": value for name, value in stages(model, tensors["features"]).items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, OWN)


if __name__ == "__main__":
    record()
