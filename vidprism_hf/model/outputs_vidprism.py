"""What the models return. Shapes: B clips, T frames, D width, N streams, L_i frames in stream i, K classes."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class VidPrismModelOutput(ModelOutput):
    """Clip vectors and what the streams, gates and experts did.

    Args:
        last_hidden_state: (B, sum of L_i, D), the outputs of all experts, one after the other in time.
        pooler_output: (B, D), the clip vector.
        expert_weights: (B, N), attention mass on each expert; sums to 1.
        gates: (B, N, N), entry [i, j] the gate of the edge from stream i to j, 0 where there is no edge.
        streams: N tensors (B, L_i, D) before interaction, with `output_streams=True`.
        interacted_streams: N tensors (B, L_i, D) after interaction, with `output_streams=True`.
        frame_scores: (B, N, T), importance of each frame for each stream, with `output_streams=True` (RgSTA only).
        kept_indices: N tensors (B, L_i), frames kept by each stream, with `output_streams=True` (RgSTA only).
        rank_loss: Scalar, mean over streams, with `output_losses=True`.
        gate_loss: Scalar, with `output_losses=True`.
        diversity_loss: Scalar, with `output_losses=True`.
        hidden_states: N tensors (B, L_i, D), the output of each expert, with `output_hidden_states=True`.
        attentions: N tensors (B, heads, L_i, L_i), with `output_attentions=True` under eager attention.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    expert_weights: torch.Tensor | None = None
    gates: torch.Tensor | None = None
    streams: tuple[torch.Tensor, ...] | None = None
    interacted_streams: tuple[torch.Tensor, ...] | None = None
    frame_scores: torch.Tensor | None = None
    kept_indices: tuple[torch.Tensor, ...] | None = None
    rank_loss: torch.Tensor | None = None
    gate_loss: torch.Tensor | None = None
    diversity_loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class VidPrismForVideoClassificationOutput(ModelOutput):
    """Logits, and the loss and its four parts when labels were given.

    Args:
        loss: Scalar, the weighted sum of the four parts below.
        logits: (B, K).
        classification_loss: Scalar, unweighted like the other parts.
        rank_loss: Scalar.
        gate_loss: Scalar.
        diversity_loss: Scalar.
        pooler_output: (B, D), the clip vector.
        expert_weights: (B, N).
        gates: (B, N, N).
        streams: See `VidPrismModelOutput`, as all that follow.
        interacted_streams: N tensors (B, L_i, D).
        frame_scores: (B, N, T).
        kept_indices: N tensors (B, L_i).
        hidden_states: N tensors (B, L_i, D).
        attentions: N tensors (B, heads, L_i, L_i).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    classification_loss: torch.Tensor | None = None
    rank_loss: torch.Tensor | None = None
    gate_loss: torch.Tensor | None = None
    diversity_loss: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    expert_weights: torch.Tensor | None = None
    gates: torch.Tensor | None = None
    streams: tuple[torch.Tensor, ...] | None = None
    interacted_streams: tuple[torch.Tensor, ...] | None = None
    frame_scores: torch.Tensor | None = None
    kept_indices: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


__all__ = ["VidPrismForVideoClassificationOutput", "VidPrismModelOutput"]
