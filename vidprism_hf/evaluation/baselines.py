"""What VidPrism's head is compared with on the same features: a linear probe, a transformer, a homogeneous mixture.

The last two take the place of the temporal model in a `VidPrismForVideoClassification`, so that classifier, loss and
training are the same. They are for comparison alone and travel with no checkpoint.

Shapes: N clips, B clips of a batch, T frames, D width, E experts, K classes.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from ..model import VidPrismConfig, VidPrismForVideoClassification
from ..model.outputs_vidprism import VidPrismModelOutput
from ..model.temporal_vidprism import (
    VidPrismExpert,
    VidPrismFeatureNorm,
    expert_diversity_loss,
    gate_balance_loss,
    pool_windows,
)

PROBE_DECAYS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


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
    layers = [VidPrismFeatureNorm(config.feature_size)] if config.feature_norm == "running" else []
    if config.feature_size != config.hidden_size:
        layers.append(nn.Linear(config.feature_size, config.hidden_size))
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
    """Multinomial logistic regression on standardised features, with an L2 penalty chosen by cross-validation.

    It is fitted to convergence by L-BFGS. The penalty is that with most right clips when one group of the training
    clips after the other is held out: no test clip has a say.

    Args:
        num_labels: K.
        decays: Penalties to choose from, of the squared weights beside the mean loss.
    """

    def __init__(self, num_labels: int, decays: tuple[float, ...] = PROBE_DECAYS):
        self.num_labels, self.decays, self.decay = num_labels, decays, decays[0]

    def fit(self, features: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor) -> "LinearProbe":
        """Fits to features (N, D), labels (N,) and group numbers (N,), of which there are at least two."""
        right = dict.fromkeys(self.decays, 0)
        for group in groups.unique():
            inner, held_out = groups != group, groups == group
            for decay in self.decays:
                weights = self._solve(features[inner], labels[inner], decay)
                right[decay] += (_scores(features[held_out], weights).argmax(-1) == labels[held_out]).sum().item()
        # Of equally good ones the strongest.
        self.decay = max(self.decays, key=lambda decay: (right[decay], decay))
        self._weights = self._solve(features, labels, self.decay)
        return self

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (N, K) of features (N, D)."""
        return _scores(features, self._weights)

    def _solve(self, features: torch.Tensor, labels: torch.Tensor, decay: float) -> tuple[torch.Tensor, ...]:
        mean, deviation = standardisation(features)
        inputs = (features - mean) / deviation
        weight = torch.zeros(features.shape[1], self.num_labels, requires_grad=True)
        bias = torch.zeros(self.num_labels, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(inputs @ weight + bias, labels) + decay * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return mean, deviation, weight.detach(), bias.detach()


def _scores(features: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
    mean, deviation, weight, bias = weights
    return (features - mean) / deviation @ weight + bias


def standardisation(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation (D,) of features (..., D); a channel that is constant has an infinite deviation."""
    flat = features.flatten(0, -2)
    mean, deviation = flat.mean(dim=0), flat.std(dim=0)
    return mean, torch.where(deviation > 1e-6 * mean.abs() + 1e-12, deviation, torch.inf)
