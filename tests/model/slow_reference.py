"""VidPrism's temporal blocks written once more as plain loops over clips, windows and frames, for the tests.

It follows the method section literally, in float64, one scalar rule after the other, and shares nothing with the
package but the names of the weights. benchmarks/head.py times it, on any device.
"""

import math

import torch
from torch.nn import functional as F

EPS = 1e-6


def temporal_model(state, config, features, dtype=torch.float64):
    """All clips (B, T, D), each run alone. Returns per-clip dicts of stages and the rank loss over all windows."""
    state = {name: value.to(dtype) for name, value in state.items()}
    clips = [clip(state, config, frames) for frames in features.to(dtype)]
    rank = torch.stack(
        [torch.stack([torch.stack(x["rank"][i]) for x in clips]).mean() for i in range(len(config.rates))]
    )
    return clips, rank.mean()


def clip(state, config, frames):
    if "input_projection.weight" in state:
        frames = linear(state, "input_projection", frames)
    streams, scores, kept, rank = [], [], [], []
    for i, rate in enumerate(config.rates):
        stream, score, indices, losses = merge(state, f"mergers.{i}", config, frames, rate)
        streams.append(stream), scores.append(score), kept.append(indices), rank.append(losses)
    interacted, gates = interact(state, config, streams)
    outputs = [expert(state, f"experts.{i}", config, stream) for i, stream in enumerate(interacted)]
    pooled, weights = read_out(state, config, outputs)
    return {
        "streams": streams,
        "scores": torch.stack(scores),
        "kept": kept,
        "rank": rank,
        "interacted": interacted,
        "gates": gates,
        "outputs": outputs,
        "pooled": pooled,
        "weights": weights,
    }


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def merge(state, name, config, frames, rate):
    metric = linear(state, f"{name}.metric_proj", frames)
    predicted = linear(state, f"{name}.score_head", norm(state, f"{name}.score_norm", metric))[:, 0]
    lengths = torch.stack([frame.square().sum().sqrt() for frame in frames])
    mixed = config.score_mix * predicted + (1 - config.score_mix) * lengths
    metric = torch.stack([vector / vector.norm() for vector in metric])
    stream, kept_frames, losses = [], [], []
    k = config.kept_per_window
    for start in range(0, len(frames), k * rate):
        window = list(range(start, min(start + k * rate, len(frames))))
        similarity = {(a, b): 0.0 if a == b else float(metric[a] @ metric[b]) for a in window for b in window}
        kept = sorted(sorted(window, key=lambda t: (-float(mixed[t]), t))[:k])
        rest = [t for t in window if t not in kept]
        for place in kept:
            merged = frames[place].clone()
            for other in rest:
                merged += (
                    config.merge_weight * weight(config, similarity, window, kept, rest, other, place) * frames[other]
                )
            stream.append(merged)
        kept_frames += kept
        target = torch.stack([lengths[a] + sum(similarity[a, b] for b in window) / len(window) for a in window])
        target = (target.detach() / config.score_temperature).softmax(0)
        guess = (predicted[window] / config.score_temperature).log_softmax(0)
        losses.append((target * (target.log() - guess)).nansum())
    return torch.stack(stream), mixed, kept_frames, losses


def weight(config, similarity, window, kept, rest, other, place):
    """A[other, place]."""
    tau = config.merge_temperature
    if config.merge_normalization == "rest":
        return math.exp(similarity[other, place] / tau) / sum(math.exp(similarity[r, place] / tau) for r in rest)
    whole = sum(math.exp(similarity[other, b] / tau) for b in window)
    spread = {b: math.exp(similarity[other, b] / tau) / whole for b in kept}
    return spread[place] / (sum(spread.values()) + EPS)


def interact(state, config, streams):
    n = len(streams)
    means = [stream.mean(0) for stream in streams]
    gates, updated = means[0].new_zeros(n, n), []
    for j in range(n):
        sources = []
        for i in range(n):
            if not interacts(config, i, j):
                continue
            first, second = (i, j) if config.interaction_gates == "edge" else (min(i, j), max(i, j))
            hidden = linear(state, f"interaction.gates.{first}_{second}.0", torch.cat([means[first], means[second]]))
            gates[i, j] = linear(state, f"interaction.gates.{first}_{second}.2", hidden.relu())[0].sigmoid()
            if gates[i, j] >= config.gate_threshold:
                sources.append(gates[i, j] * message(state, config, streams, i, j))
        if config.interaction_update == "last":
            sources = sources[-1:]
        updated.append(streams[j] + sum(sources) if sources else streams[j])
    return updated, gates


def interacts(config, i, j):
    a, b = config.rates[i], config.rates[j]
    direction = "fast_to_slow" if a < b else "slow_to_fast"
    across = config.interaction_pairs == "all" or (min(a, b) < config.slow_rate <= max(a, b))
    return a != b and across and config.interaction in ("both", direction)


def message(state, config, streams, i, j):
    source, length = streams[i], len(streams[j])
    if config.rates[i] > config.rates[j]:
        return linear(state, "interaction.slow_to_fast", resample(source, length))
    kernel = state[f"interaction.fast_to_slow.{i}_{j}.weight"]  # (out, in, 5)
    stride = max(1, config.rates[j] // config.rates[i])
    out = []
    for centre in range(0, len(source), stride):
        total = kernel.new_zeros(kernel.shape[0])
        for tap in range(5):
            if 0 <= (t := centre + tap - 2) < len(source):
                total += kernel[:, :, tap] @ source[t]
        out.append(total)
    return resample(torch.stack(out), length)


def resample(x, length):
    """Linear interpolation in time, frame centres aligned (align_corners=False)."""
    if len(x) == length:
        return x
    out = []
    for t in range(length):
        place = min(max((t + 0.5) * len(x) / length - 0.5, 0), len(x) - 1)
        low = min(int(place), len(x) - 1)
        high = min(low + 1, len(x) - 1)
        out.append(x[low] * (1 - (place - low)) + x[high] * (place - low))
    return torch.stack(out)


def expert(state, name, config, x):
    query, key, value = linear(state, f"{name}.attention.qkv", x).chunk(3, dim=-1)
    attended = heads(query, key, value, config.num_attention_heads)[0]
    x = norm(state, f"{name}.attention_norm", x + linear(state, f"{name}.attention.out_proj", attended))
    hidden = linear(state, f"{name}.mlp.0", x)
    hidden = linear(state, f"{name}.mlp.2", hidden * torch.sigmoid(1.702 * hidden))
    return norm(state, f"{name}.mlp_norm", x + hidden)


def heads(query, key, value, num_heads):
    width = query.shape[-1] // num_heads
    outputs, weights = [], []
    for h in range(num_heads):
        part = slice(h * width, (h + 1) * width)
        weights.append((query[:, part] @ key[:, part].T / math.sqrt(width)).softmax(-1))
        outputs.append(weights[-1] @ value[:, part])
    return torch.cat(outputs, dim=-1), torch.stack(weights)


def read_out(state, config, outputs):
    tokens = torch.cat(outputs)
    query = linear(state, "readout.query_proj", state["readout.query"][0])
    key, value = linear(state, "readout.key_value_proj", tokens).chunk(2, dim=-1)
    attended, weights = heads(query, key, value, config.num_attention_heads)
    mass, weights, start = weights.mean(0)[0], [], 0
    for output in outputs:
        weights.append(mass[start : start + len(output)].sum())
        start += len(output)
    return norm(state, "readout.norm", linear(state, "readout.out_proj", attended)[0]), torch.stack(weights)
