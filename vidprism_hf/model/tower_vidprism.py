"""The frame encoder of VidPrism: a CLIP image tower. All that knows the tower is here.

Shapes: B clips, T frames, P patches, W width of the tower, D width of the frame features.

Of the last layer only the class token is read, so only that is computed: its query, its way through the output
projection and the MLP. Keys and values need all tokens. The result is the same, and the tower's cost falls by most
of a layer: 7 % of ViT-B/16's multiply-adds, 3.5 % of ViT-L/14's, forward and backward. The activation between the
MLP's layers, the widest tensor of all, goes through memory 13 times instead of 21 and is kept twice instead of three
times.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer, eager_attention_forward

from .configuration_vidprism import VidPrismConfig

QUICK_GELU_SCALE = 1.702


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), as SiLU, which is one operation in both directions and keeps its input alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise; any shape."""
        return F.silu(x * QUICK_GELU_SCALE).mul_(1 / QUICK_GELU_SCALE)


class VidPrismClassTokenAttention(CLIPAttention):
    """CLIP's self-attention with the first token's query alone, (B, 1 + P, W) -> (B, 1, W)."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        """Returns what the first token gathers, and its attention weights where the implementation has them."""
        projected = self.q_proj(hidden_states[:, :1]), self.k_proj(hidden_states), self.v_proj(hidden_states)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in projected)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scale, dropout=dropout, **kwargs)
        return self.out_proj(output.flatten(-2)), weights


class VidPrismClassTokenLayer(CLIPEncoderLayer):
    """The tower's last layer for the class token alone, (B, 1 + P, W) -> (B, 1, W); the weights are CLIP's."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states[:, :1] + attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class VidPrismVisionTower(nn.Module):
    """The frame encoder: pixels (B, T, 3, H, W) to frame features (B, T', D)."""

    def __init__(self, config: VidPrismConfig):
        super().__init__()
        self.vision_model = CLIPVisionModel._from_config(config.vision_config)
        if config.vision_config.hidden_act == "quick_gelu":
            for layer in self.vision_model.encoder.layers:
                layer.mlp.activation_fn = QuickGELU()
        # Other classes for the same modules: CLIP has initialised their weights, in its own way.
        last = self.vision_model.encoder.layers[-1]
        last.__class__, last.self_attn.__class__ = VidPrismClassTokenLayer, VidPrismClassTokenAttention
        self.visual_projection = None
        if config.vision_projection:
            self.visual_projection = nn.Linear(
                config.vision_config.hidden_size, config.vision_config.projection_dim, bias=False
            )

    def forward(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        features = self.vision_model(pixel_values=pixel_values_videos.flatten(0, 1), return_dict=True).pooler_output
        if self.visual_projection is not None:
            features = self.visual_projection(features)
        return features.unflatten(0, pixel_values_videos.shape[:2])

    def freeze(self, num_layers: int | None = None) -> None:
        """Freezes the tower, or the embeddings and the first layers only; what is frozen goes into eval mode.

        That is all there is to it: what requires a gradient decides at each forward pass. The backward pass ends at
        the first layer that trains, nothing below it is stored, and `requires_grad_(True)` on any part, adapters that
        are added later or pixels that require a gradient bring the graph back. As of any module, `train()` on the
        tower or the model puts frozen parts into training mode again, which in a tower with `attention_dropout` (CLIP
        has none by default) means dropout.

        Args:
            num_layers: Layers to freeze beside the embeddings, 0 and up; the whole tower if not given.

        Raises:
            ValueError: If the tower has fewer layers.
        """
        layers = self.vision_model.encoder.layers
        if num_layers is None:
            frozen = [self]
        elif 0 <= num_layers <= len(layers):
            frozen = [self.vision_model.embeddings, self.vision_model.pre_layrnorm, *layers[:num_layers]]
        else:
            raise ValueError(f"the tower has {len(layers)} layers: {num_layers} of them cannot be frozen")
        for part in frozen:
            part.requires_grad_(False).eval()


def load_vision_tower(name_or_path: str, **kwargs) -> CLIPVisionModelWithProjection:
    """Loads the vision tower of any CLIP checkpoint.

    Returns:
        The tower; its `visual_projection` is None where the checkpoint has no projection.

    Raises:
        ValueError: If the checkpoint lacks weights of a CLIP vision tower.
    """
    tower, info = CLIPVisionModelWithProjection.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    missing = set(info["missing_keys"]) - {"visual_projection.weight"}
    if len(missing) == len(tower.vision_model.state_dict()):
        # Before transformers 5.21 the class with projection does not find the tower of the class without.
        tower.vision_model, info = CLIPVisionModel.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
        missing, tower.visual_projection = set(info["missing_keys"]), None
    if missing or info["mismatched_keys"]:
        raise ValueError(
            f"{name_or_path} is not a CLIP vision tower: {len(missing)} weights are missing (first: "
            f"{min(missing, default='none')}), {len(info['mismatched_keys'])} have another shape."
        )
    if "visual_projection.weight" in info["missing_keys"]:
        tower.visual_projection = None
    return tower


__all__ = ["QuickGELU", "VidPrismVisionTower", "load_vision_tower"]
