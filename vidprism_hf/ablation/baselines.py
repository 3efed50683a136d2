"""What VidPrism's head is compared with on the same features: a linear probe, a transformer, a homogeneous mixture.

The last two take the place of the temporal model in a `VidPrismForVideoClassification`, so that classifier, loss and
training are the same. They are for comparison alone and travel with no checkpoint.

Shapes: N clips, B clips of a batch, T frames, D width, E experts, K classes.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from ..model import VidPrismConfig, VidPrismForVideoClassification
from ..model.outputs_vidprism import VidPrismModelOutput
from ..model.temporal_vidprism import (
    VidPrismExpert,
    VidPrismFeatureWhitening,
    expert_diversity_loss,
    gate_balance_loss,
    pool_windows,
)

PROBE_PENALTIES = tuple(10 ** (exponent / 2) for exponent in range(-8, 5))
TIME_WEIGHTS = (0.0, 0.3)


class TemporalTransformer(nn.Module):
    """Transformer layers over all frames with learned positions, and their mean; as many as VidPrism has parameters.

    The layers are VidPrism's experts.
    """

    def __init__(self, config: VidPrismConfig, size: int):
        super().__init__()
        width = config.hidden_size
        self.input = input_layers(config)
        self.position_embedding = nn.Parameter(torch.randn(1, config.num_frames, width) * 0.02)
        of_layer = parameters_of(VidPrismExpert(config))
        self.layers = nn.ModuleList(VidPrismExpert(config) for _ in range(max(1, round(size / of_layer))))

    def forward(self, frame_features: torch.Tensor, **kwargs) -> VidPrismModelOutput:
        """(B, T, D_features) to clip vectors (B, D); T is that of the configuration."""
        tokens = self.input(frame_features) + self.position_embedding
        for layer in self.layers:
            tokens = layer(tokens)
        none = tokens.new_zeros(())
        return VidPrismModelOutput(
            last_hidden_state=tokens,
            pooler_output=tokens.mean(dim=1),
            expert_weights=tokens.new_ones(len(tokens), 1),
            rank_loss=none,
            gate_loss=none,
            diversity_loss=none,
        )


class HomogeneousMixture(nn.Module):
    """All experts on the same stream, weighted by a router, as in MoTE (Zhu et al., arXiv:2410.10589).

    The stream is the fastest of VidPrism's, by the mean of its windows; the router sees the clip's mean. The balance
    and diversity losses are VidPrism's.
    """

    def __init__(self, config: VidPrismConfig):
        super().__init__()
        width = config.hidden_size
        self.rate = config.rates[0]
        self.input = input_layers(config)
        self.experts = nn.ModuleList(VidPrismExpert(config) for _ in config.rates)
        self.router = nn.Linear(width, len(config.rates))

    def forward(self, frame_features: torch.Tensor, **kwargs) -> VidPrismModelOutput:
        """(B, T, D_features) to clip vectors (B, D)."""
        stream = pool_windows(self.input(frame_features), self.rate, "mean")
        outputs = [expert(stream) for expert in self.experts]
        weights = self.router(stream.mean(dim=1)).softmax(dim=-1)  # (B, E)
        means = torch.stack([output.mean(dim=1) for output in outputs], dim=1)
        return VidPrismModelOutput(
            pooler_output=(weights[..., None] * means).sum(dim=1),
            expert_weights=weights,
            rank_loss=weights.new_zeros(()),
            gate_loss=gate_balance_loss(weights.mean(dim=0)),
            diversity_loss=expert_diversity_loss(outputs),
        )


def input_layers(config: VidPrismConfig) -> nn.Sequential:
    """What frame features go through before VidPrism's streams are made."""
    if config.feature_norm == "whitened":
        return nn.Sequential(VidPrismFeatureWhitening(config.feature_size, config.hidden_size))
    layers = [] if config.feature_size == config.hidden_size else [nn.Linear(config.feature_size, config.hidden_size)]
    return nn.Sequential(*layers)


def with_baseline(model: VidPrismForVideoClassification, name: str) -> VidPrismForVideoClassification:
    """Puts a baseline (`transformer` or `mixture`) in the place of a new classifier's temporal model."""
    size = parameters_of(model.vidprism.temporal_model)
    build = {"transformer": partial(TemporalTransformer, size=size), "mixture": HomogeneousMixture}
    baseline = build[name](model.config)
    baseline.apply(model._init_weights)
    model.vidprism.temporal_model = baseline
    return model


def parameters_of(module: nn.Module) -> int:
    """Numbers that a module learns."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


class LinearProbe:
    """Ridge regression of the classes on the mean frame, with a penalty chosen by cross-validation.

    Frames are taken as they are, or whitened as `feature_norm: whitened` does. With time weights above 0 the classes'
    weights may vary with time too: beside the mean frame the probe reads the frames' means under the two slowest
    cosines of time, at that weight (the share of their variance beside the mean frame's). Penalty and time weight are
    those with most right clips when one group of the training clips after the other is held out: no test clip has a
    say.

    Args:
        num_labels: K.
        penalties: To choose from, of the squared weights beside the sum of squared errors, in units of the mean
            squared length of what the probe reads of a clip.
        time_weights: Time weights to choose from.
        whitened: Whether frames are whitened.
    """

    def __init__(
        self,
        num_labels: int,
        penalties: tuple[float, ...] = PROBE_PENALTIES,
        time_weights: tuple[float, ...] = (0.0,),
        whitened: bool = False,
    ):
        self.num_labels, self.whitened = num_labels, whitened
        self._penalties, self._time_weights = penalties, time_weights

    def fit(self, frames: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor) -> "LinearProbe":
        """Fits to frames (N, T, D), labels (N,) and group numbers (N,), of which there are at least two."""
        right = {(weight, penalty): 0 for weight in self._time_weights for penalty in self._penalties}
        for group in groups.unique() if len(right) > 1 else ():
            inner, held_out = groups != group, groups == group
            for weight in self._time_weights:
                solve = self._prepared(frames[inner], labels[inner], weight)
                inputs = self._inputs(frames[held_out])
                for penalty in self._penalties:
                    solve(penalty)
                    right[weight, penalty] += (self._logits(inputs).argmax(-1) == labels[held_out]).sum().item()
        # Of equally good ones the plainest: the least weight on time, then the strongest penalty.
        self.time_weight, self.penalty = max(right, key=lambda choice: (right[choice], -choice[0], choice[1]))
        self._prepared(frames, labels, self.time_weight)(self.penalty)
        return self

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Logits (N, K) of frames (N, T, D)."""
        return self._logits(self._inputs(frames))

    def _logits(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs - self._centre) @ self._weight + self._bias

    def _inputs(self, frames: torch.Tensor) -> torch.Tensor:
        """What is read of a clip, (N, D) or (N, 3 D)."""
        frames = self._normalised(frames).double()
        means = frames.mean(dim=1) * self._scales[0]
        if self.time_weight == 0:
            return means
        time = (torch.arange(frames.shape[1]) + 0.5) / frames.shape[1]
        waves = torch.stack([torch.cos(torch.pi * order * time) for order in (1, 2)]).double()
        slow = torch.einsum("ntd,kt->nkd", frames, waves).flatten(1) / frames.shape[1]
        return torch.cat([means, slow * self._scales[1]], dim=1)

    def _prepared(self, frames: torch.Tensor, labels: torch.Tensor, time_weight: float) -> Callable[[float], None]:
        """What solves for a penalty. It is the dual form, since there are few clips."""
        self.time_weight = time_weight
        self._normalised = whitening(frames) if self.whitened else lambda frames: frames
        self._scales, width = (1.0, 1.0), frames.shape[-1]
        size = (inputs := self._inputs(frames)).var(dim=0)  # each part comes to a variance of 1, or the time weight
        of_time = (time_weight / size[width:].sum() * width).sqrt().item() if time_weight else 1.0
        self._scales = ((width / size[:width].sum()).sqrt().item(), of_time)
        inputs, targets = self._inputs(frames), F.one_hot(labels, self.num_labels).double()
        self._centre, self._bias = inputs.mean(dim=0), targets.mean(dim=0)
        inputs, targets = inputs - self._centre, targets - self._bias
        values, vectors = torch.linalg.eigh(inputs @ inputs.T)
        to_weight, turned, unit = inputs.T @ vectors, vectors.T @ targets, values.mean()

        def solve(penalty: float) -> None:
            self._weight = to_weight @ (turned / (values.clamp(min=0) + penalty * unit)[:, None])

        return solve


def whitening(features: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's whitening, fitted to features (..., D)."""
    norm = VidPrismFeatureWhitening(features.shape[-1], features.shape[-1])
    norm.fit([features])
    return norm
