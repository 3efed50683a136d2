"""The three temporal blocks of VidPrism: RgSTA, DBI and HMoE (method section of the paper).

Shapes: B clips, T frames, D width, N streams (= experts), r rate of a stream, k frames kept per window,
w = k * r frames in a window, W = ceil(T / w) windows, L_i frames in stream i, H heads.

Loops run over streams and edges, which are few and fixed by the configuration; never over clips, frames or
windows. Nothing branches on data or waits for the device. At these sizes a step costs what its operations cost to
start, so what is small goes through all streams in one operation: RgSTA, the gates, the way up of DBI. The layers of
these are `VidPrismWeights`; all others compute in their own forward.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward
from transformers.utils.generic import maybe_autocast

from .configuration_vidprism import VidPrismConfig
from .tower_vidprism import QuickGELU

MERGE_EPS = 1e-6  # the released code's guard of the "kept" normalisation
# Of the mean variance, what whitening adds to that of each direction: few clips do not tell the small ones.
SHRINKAGE = 0.1


class VidPrismFeatureWhitening(nn.Module):
    """Takes from frame features, (B, T, D_features), what training frames have in common: mean, scales, correlations.

    An affine map to (B, T, D) that is fitted once, before a training, and kept with the weights. What tells classes
    apart in the features of a frozen tower often lies in directions of little variance, below that of scene and
    person: few clips do not suffice to learn that. The map stays in float32 in a model of half precision: rounded, it
    would shift all outputs by the same amount.
    """

    def __init__(self, feature_size: int, width: int):
        super().__init__()
        if width > feature_size:
            raise ValueError(f"feature_norm: whitening makes no {width} channels (hidden_size) of {feature_size}")
        # Stated, and so transformers, which builds and loads a model in its precision, leaves them in theirs.
        self.register_buffer("mean", torch.zeros(feature_size, dtype=torch.float32))
        self.register_buffer("weight", torch.eye(width, feature_size, dtype=torch.float32))
        self.register_buffer("num_frames", torch.zeros((), dtype=torch.long))  # that it was fitted to

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        def precise(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if applied.itemsize >= 4 else tensor.to(applied.device)

        return super()._apply(precise, recurse)  # what .to(dtype), .half() and .bfloat16() go through

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        # In full precision: small directions are differences of large numbers.
        with maybe_autocast(frames.device.type, enabled=False):
            return F.linear(frames.float() - self.mean.float(), self.weight.float()).to(frames.dtype)

    @torch.no_grad()
    def fit(self, clips: Iterable[torch.Tensor]) -> None:
        """Fits the map to the frames (..., D_features) of training clips.

        With their covariance C and its mean variance v the map is (C + 0.1 v I)^(-1/2), scaled to outputs of mean
        square 1. With D < D_features it is that of the D directions of most variance, turned at random: AdamW moves
        all channels alike, so none should be a direction of little variance by itself. At D = D_features there is one
        such map. Below it the signs of directions are LAPACK's choice, so that another machine may start from another
        rotation, as from another seed.

        Raises:
            ValueError: If there are no two different frames, or features are not finite.
        """
        number, total, products = 0, 0.0, 0.0
        for clip in clips:
            frames = clip.detach().flatten(0, -2).double().cpu()
            number, total = number + len(frames), total + frames.sum(dim=0)
            products = products + frames.T @ frames
        if number < 2:
            raise ValueError(f"{number} frames, whitening needs two at least")
        if not torch.isfinite(products).all():
            raise ValueError("features of frames are not finite numbers")
        mean = total / number
        variances, directions = torch.linalg.eigh(products / number - torch.outer(mean, mean))
        if variances.max() <= 1e-12 * products.diagonal().sum() / number:
            raise ValueError("all frames have the same features")
        live = variances > 1e-6 * variances.max()  # the others are rounding: constant channels
        gains = torch.where(live, (variances + SHRINKAGE * variances[live].mean()).rsqrt(), 0)
        width = len(self.weight)
        variances, directions, gains = variances[-width:], directions[:, -width:], gains[-width:]
        gains = gains / (gains.square() * variances)[live[-width:]].mean().sqrt()
        turned = directions if width == len(directions) else _rotation(width)
        self.mean.copy_(mean)
        self.weight.copy_(turned @ (gains[:, None] * directions.T))
        self.num_frames.fill_(number)


def _rotation(size: int) -> torch.Tensor:
    """A rotation that is the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


class VidPrismWeights(nn.Module):
    """A layer that hands over its weight and bias, for one operation on those of several layers.

    The weights pass through its call, so that whatever hooks into calls finds it: offloading (accelerate), weight
    norm, parametrisations. It is neither `nn.Linear` nor `nn.Conv1d`: what replaces these computes outputs of its own
    (LoRA's "all-linear", dynamic quantisation), for which nobody would ask here.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weight, self.bias


def stacked(layers: Iterable[VidPrismWeights]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights and biases of equal layers along a new first axis."""
    weights, biases = zip(*(layer() for layer in layers), strict=True)
    return torch.stack(weights), None if biases[0] is None else torch.stack(biases)


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
    """The weights of RgSTA for one stream; `VidPrismFrameMergers` computes with those of all streams at once."""

    def __init__(self, width: int):
        super().__init__()
        self.metric_proj = VidPrismWeights(nn.Linear(width, width))
        self.score_norm = VidPrismWeights(nn.LayerNorm(width))
        self.score_head = VidPrismWeights(nn.Linear(width, 1, bias=False))


class VidPrismFrameMergers(nn.ModuleList):
    """RgSTA, rate-guided spatio-temporal aggregation: the streams of all rates.

    In each window of k * r frames the k most important frames are kept, in temporal order, and the others are
    added to them by similarity. The last window may be shorter; of a window of k frames or fewer all are kept.

    Windows of all rates are taken in one pass: as masks (N, T, T) that tell which frames share a window. T is
    some dozens, so the entries outside the windows cost less than the operations that a pass for each rate adds.
    """

    def __init__(self, config: VidPrismConfig):
        super().__init__(VidPrismFrameMerger(config.hidden_size) for _ in config.rates)
        self.kept = config.kept_per_window
        self.windows = [config.kept_per_window * rate for rate in config.rates]
        self.merge_temperature = config.merge_temperature
        self.merge_weight = config.merge_weight
        self.score_mix = config.score_mix
        self.score_temperature = config.score_temperature
        self.merge_normalization = config.merge_normalization

    def forward(
        self, frames: torch.Tensor, output_rank_loss: bool = False
    ) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
        """Merges frames (B, T, D).

        Returns:
            The N streams (B, L_i, D), the importance scores s_mix (B, N, T), the N indices of the kept frames
            (B, L_i), and the rank loss (scalar) if it is asked for.
        """
        num_frames, width = frames.shape[1:]
        frame = torch.arange(num_frames, device=frames.device)
        window = torch.stack([frame // size for size in self.windows])  # (N, T)
        together = window[:, :, None] == window[:, None, :]  # (N, T, T)

        metric, predicted = self._project(frames)
        norm = frames.float().norm(dim=-1)[:, None]  # (B, 1, T)
        scores = self.score_mix * predicted + (1 - self.score_mix) * norm
        similarity = (metric @ metric.transpose(-1, -2)).float()  # (B, N, T, T); autocast makes halves of products
        similarity = similarity * (frame[:, None] != frame)

        # Kept are the k frames of a window that fewest others beat; of equal ones the first beats the second.
        mine, other = scores[..., :, None], scores[..., None, :]
        beaten = together & ((other > mine) | ((other == mine) & (frame < frame[:, None])))
        kept = beaten.sum(dim=-1) < self.kept  # (B, N, T)
        lengths = [num_frames // size * self.kept + min(num_frames % size, self.kept) for size in self.windows]
        first = torch.where(kept, frame, num_frames).sort(dim=-1).values.unbind(1)
        indices = [places[:, :length] for places, length in zip(first, lengths, strict=True)]

        weights = self._merge_weights(similarity, kept, together)
        rows = torch.cat([index + stream * num_frames for stream, index in enumerate(indices)], dim=1)
        weights = weights.flatten(1, 2).gather(1, rows[..., None].expand(-1, -1, num_frames)).to(frames.dtype)
        columns = torch.cat(indices, dim=1)
        chosen = frames.gather(1, columns[..., None].expand(-1, -1, width))
        merged = chosen + self.merge_weight * (weights @ frames)
        rank_loss = self._rank_loss(predicted, norm, similarity, window, together) if output_rank_loss else None
        return list(merged.split(lengths, dim=1)), scores, indices, rank_loss

    def _project(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The unit metric vectors (B, N, T, D) and the predicted scores (B, N, T) of all streams, in float32."""
        weight, bias = stacked(merger.metric_proj for merger in self)
        metric = F.linear(frames, weight.flatten(0, 1), bias.flatten()).unflatten(-1, (len(self), -1))  # (B, T, N, D)
        # The norms' scale and shift go into the score heads, so that one normalisation serves all streams.
        scale, shift = stacked(merger.score_norm for merger in self)
        heads = stacked(merger.score_head for merger in self)[0].squeeze(1)
        scale, shift = scale * heads, shift * heads
        normed = F.layer_norm(metric, metric.shape[-1:])
        predicted = (normed * scale).sum(dim=-1, dtype=torch.float32) + shift.sum(dim=-1, dtype=torch.float32)
        return F.normalize(metric.float(), dim=-1).transpose(1, 2), predicted.transpose(1, 2)

    def _merge_weights(self, similarity: torch.Tensor, kept: torch.Tensor, together: torch.Tensor) -> torch.Tensor:
        """A^T, in row u and column t the weight of frame t in frame u, (B, N, T, T).

        It is zero where t is kept itself or of another window; rows of frames that are not kept have no meaning.
        """
        logits = similarity / self.merge_temperature
        if self.merge_normalization == "kept":
            # The released form: a softmax over the whole window, then renormalised over the kept frames.
            spread = logits.masked_fill(~together, -torch.inf).softmax(dim=-2) * kept[..., :, None]
            weights = spread / (spread.sum(dim=-2, keepdim=True) + MERGE_EPS)
            return weights * ~kept[..., None, :]
        # A window without rest frames has no finite entry: the lowest finite number keeps the softmax finite.
        rest = together & ~kept[..., None, :]
        return logits.masked_fill(~rest, torch.finfo(logits.dtype).min).softmax(dim=-1) * rest

    def _rank_loss(
        self,
        predicted: torch.Tensor,
        norm: torch.Tensor,
        similarity: torch.Tensor,
        window: torch.Tensor,
        together: torch.Tensor,
    ) -> torch.Tensor:
        """KL(target || predicted) of the scores' softmax in each window, mean over windows, clips and streams."""
        between = (similarity * together).sum(dim=-1) / together.sum(dim=-1)
        both = torch.stack([(norm + between).detach(), predicted]) / self.score_temperature  # (2, B, N, T)
        total = both[..., None, :].masked_fill(~together, -torch.inf).logsumexp(dim=-1)
        log_target, log_predicted = (both - total).unbind()
        divergence = log_target.exp() * (log_target - log_predicted)
        return (divergence.sum(dim=-1) / (window[:, -1] + 1)).mean()


class VidPrismInteraction(nn.Module):
    """DBI, dynamic bidirectional interaction: slow and fast streams exchange messages through gates.

    All messages are computed from the streams as they came in. A gate is decided for each clip alone; one below
    the threshold multiplies its message by exactly zero.
    """

    def __init__(self, config: VidPrismConfig):
        super().__init__()
        self.rates, width = config.rates, config.hidden_size
        self.threshold = config.gate_threshold
        self.last_wins = config.interaction_update == "last"
        self.edges = interaction_edges(config)
        # A pair's gate reads [fast; slow] and serves both directions, an edge's reads [source; destination].
        per_edge = config.interaction_gates == "edge"
        self.gate_of_edge = {edge: edge if per_edge else tuple(sorted(edge)) for edge in self.edges}
        self.gate_inputs = list(dict.fromkeys(self.gate_of_edge.values()))
        self.gates = nn.ModuleDict({f"{first}_{second}": gate_mlp(width) for first, second in self.gate_inputs})
        # Streams are sorted by rate. One 1x1 convolution serves all edges to a faster stream; applied before the
        # interpolation, with which it commutes, it runs once for each stream.
        upward = any(src > dst for src, dst in self.edges)
        self.slow_to_fast = nn.Linear(width, width) if upward else None
        self.fast_to_slow = nn.ModuleDict(
            {
                f"{src}_{dst}": VidPrismWeights(nn.Conv1d(width, width, 5, bias=False))
                for src, dst in self.edges
                if src < dst
            }
        )
        end_residual(*self.fast_to_slow.values(), *([self.slow_to_fast] if upward else []))

    def forward(self, streams: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Exchanges information between streams.

        Args:
            streams: N tensors (B, L_i, D), fast to slow.

        Returns:
            The streams after interaction, and the gates (B, N, N): entry [i, j] belongs to the edge i -> j and is 0
            where there is none.
        """
        gates, strength = self._gates(streams)
        updated = self._send_up(streams, strength)
        strengths = strength.flatten(1).unbind(1)
        padded = {src: F.pad(streams[src], (0, 0, 2, 2)) for src in {src for src, dst in self.edges if src < dst}}
        for src, dst in self.edges:
            if src < dst:
                message = self._message_down(padded[src], streams[dst].shape[1], src, dst)
                updated[dst] = updated[dst] + strengths[src * len(streams) + dst][:, None, None] * message
        return updated, gates

    def _gates(self, streams: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The gates (B, N, N), and how strongly each message counts: its gate where that is open, else 0."""
        means = [stream.mean(dim=1) for stream in streams]
        inputs = torch.cat([means[index] for pair in self.gate_inputs for index in pair], dim=-1)
        values = inputs.unflatten(-1, (len(self.gates), -1)).transpose(0, 1)  # (gates, B, 2 D)
        values = _linear_of_each(values, [gate["0"] for gate in self.gates.values()]).relu()
        values = _linear_of_each(values, [gate["2"] for gate in self.gates.values()]).sigmoid().squeeze(-1)
        by_gate = dict(zip(self.gate_inputs, values.unbind(), strict=True))
        none = -torch.ones_like(values[0])  # below every threshold
        pairs = [(src, dst) for src in range(len(streams)) for dst in range(len(streams))]
        table = torch.stack([by_gate.get(self.gate_of_edge.get(pair), none) for pair in pairs], dim=-1)
        table = table.unflatten(-1, (len(streams), -1))
        is_open = table >= self.threshold
        if self.last_wins:
            from_here_on = is_open.flip(1).cumsum(dim=1).flip(1)
            is_open = is_open & (from_here_on == 1)
        return table.clamp_min(0), table * is_open

    def _send_up(self, streams: Sequence[torch.Tensor], strength: torch.Tensor) -> list[torch.Tensor]:
        """The streams with all messages of slower ones: each is interpolated in time to the faster stream's length.

        Interpolation, gates and the sum over sources are one matrix for each clip, (frames of all streams)^2.
        """
        if self.slow_to_fast is None:
            return list(streams)
        lengths = [stream.shape[1] for stream in streams]
        frames = torch.cat(list(streams), dim=1)
        upward = strength.tril(-1).transpose(1, 2)  # (B, destination, source), next spread over the streams' frames
        rows = [row.expand(-1, n, -1) for row, n in zip(upward.split(1, dim=1), lengths, strict=True)]
        columns = torch.cat(rows, dim=1).split(1, dim=2)
        upward = torch.cat([column.expand(-1, -1, n) for column, n in zip(columns, lengths, strict=True)], dim=2)
        mixing = upward * interpolation(lengths, frames.device).to(upward.dtype)
        return list((frames + mixing @ self.slow_to_fast(frames)).split(lengths, dim=1))

    def _message_down(self, stream: torch.Tensor, length: int, src: int, dst: int) -> torch.Tensor:
        """The temporal convolution of an edge on a padded stream, resampled where it comes out at another length.

        As a matrix product over unfolded frames: the libraries' convolutions are slow at so few frames.
        """
        stride = max(1, self.rates[dst] // self.rates[src])
        frames = stream.unfold(1, 5, stride).flatten(2)  # (B, L, 5 D)
        weight, _ = self.fast_to_slow[f"{src}_{dst}"]()
        message = F.linear(frames, weight.flatten(1))
        if message.shape[1] != length:
            message = F.interpolate(message.transpose(1, 2), size=length, mode="linear").transpose(1, 2)
        return message


def _linear_of_each(values: torch.Tensor, layers: Iterable[VidPrismWeights]) -> torch.Tensor:
    """Layer i on values[i], (G, B, in) -> (G, B, out)."""
    weight, bias = stacked(layers)
    return torch.baddbmm(bias[:, None], values, weight.transpose(1, 2))


def interpolation(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Linear interpolation in time between streams that lie one after the other, (sum of L_i, sum of L_i).

    Row t, column s is the weight of frame s in frame t, were the stream of s resampled to the length of the stream
    of t. Frames stand for equal parts of the clip (`align_corners=False` of `F.interpolate`, whose values these are).
    """
    place = torch.cat([torch.arange(length, device=device) for length in lengths])
    length = torch.cat([torch.full((length,), float(length), device=device) for length in lengths])
    position = ((place + 0.5) / length)[:, None] * length - 0.5
    position = torch.minimum(position.clamp_min(0), length - 1)
    return (1 - (position - place).abs()).clamp_min(0)


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


class VidPrismGateOutput(VidPrismWeights):
    """The last linear layer of a gate: a class of its own because it is initialised in its own way."""


def end_residual(*layers: nn.Module) -> None:
    """Marks the last layers of residual branches, which `zero_init_residual` is about."""
    for layer in layers:
        layer.ends_residual = True


def gate_mlp(width: int) -> nn.ModuleDict:
    """The layers of a gate's MLP, 2D -> D/4 -> 1, by their places between ReLU and sigmoid."""
    return nn.ModuleDict(
        {
            "0": VidPrismWeights(nn.Linear(2 * width, width // 4)),
            "2": VidPrismGateOutput(nn.Linear(width // 4, 1)),
        }
    )


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
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), QuickGELU(), nn.Linear(2 * width, width))
        self.mlp_norm = nn.LayerNorm(width)
        end_residual(self.attention.out_proj, self.mlp[-1])

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

    def forward(self, tokens: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pools N expert outputs that lie one after the other in time, (B, sum of L_i, D).

        Returns:
            The clip vector (B, D) and the expert weights (B, N), which sum to 1: the attention mass on each expert
            (mean over heads); its share of the frames for "mean"; its share of the channels for "max".
        """
        if self.how == "query":
            pooled, mass = self._attend(tokens)
        elif self.how == "mean":
            pooled = tokens.mean(dim=1)
            mass = tokens.new_full(tokens.shape[:2], 1 / tokens.shape[1])
        else:
            pooled, winners = tokens.max(dim=1)
            places = torch.arange(tokens.shape[1], device=tokens.device)
            mass = (winners[..., None] == places).to(tokens.dtype).mean(dim=1)
        weights = torch.stack([part.sum(dim=1) for part in mass.split(list(lengths), dim=1)], dim=1)
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
    directions = F.normalize(means, dim=-1)
    cosine = directions @ directions.transpose(-1, -2)
    num_experts = means.shape[1]
    pairs = max(1, num_experts * (num_experts - 1) // 2)
    return cosine.square().triu(diagonal=1).sum(dim=(-1, -2)).mean() / pairs


__all__ = [
    "VidPrismAttention",
    "VidPrismExpert",
    "VidPrismFeatureWhitening",
    "VidPrismFrameMergers",
    "VidPrismGateOutput",
    "VidPrismInteraction",
    "VidPrismReadout",
    "VidPrismWeights",
    "expert_diversity_loss",
    "gate_balance_loss",
    "interaction_edges",
    "pool_windows",
]
