"""Baselines that replace VidPrism's temporal model: a transformer, and a homogeneous mixture of experts.

Classifier, loss and training stay the same. They serve comparisons alone and are part of no checkpoint.

Shapes: B clips, T frames, D width, E experts.
"""

from functools import partial

import torch
from torch import nn

from ..model import VidPrismConfig, VidPrismForVideoClassification
from ..model.outputs_vidprism import VidPrismModelOutput
from ..model.temporal_vidprism import (
    VidPrismExpert,
    VidPrismFeatureWhitening,
    expert_diversity_loss,
    gate_balance_loss,
    pool_windows,
)


class TemporalTransformer(nn.Module):
    """Transformer layers over all frames with learned positions, then their mean.

    The layers are VidPrism's experts, as many as make up its number of parameters.
    """

    def __init__(self, config: VidPrismConfig, size: int):
        super().__init__()
        width = config.hidden_size
        self.input = input_layers(config)
        self.position_embedding = nn.Parameter(torch.randn(1, config.num_frames, width) * 0.02)
        layer_size = num_trainable(VidPrismExpert(config))
        self.layers = nn.ModuleList(VidPrismExpert(config) for _ in range(max(1, round(size / layer_size))))

    def forward(self, frame_features: torch.Tensor, **kwargs) -> VidPrismModelOutput:
        """Maps (B, T, D_features) to clip vectors (B, D); T must be `config.num_frames`."""
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
    """Experts on one stream, weighted by a router, as in MoTE (Zhu et al., arXiv:2410.10589).

    The stream is VidPrism's fastest, as window means; the router reads the clip's mean. Balance and diversity losses
    are VidPrism's.
    """

    def __init__(self, config: VidPrismConfig):
        super().__init__()
        width = config.hidden_size
        self.rate = config.rates[0]
        self.input = input_layers(config)
        self.experts = nn.ModuleList(VidPrismExpert(config) for _ in config.rates)
        self.router = nn.Linear(width, len(config.rates))

    def forward(self, frame_features: torch.Tensor, **kwargs) -> VidPrismModelOutput:
        """Maps (B, T, D_features) to clip vectors (B, D)."""
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
    """Returns the layers that map frame features to the head's width, as in VidPrism."""
    if config.feature_norm == "whitened":
        return nn.Sequential(VidPrismFeatureWhitening(config.feature_size, config.hidden_size))
    layers = [] if config.feature_size == config.hidden_size else [nn.Linear(config.feature_size, config.hidden_size)]
    return nn.Sequential(*layers)


def with_baseline(model: VidPrismForVideoClassification, name: str) -> VidPrismForVideoClassification:
    """Replaces a new classifier's temporal model by a baseline, `transformer` or `mixture`."""
    size = num_trainable(model.vidprism.temporal_model)
    build = {"transformer": partial(TemporalTransformer, size=size), "mixture": HomogeneousMixture}
    baseline = build[name](model.config)
    baseline.apply(model._init_weights)
    model.vidprism.temporal_model = baseline
    return model


def num_trainable(module: nn.Module) -> int:
    """Returns a module's number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
