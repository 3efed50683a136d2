"""The three temporal blocks of VidPrism: RgSTA, DBI and HMoE (method section of the paper).

Shapes: B clips, T frames, D width, N streams (= experts), r rate of a stream, k frames kept per window,
w = k * r frames in a window, W = ceil(T / w) windows, L_i frames in stream i, H heads.

Loops run over streams and edges, which are few and fixed by the configuration; never over clips, frames or
windows. Nothing branches on data or waits for the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

from .configuration_vidprism import VidPrismConfig

MERGE_EPS = 1e-6  # the released code's guard of the "kept" normalisation


def split_into_windows(frames: torch.Tensor, window: int, fill: float = 0.0) -> torch.Tensor:
    """Cuts (B, T, ...) into windows (B, W, w, ...); the last one is filled up with `fill`."""
    missing = -frames.shape[1] % window
    if missing:
        frames = F.pad(frames, (0, 0) * (frames.dim() - 2) + (0, missing), value=fill)
    return frames.unflatten(1, (-1, window))


def window_validity(num_frames: int, window: int, device: torch.device) -> torch.Tensor:
    """Which places of the windows hold a frame, (W, w) bool."""
    num_windows = math.ceil(num_frames / window)
    return (torch.arange(num_windows * window, device=device) < num_frames).view(num_windows, window)


def pool_windows(frames: torch.Tensor, rate: int, how: str) -> torch.Tensor:
    """The ablation's aggregations: one frame of (B, ceil(T / r), D) is the window's first, mean or max."""
    if how == "stride":
        return frames[:, ::rate]
    if how == "max":
        return split_into_windows(frames, rate, fill=torch.finfo(frames.dtype).min).amax(dim=2)
    counts = window_validity(frames.shape[1], rate, frames.device).sum(dim=1)
    return split_into_windows(frames, rate).sum(dim=2) / counts[:, None].to(frames.dtype)


class VidPrismFrameMerger(nn.Module):
    """RgSTA, rate-guided spatio-temporal aggregation: the stream of one rate.

    In each window of k * r frames the k most important frames are kept, in temporal order, and the others are
    added to them by similarity. The last window may be shorter; of a window of k frames or fewer all are kept.
    """

    def __init__(self, config: VidPrismConfig, rate: int):
        super().__init__()
        self.kept = config.kept_per_window
        self.window = config.kept_per_window * rate
        self.merge_temperature = config.merge_temperature
        self.merge_weight = config.merge_weight
        self.score_mix = config.score_mix
        self.score_temperature = config.score_temperature
        self.merge_normalization = config.merge_normalization
        self.metric_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.score_norm = nn.LayerNorm(config.hidden_size)
        self.score_head = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Merges frames (B, T, D).

        Returns:
            The stream (B, L, D), the importance scores s_mix (B, T), the indices of the kept frames (B, L) and the
            rank loss (scalar), all in the order of the paper.
        """
        num_frames, kept = frames.shape[1], self.kept
        valid = window_validity(num_frames, self.window, frames.device)
        metric = self.metric_proj(frames)
        predicted = self.score_head(self.score_norm(metric)).squeeze(-1).float()
        norm = frames.float().norm(dim=-1)
        scores = self.score_mix * predicted + (1 - self.score_mix) * norm

        metric = split_into_windows(F.normalize(metric.float(), dim=-1), self.window)
        similarity = metric @ metric.transpose(-1, -2)
        similarity = similarity * (1 - torch.eye(self.window, device=frames.device))
        kept_places = self._most_important(scores)
        rest = valid & ~(kept_places[..., None] == torch.arange(self.window, device=frames.device)).any(dim=2)

        weights = self._merge_weights(similarity, kept_places, valid, rest).to(frames.dtype)
        windows = split_into_windows(frames, self.window)
        chosen = windows.gather(2, kept_places[..., None].expand(-1, -1, -1, windows.shape[-1]))
        merged = chosen + self.merge_weight * (weights.transpose(-1, -2) @ windows)

        # A short last window fills its k places from the front: padding has the highest places.
        last = num_frames - (valid.shape[0] - 1) * self.window
        length = (valid.shape[0] - 1) * kept + min(kept, last)
        offsets = torch.arange(valid.shape[0], device=frames.device)[:, None] * self.window
        indices = (kept_places + offsets).flatten(1)[:, :length]
        rank_loss = self._rank_loss(predicted, norm, similarity, valid)
        return merged.flatten(1, 2)[:, :length], scores, indices, rank_loss

    def _most_important(self, scores: torch.Tensor) -> torch.Tensor:
        """Places (B, W, k) of the highest scores (B, T) in each window, in temporal order; ties go to the first."""
        scores = split_into_windows(scores, self.window, fill=-torch.inf)
        return scores.argsort(dim=-1, descending=True, stable=True)[..., : self.kept].sort(dim=-1).values

    def _merge_weights(
        self, similarity: torch.Tensor, kept_places: torch.Tensor, valid: torch.Tensor, rest: torch.Tensor
    ) -> torch.Tensor:
        """A, weight of each frame of a window in each kept frame, (B, W, w, k); zero where the frame is not rest."""
        columns = kept_places[:, :, None, :].expand(-1, -1, self.window, -1)
        logits = similarity / self.merge_temperature
        if self.merge_normalization == "kept":
            # The released form: a softmax over the whole window, then renormalised over the kept frames.
            spread = logits.masked_fill(~valid[:, None, :], -torch.inf).softmax(dim=-1).gather(-1, columns)
            kept_valid = valid.expand_as(rest).gather(-1, kept_places)
            spread = spread * kept_valid[:, :, None, :]
            weights = spread / (spread.sum(dim=-1, keepdim=True) + MERGE_EPS)
        else:
            # A window without rest frames has no finite entry: the lowest finite number keeps the softmax finite.
            lowest = torch.finfo(logits.dtype).min
            weights = logits.gather(-1, columns).masked_fill(~rest[..., None], lowest).softmax(dim=-2)
        return weights * rest[..., None]

    def _rank_loss(
        self, predicted: torch.Tensor, norm: torch.Tensor, similarity: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """KL(target || predicted) of the scores' softmax in each window, mean over windows and clips."""
        counts = valid.sum(dim=-1)[:, None]
        between = (similarity * valid[:, None, :]).sum(dim=-1) / counts
        target = (split_into_windows(norm, self.window) + between).detach() / self.score_temperature
        predicted = split_into_windows(predicted, self.window) / self.score_temperature
        lowest = torch.finfo(target.dtype).min
        log_target = target.masked_fill(~valid, lowest).log_softmax(dim=-1)
        log_predicted = predicted.masked_fill(~valid, lowest).log_softmax(dim=-1)
        divergence = log_target.exp() * (log_target - log_predicted)
        return divergence.masked_fill(~valid, 0.0).sum(dim=-1).mean()


class VidPrismInteraction(nn.Module):
    """DBI, dynamic bidirectional interaction: slow and fast streams exchange messages through gates.

    All messages are computed from the streams as they came in. A gate is decided for each clip alone; one below
    the threshold multiplies its message by exactly zero.
    """

    def __init__(self, config: VidPrismConfig):
        super().__init__()
        self.rates = tuple(config.rates)
        self.threshold = config.gate_threshold
        self.gate_per_edge = config.interaction_gates == "edge"
        self.last_wins = config.interaction_update == "last"
        self.edges = interaction_edges(config)
        width = config.hidden_size
        self.gates = nn.ModuleDict({self._gate_name(*edge): gate_mlp(width) for edge in self.edges})
        # One 1x1 convolution serves all edges to a faster stream; applied before the interpolation, with which it
        # commutes, it runs once for each slow stream.
        upward = any(self.rates[src] > self.rates[dst] for src, dst in self.edges)
        self.slow_to_fast = nn.Linear(width, width) if upward else None
        self.fast_to_slow = nn.ModuleDict(
            {
                f"{src}_{dst}": nn.Conv1d(
                    width, width, 5, stride=max(1, self.rates[dst] // self.rates[src]), padding=2, bias=False
                )
                for src, dst in self.edges
                if self.rates[src] < self.rates[dst]
            }
        )

    def forward(self, streams: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Exchanges information between streams.

        Args:
            streams: N tensors (B, L_i, D), fast to slow.

        Returns:
            The streams after interaction, and the gates (B, N, N): entry [i, j] belongs to the edge i -> j and is 0
            where there is none.
        """
        summaries = [stream.mean(dim=1) for stream in streams]
        gates = {edge: self._gate(edge, summaries) for edge in self.edges}
        upward = {
            src: self.slow_to_fast(streams[src])
            for src in {src for src, dst in self.edges if self.rates[src] > self.rates[dst]}
        }
        updated = []
        for dst, stream in enumerate(streams):
            edges = [edge for edge in self.edges if edge[1] == dst]
            messages = [self._message(edge, streams, upward) for edge in edges]
            updated.append(stream + self._combine(messages, [gates[e] for e in edges]) if edges else stream)
        none = summaries[0].new_zeros(summaries[0].shape[0])
        size = range(len(streams))
        table = torch.stack([torch.stack([gates.get((i, j), none) for j in size], dim=-1) for i in size], dim=-2)
        return updated, table

    def _gate_name(self, src: int, dst: int) -> str:
        return f"{src}_{dst}" if self.gate_per_edge else f"{min(src, dst)}_{max(src, dst)}"

    def _gate(self, edge: tuple[int, int], summaries: list[torch.Tensor]) -> torch.Tensor:
        """The gate (B,) of an edge. A pair's gate reads [fast; slow], an edge's [source; destination]."""
        first, second = edge if self.gate_per_edge else sorted(edge)
        pair = torch.cat([summaries[first], summaries[second]], dim=-1)
        return self.gates[self._gate_name(*edge)](pair).squeeze(-1)

    def _message(self, edge: tuple[int, int], streams: Sequence[torch.Tensor], upward: dict) -> torch.Tensor:
        """What an edge carries, (B, L_dst, D)."""
        src, dst = edge
        if src in upward and self.rates[src] > self.rates[dst]:
            message = upward[src].transpose(1, 2)
        else:
            message = self.fast_to_slow[f"{src}_{dst}"](streams[src].transpose(1, 2))
        length = streams[dst].shape[1]
        if message.shape[-1] != length:
            message = F.interpolate(message, size=length, mode="linear", align_corners=False)
        return message.transpose(1, 2)

    def _combine(self, messages: list[torch.Tensor], gates: list[torch.Tensor]) -> torch.Tensor:
        """The sum of the open sources' gated messages, or only the last open one's."""
        opened = [(gate >= self.threshold).to(gate.dtype) for gate in gates]
        if self.last_wins:
            later_closed = torch.ones_like(gates[0])
            for i in reversed(range(len(opened))):
                opened[i], later_closed = opened[i] * later_closed, later_closed * (1 - opened[i])
        return sum(
            (is_open * gate)[:, None, None] * message
            for is_open, gate, message in zip(opened, gates, messages, strict=True)
        )


def interaction_edges(config: VidPrismConfig) -> list[tuple[int, int]]:
    """The ordered pairs (source, destination) of streams that interact, by destination and then source."""
    rates = config.rates
    edges = []
    for dst in range(len(rates)):
        for src in range(len(rates)):
            fast, slow = min(rates[src], rates[dst]), max(rates[src], rates[dst])
            direction = "fast_to_slow" if rates[src] < rates[dst] else "slow_to_fast"
            if fast == slow or config.interaction not in ("both", direction):
                continue
            if config.interaction_pairs == "slow_fast" and not fast < config.slow_rate <= slow:
                continue
            edges.append((src, dst))
    return edges


class VidPrismGateOutput(nn.Linear):
    """The last linear layer of a gate: a class of its own because it is initialised in its own way."""


def gate_mlp(width: int) -> nn.Sequential:
    """The gate's MLP, 2D -> D/4 -> 1, ending in a sigmoid."""
    return nn.Sequential(nn.Linear(2 * width, width // 4), nn.ReLU(), VidPrismGateOutput(width // 4, 1), nn.Sigmoid())


class VidPrismAttention(nn.Module):
    """Multi-head self-attention of an expert, with the attention implementation of the configuration."""

    def __init__(self, config: VidPrismConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, L, D) -> (B, L, D), and the attention weights (B, H, L, L) where the implementation has them."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(hidden_states).chunk(3, dim=-1)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.out_proj(output.flatten(-2)), weights


class VidPrismExpert(GradientCheckpointingLayer):
    """One temporal expert: a post-norm transformer layer over its stream."""

    def __init__(self, config: VidPrismConfig):
        super().__init__()
        width = config.hidden_size
        self.attention = VidPrismAttention(config)
        self.attention_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), ACT2FN["quick_gelu"], nn.Linear(2 * width, width))
        self.mlp_norm = nn.LayerNorm(width)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """(B, L, D) -> (B, L, D)."""
        hidden_states = self.attention_norm(hidden_states + self.attention(hidden_states, **kwargs)[0])
        return self.mlp_norm(hidden_states + self.mlp(hidden_states))


class VidPrismReadout(nn.Module):
    """The clip vector: a global query attends over the frames of all experts (or their mean or max)."""

    def __init__(self, config: VidPrismConfig):
        super().__init__()
        width = config.hidden_size
        self.how = config.readout
        self.num_heads = config.num_attention_heads
        self.norm = nn.LayerNorm(width)
        if self.how == "query":
            self.query = nn.Parameter(torch.empty(1, 1, width))
            self.query_proj = nn.Linear(width, width)
            self.key_value_proj = nn.Linear(width, 2 * width)
            self.out_proj = nn.Linear(width, width)

    def forward(self, expert_outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pools N expert outputs (B, L_i, D).

        Returns:
            The clip vector (B, D) and the expert weights (B, N), which sum to 1: the attention mass on each expert
            (mean over heads); its share of the frames for "mean"; its share of the channels for "max".
        """
        lengths = [output.shape[1] for output in expert_outputs]
        tokens = torch.cat(list(expert_outputs), dim=1)
        if self.how == "query":
            pooled, mass = self._attend(tokens)
        elif self.how == "mean":
            pooled = tokens.mean(dim=1)
            mass = tokens.new_full(tokens.shape[:2], 1 / tokens.shape[1])
        else:
            pooled, winners = tokens.max(dim=1)
            places = torch.arange(tokens.shape[1], device=tokens.device)
            mass = (winners[..., None] == places).to(tokens.dtype).mean(dim=1)
        weights = torch.stack([part.sum(dim=1) for part in mass.split(lengths, dim=1)], dim=1)
        return self.norm(pooled), weights

    def _attend(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One query needs its weights in every case, so this attention is always the plain one."""
        query = self.query_proj(self.query).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.key_value_proj(tokens).chunk(2, dim=-1)
        )
        logits = query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5
        weights = logits.softmax(dim=-1, dtype=torch.float32)
        output = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(1)
        return self.out_proj(output), weights.mean(dim=1).squeeze(1)


def gate_balance_loss(mean_expert_weights: torch.Tensor) -> torch.Tensor:
    """N * sum of C_i^2 over the batch means C (N,) of the expert weights; 1 where the experts share equally."""
    return mean_expert_weights.shape[0] * mean_expert_weights.square().sum()


def expert_diversity_loss(expert_outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over pairs of experts and clips of cos^2 between their outputs' (B, L_i, D) temporal means.

    1 when all experts give the same output, 0 when they are orthogonal (or there is only one expert).
    """
    means = torch.stack([output.float().mean(dim=1) for output in expert_outputs], dim=1)
    cosine = F.normalize(means, dim=-1) @ F.normalize(means, dim=-1).transpose(-1, -2)
    num_experts = means.shape[1]
    pairs = max(1, num_experts * (num_experts - 1) // 2)
    return cosine.square().triu(diagonal=1).sum(dim=(-1, -2)).mean() / pairs


__all__ = [
    "VidPrismAttention",
    "VidPrismExpert",
    "VidPrismFrameMerger",
    "VidPrismGateOutput",
    "VidPrismInteraction",
    "VidPrismReadout",
    "expert_diversity_loss",
    "gate_balance_loss",
    "pool_windows",
]
