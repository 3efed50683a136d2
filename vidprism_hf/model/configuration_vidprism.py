"""Configuration of VidPrism: the CLIP tower, the streams, their interaction, the experts and the losses.

Field defaults are the paper's where paper and released code differ; `VidPrismConfig.released(...)` switches
to the released code's behaviour (see `vidprism convert`).
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.clip.configuration_clip import CLIPVisionConfig

# Towers that can be named by a short word. `tiny` has no pretrained weights: it is for tests and demonstrations.
VISION_PRESETS: dict[str, dict[str, Any]] = {
    "b32": {"name_or_path": "openai/clip-vit-base-patch32", "vision_config": {"patch_size": 32}},
    "b16": {"name_or_path": "openai/clip-vit-base-patch16", "vision_config": {"patch_size": 16}},
    "l14": {
        "name_or_path": "openai/clip-vit-large-patch14",
        "vision_config": {
            "patch_size": 14,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "projection_dim": 768,
        },
    },
    "tiny": {
        "name_or_path": None,
        "vision_config": {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "projection_dim": 64,
            # Twice CLIP's initial scale: at this size the frames' features would hardly differ at first.
            "initializer_factor": 2.0,
        },
    },
}


@strict
class VidPrismConfig(PreTrainedConfig):
    r"""Configuration of a VidPrism model.

    Args:
        vision_config:
            The frame encoder (`CLIPVisionConfig` or its fields). Default: CLIP ViT-B/32's fields with patch 16.
        vision_projection:
            Whether frame features go through CLIP's visual projection (width `vision_config.projection_dim`) or
            stay the tower's pooled class token (width `vision_config.hidden_size`).
        num_frames:
            Frames per clip the model is trained with; any other number works at inference.
        rates:
            Frames per kept frame of each stream, not decreasing; one expert per stream. Default: 2, 4, 8, 16 at
            16 or more frames, 2, 4, 8 below.
        hidden_size:
            Width of streams and experts. Default: the width of the frame features; otherwise a linear layer maps
            to it.
        aggregation:
            How a window of frames becomes a stream: RgSTA, or the ablation's first frame ("stride"), mean, max.
        kept_per_window:
            k, frames kept in each window of `k * rate` frames (RgSTA).
        merge_temperature:
            tau, of the softmax that spreads the frames that are not kept over those that are.
        merge_weight:
            delta, weight of the merged frames.
        score_mix:
            alpha, share of the predicted score in the importance score; the rest is the feature norm.
        score_temperature:
            T_s of the rank loss.
        merge_normalization:
            The axis of that softmax: "kept" (paper) or "rest" (content-aware for every k).
        interaction:
            Directions of the exchange between streams (DBI).
        interaction_pairs:
            "all" pairs of streams, or those across `slow_rate` ("slow_fast", the released code).
        interaction_gates:
            One gate per "pair" of streams, serving both directions, or one per "edge" (released code).
        interaction_update:
            "sum" of all open sources, or the "last" open one (released code).
        slow_rate:
            Streams of at least this rate are slow (only for `interaction_pairs="slow_fast"`).
        gate_threshold:
            A gate below it is closed, for that clip alone.
        num_attention_heads:
            Heads of the experts and of the read-out.
        readout:
            Global "query" attention over all expert outputs, or the ablation's mean and max over them.
        head_dropout:
            Dropout before the classifier.
        time_position:
            "learned" adds a learned embedding of the frame's position to its feature; the paper has "none".
        feature_norm:
            "whitened" takes mean, scales and correlations of the training clips' frames from the frame features, by
            a map that is fitted before the training; the paper takes them as they are, "none". `vidprism finetune` fits
            it; in Python call `model.vidprism.temporal_model.feature_norm.fit(frames)` with their frame features
            (..., D_features) before the first step: until then the map changes nothing but the width.
        zero_init_residual:
            Whether a new model's experts and messages begin with nothing to add: the last layer of each residual
            branch is zero. The released code has them random.
        projection_head:
            Whether the two-layer head that aligns clip vectors with text embeddings is kept (converted
            checkpoints have one; classification does not use it).
        rank_loss_weight: Weight of the rank loss of RgSTA's scores.
        gate_loss_weight: Weight of the balance loss of the experts' attention mass.
        diversity_loss_weight: Weight of the diversity loss of the experts' outputs.

    Example:

    ```python
    >>> from vidprism_hf import VidPrismConfig
    >>> config = VidPrismConfig(num_frames=8)
    >>> config.rates, config.hidden_size
    ([2, 4, 8], 512)
    ```"""

    model_type = "vidprism"
    # Trainer's predictions are what is left: the logits, and hidden states and attentions where they are asked for.
    keys_to_ignore_at_inference = [  # noqa: RUF012 (Trainer adds a list to it)
        "classification_loss",
        "rank_loss",
        "gate_loss",
        "diversity_loss",
        "pooler_output",
        "expert_weights",
        "gates",
    ]
    sub_configs_defaults = {"vision_config": SubConfigSpec(config_class=CLIPVisionConfig)}  # noqa: RUF012 (transformers' convention)

    vision_config: dict | PreTrainedConfig | None = None
    vision_projection: bool = True
    num_frames: int = 32
    rates: list[int] | tuple[int, ...] | None = None
    hidden_size: int | None = None
    aggregation: Literal["rgsta", "stride", "mean", "max"] = "rgsta"
    kept_per_window: int = 1
    merge_temperature: float = 0.1
    merge_weight: float = 0.5
    score_mix: float = 0.7
    score_temperature: float = 0.2
    merge_normalization: Literal["kept", "rest"] = "kept"
    interaction: Literal["both", "slow_to_fast", "fast_to_slow", "none"] = "both"
    interaction_pairs: Literal["all", "slow_fast"] = "all"
    interaction_gates: Literal["pair", "edge"] = "pair"
    interaction_update: Literal["sum", "last"] = "sum"
    slow_rate: int = 8
    gate_threshold: float = 0.3
    num_attention_heads: int = 4
    readout: Literal["query", "mean", "max"] = "query"
    head_dropout: float = 0.0
    time_position: Literal["none", "learned"] = "none"
    feature_norm: Literal["none", "whitened"] = "none"
    zero_init_residual: bool = False
    projection_head: bool = False
    rank_loss_weight: float = 0.1
    gate_loss_weight: float = 0.01
    diversity_loss_weight: float = 0.005

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = dict(VISION_PRESETS["b16"]["vision_config"])
        super().__post_init__(**kwargs)
        if self.rates is None:
            self.rates = [2, 4, 8, 16] if self.num_frames >= 16 else [2, 4, 8]
        self.rates = list(self.rates)
        if self.hidden_size is None:
            self.hidden_size = self.feature_size

    @property
    def feature_size(self) -> int:
        """Width of the frame features that the tower hands over."""
        return self.vision_config.projection_dim if self.vision_projection else self.vision_config.hidden_size

    def validate_streams(self):
        """Part of `@strict` validation: the streams."""
        if self.num_frames < 1 or self.kept_per_window < 1:
            raise ValueError(
                f"num_frames and kept_per_window must be at least 1, got {self.num_frames} and {self.kept_per_window}."
            )
        if self.rates is not None and (not self.rates or self.rates[0] < 1 or list(self.rates) != sorted(self.rates)):
            raise ValueError(f"rates must be positive integers that do not decrease, got {list(self.rates)}.")

    def validate_width(self):
        """Part of `@strict` validation: the width divides into heads."""
        if self.num_attention_heads < 1:
            raise ValueError(f"num_attention_heads must be at least 1, got {self.num_attention_heads}.")
        if self.hidden_size is not None and self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )

    def validate_temperatures(self):
        """Part of `@strict` validation: temperatures divide."""
        if self.merge_temperature <= 0 or self.score_temperature <= 0:
            raise ValueError(
                "merge_temperature and score_temperature must be positive, got "
                f"{self.merge_temperature} and {self.score_temperature}."
            )

    def validate_shares(self):
        """Part of `@strict` validation: shares and thresholds. `not` refuses NaN too."""
        if not 0 <= self.score_mix <= 1:
            raise ValueError(f"score_mix must be between 0 and 1, got {self.score_mix}.")
        # A threshold above 1 is allowed: it closes every gate.
        if not (self.merge_weight >= 0 and self.gate_threshold >= 0):
            raise ValueError(
                "merge_weight and gate_threshold must not be negative, got "
                f"{self.merge_weight} and {self.gate_threshold}."
            )

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "VidPrismConfig":
        """The configuration around a named tower.

        Args:
            name: "b32", "b16", "l14" or "tiny".
            overrides: Any field of the configuration.

        Raises:
            ValueError: If there is no such preset.
        """
        if name not in VISION_PRESETS:
            raise ValueError(f"No preset {name!r}; there are {', '.join(VISION_PRESETS)}.")
        return cls(vision_config=dict(VISION_PRESETS[name]["vision_config"]), **overrides)

    @classmethod
    def released(cls, **overrides) -> "VidPrismConfig":
        """The configuration with the switches of the authors' released code instead of the paper's.

        Args:
            overrides: Any field of the configuration, the switches too.
        """
        switches = {
            "interaction_pairs": "slow_fast",
            "interaction_gates": "edge",
            "interaction_update": "last",
        }
        return cls(**switches | overrides)


__all__ = ["VISION_PRESETS", "VidPrismConfig"]
