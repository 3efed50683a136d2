"""VidPrism: a heterogeneous mixture of temporal experts on a CLIP image tower (CVPR 2026).

    pixels -> tower -> frame features -> RgSTA streams -> DBI -> experts -> global query -> clip vector -> logits

Shapes: B clips, T frames, D width, N streams (= experts), L_i frames in stream i, K classes. The blocks stand in
`temporal_vidprism.py` and the tower in `tower_vidprism.py`; this file puts them together in transformers' idiom:
`VidPrismTemporalModel` (frame features to clip vector), `VidPrismModel` (pixels to clip vector),
`VidPrismForVideoClassification` (pixels to logits).
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_vidprism import VISION_PRESETS, VidPrismConfig
from .outputs_vidprism import VidPrismForVideoClassificationOutput, VidPrismModelOutput
from .temporal_vidprism import (
    VidPrismAttention,
    VidPrismExpert,
    VidPrismFeatureWhitening,
    VidPrismFrameMergers,
    VidPrismGateOutput,
    VidPrismInteraction,
    VidPrismReadout,
    VidPrismWeights,
    expert_diversity_loss,
    gate_balance_loss,
    interaction_edges,
    pool_windows,
)
from .tower_vidprism import VidPrismVisionTower, load_vision_tower

# What any forward pass takes besides its inputs.
OPTIONS = {"output_attentions", "output_hidden_states", "output_losses", "output_streams"}


class VidPrismPreTrainedModel(PreTrainedModel):
    """What the VidPrism models share: configuration, initialisation and the abilities they declare."""

    config: VidPrismConfig
    config_class = VidPrismConfig
    base_model_prefix = "vidprism"
    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    # The loss is a mean over the batch's clips, whatever else a batch is part of: Trainer has to divide it among the
    # batches that it accumulates. It believes the opposite of any forward with **kwargs.
    accepts_loss_kwargs = False
    # What runs on one device: beside the layers all that puts results of several parts together.
    _no_split_modules = [  # noqa: RUF012 (transformers' convention)
        "CLIPVisionEmbeddings",
        "CLIPEncoderLayer",
        "VidPrismClassTokenLayer",
        "VidPrismTemporalModel",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """PyTorch's own scale for linear and convolutional weights, as in the released code, but zero biases."""
        if isinstance(module, VidPrismGateOutput):
            # All gates start half open, whatever the scale of the features: a closed one gets no gradient.
            init.normal_(module.weight, std=1e-3)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) or (isinstance(module, VidPrismWeights) and module.weight.dim() == 1):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, VidPrismWeights)):
            if self.config.zero_init_residual and getattr(module, "ends_residual", False):
                init.zeros_(module.weight)
            else:
                init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, VidPrismFeatureWhitening):
            init.zeros_(module.mean)
            init.eye_(module.weight)
            init.zeros_(module.num_frames)
        elif isinstance(module, VidPrismReadout) and module.how == "query":
            init.normal_(module.query, std=0.02)
        elif isinstance(module, VidPrismTemporalModel) and module.position_embedding is not None:
            init.normal_(module.position_embedding, std=0.02)


def known_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of a forward pass's further arguments that are given.

    PEFT and others hand every model the arguments of a text model, as None where a caller has not set them.

    Raises:
        TypeError: If one is given that no VidPrism model takes.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if unknown := sorted(given.keys() - OPTIONS):
        raise TypeError(
            f"VidPrism takes no {', '.join(unknown)}: it reads pixel_values_videos, or frame_features (with PEFT pass "
            f"them by name), and takes labels and {', '.join(sorted(OPTIONS))}."
        )
    return given


class VidPrismTemporalModel(VidPrismPreTrainedModel):
    """Frame features (B, T, D_features) to clip vector (B, D): RgSTA, DBI and HMoE."""

    main_input_name = "frame_features"
    _can_record_outputs = {  # noqa: RUF012 (transformers' convention)
        "hidden_states": OutputRecorder(VidPrismExpert, capture_initial_hidden_state=False),
        "attentions": OutputRecorder(VidPrismAttention, index=1),
    }
    # The rest of a whole checkpoint, which may be loaded here.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 (transformers' convention)
        r"^(vidprism\.)?(vision_tower|projection_head)\.",
        r"^classifier\.",
    ]

    def __init__(self, config: VidPrismConfig):
        super().__init__(config)
        width, rates = config.hidden_size, config.rates
        self.feature_norm, self.input_projection = None, None
        if config.feature_norm == "whitened":
            self.feature_norm = VidPrismFeatureWhitening(config.feature_size, width)
        elif config.feature_size != width:
            self.input_projection = nn.Linear(config.feature_size, width)
        self.position_embedding = None
        if config.time_position == "learned":
            self.position_embedding = nn.Parameter(torch.empty(1, config.num_frames, width))
        self.mergers = VidPrismFrameMergers(config) if config.aggregation == "rgsta" else None
        self.interaction = VidPrismInteraction(config) if interaction_edges(config) else None
        self.experts = nn.ModuleList(VidPrismExpert(config) for _ in rates)
        self.readout = VidPrismReadout(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> "VidPrismTemporalModel":
        """Loads a temporal model, from a checkpoint of its own or from that of a whole model."""
        kwargs.setdefault("key_mapping", {r"^(vidprism\.)?temporal_model\.": ""})
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        """Saves under the names of this model: transformers would undo the mapping of the checkpoint it loaded."""
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(*args, **kwargs)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        frame_features: torch.Tensor,
        output_streams: bool = False,
        output_losses: bool = False,
        **kwargs,
    ) -> VidPrismModelOutput:
        """Pools frame features into clip vectors.

        Args:
            frame_features: (B, T, D_features), any T >= 1.
            output_streams: Also return the streams, the frames' importance and the frames kept.
            output_losses: Also return the three auxiliary losses, unweighted.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.
        """
        kwargs = known_arguments(kwargs)
        to_width = self.feature_norm or self.input_projection
        frames = frame_features if to_width is None else to_width(frame_features)
        if self.position_embedding is not None:
            frames = frames + self._positions(frames.shape[1]).to(frames.dtype)
        scores, kept, rank_loss = None, None, None
        if self.mergers is not None:
            streams, scores, kept, rank_loss = self.mergers(frames, output_rank_loss=output_losses)
        else:
            streams = [pool_windows(frames, rate, self.config.aggregation) for rate in self.config.rates]
        if self.interaction is not None:
            interacted, gates = self.interaction(streams)
        else:
            interacted, gates = streams, frames.new_zeros(frames.shape[0], len(streams), len(streams))
        outputs = [expert(stream, **kwargs) for expert, stream in zip(self.experts, interacted, strict=True)]
        tokens = torch.cat(outputs, dim=1)
        pooled, expert_weights = self.readout(tokens, [expert_output.shape[1] for expert_output in outputs])

        output = VidPrismModelOutput(
            last_hidden_state=tokens,
            pooler_output=pooled,
            expert_weights=expert_weights,
            gates=gates,
        )
        if output_streams:
            output.streams, output.interacted_streams = tuple(streams), tuple(interacted)
            if scores is not None:
                output.frame_scores, output.kept_indices = scores, tuple(kept)
        if output_losses:
            output.rank_loss = pooled.new_zeros((), dtype=torch.float32) if rank_loss is None else rank_loss
            output.gate_loss = gate_balance_loss(expert_weights.float().mean(dim=0))
            output.diversity_loss = expert_diversity_loss(outputs)
        return output

    def _positions(self, num_frames: int) -> torch.Tensor:
        """Position embeddings (1, T, D), interpolated in time where T is not the number of frames trained with."""
        positions = self.position_embedding
        if num_frames != positions.shape[1]:
            positions = F.interpolate(positions.transpose(1, 2), size=num_frames, mode="linear").transpose(1, 2)
        return positions


class VidPrismModel(VidPrismPreTrainedModel):
    """Pixels (B, T, 3, H, W) to clip vectors (B, D), without a classifier."""

    def __init__(self, config: VidPrismConfig):
        super().__init__(config)
        self.vision_tower = VidPrismVisionTower(config)
        self.temporal_model = VidPrismTemporalModel._from_config(config)
        width = config.hidden_size
        self.projection_head = None
        if config.projection_head:
            self.projection_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_tower.vision_model.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        **kwargs,
    ) -> VidPrismModelOutput:
        """Encodes clips.

        Args:
            pixel_values_videos: (B, T, 3, H, W), normalised by the video processor; any T >= 1.
            frame_features: (B, T, D_features) instead of pixels, where the tower has run already.
            kwargs: `output_streams`, `output_losses`, `output_hidden_states`, `output_attentions`: see
                `VidPrismModelOutput`; `return_dict`.

        Raises:
            TypeError: If there is any other argument that is not None.
        """
        kwargs = known_arguments(kwargs)
        if (pixel_values_videos is None) == (frame_features is None):
            raise ValueError("Give either pixel_values_videos or frame_features.")
        if frame_features is None:
            frame_features = self.get_frame_features(pixel_values_videos)
        return self.temporal_model(frame_features, return_dict=True, **kwargs)

    def get_frame_features(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """Frame features (B, T, D_features) of clips (B, T, 3, H, W)."""
        if pixel_values_videos.dim() != 5:
            shape = tuple(pixel_values_videos.shape)
            raise ValueError(f"pixel_values_videos must be (clips, frames, 3, height, width), got {shape}.")
        return self.vision_tower(pixel_values_videos)

    def get_text_aligned_features(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """Clip vectors (B, D) in the space of CLIP's text embeddings; needs `config.projection_head`.

        Raises:
            ValueError: If the model has no projection head.
        """
        if self.projection_head is None:
            raise ValueError("This model has no projection head (config.projection_head is false).")
        return self.projection_head(self(pixel_values_videos, return_dict=True).pooler_output)


class VidPrismForVideoClassification(VidPrismPreTrainedModel):
    """VidPrism with a linear classifier on the clip vector.

    transformers' video pipeline takes one video at a time until it is told that there is nothing to pad:

    ```python
    classify.feature_extractor = classify.video_processor
    classify(videos, batch_size=8)
    ```

    In transformers' `Trainer` predictions are the logits, and the loss is the one below. With
    `label_smoothing_factor` it is not: `Trainer` then computes its own from the logits alone, without the auxiliary
    losses, and the score heads of RgSTA, which learn from the rank loss only, stay as they are.

    Attributes:
        vision_source: What `from_vision_pretrained` was given; None of other models.
    """

    vision_source: str | None = None

    def __init__(self, config: VidPrismConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vidprism = VidPrismModel(config)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        **kwargs,
    ) -> VidPrismForVideoClassificationOutput:
        """Classifies clips.

        Args:
            pixel_values_videos: (B, T, 3, H, W), normalised by the video processor; any T >= 1.
            frame_features: (B, T, D_features) instead of pixels, where the tower has run already.
            labels: (B,) class indices ((B, K) for multi-label problems). With labels the loss and its parts are
                returned.
            kwargs: `output_streams`, `output_losses` (always with labels), `output_hidden_states`,
                `output_attentions`: see `VidPrismModelOutput`; `return_dict`. Of other tools' text arguments, such as
                `attention_mask`, None is accepted.

        Raises:
            TypeError: If there is any other argument that is not None.
        """
        kwargs = known_arguments(kwargs)
        if labels is not None:
            kwargs["output_losses"] = True
        clip = self.vidprism(pixel_values_videos, frame_features=frame_features, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(clip.pooler_output))
        loss, classification_loss = None, None
        if labels is not None:
            classification_loss = self.loss_function(pooled_logits=logits, labels=labels, config=self.config)
            loss = self.total_loss(classification_loss, clip.rank_loss, clip.gate_loss, clip.diversity_loss)
        rest = {name: value for name, value in clip.items() if name != "last_hidden_state"}
        # At once: a tuple of it has the order in which fields were set, and begins with the loss.
        return VidPrismForVideoClassificationOutput(
            loss=loss, logits=logits, classification_loss=classification_loss, **rest
        )

    def total_loss(
        self,
        classification_loss: torch.Tensor,
        rank_loss: torch.Tensor,
        gate_loss: torch.Tensor,
        diversity_loss: torch.Tensor,
    ) -> torch.Tensor:
        """The weighted sum of the four losses (weights in the configuration)."""
        return (
            classification_loss
            + self.config.rank_loss_weight * rank_loss
            + self.config.gate_loss_weight * gate_loss
            + self.config.diversity_loss_weight * diversity_loss
        )

    @classmethod
    def from_vision_pretrained(
        cls,
        name_or_path: str,
        *,
        id2label: dict[int, str],
        dtype: torch.dtype = torch.float32,
        hub_kwargs: dict | None = None,
        **config_overrides,
    ) -> "VidPrismForVideoClassification":
        """A new classifier on a pretrained CLIP tower; streams, experts and classifier are freshly initialised.

        Args:
            name_or_path: Hub id or folder of any CLIP checkpoint (whole CLIP, vision tower with or without
                projection, saved by transformers 4 or 5), or a preset: "b32", "b16", "l14" (OpenAI's weights from
                the Hub), or "tiny" (random weights).
            id2label: The label name of each class index.
            dtype: Of the weights.
            hub_kwargs: `revision`, `token`, `cache_dir`, ... for `from_pretrained`.
            config_overrides: Any field of `VidPrismConfig`.

        Raises:
            ValueError: If the checkpoint is not a CLIP vision tower.
            OSError: If it cannot be found.
        """
        labels = {"id2label": id2label, "label2id": {label: index for index, label in id2label.items()}}
        source, preset = name_or_path, VISION_PRESETS.get(name_or_path)
        if preset is not None and preset["name_or_path"] is None:
            config = VidPrismConfig.from_preset(name_or_path, **labels, **config_overrides)
            model = cls._from_config(config, dtype=dtype)
            model.vision_source = source
            return model
        name_or_path = preset["name_or_path"] if preset is not None else name_or_path
        tower = load_vision_tower(name_or_path, dtype=dtype, **(hub_kwargs or {}))
        vision_config = tower.config.to_dict()
        vision_config.pop("_name_or_path", None)  # may be a path of this machine
        config = VidPrismConfig(
            vision_config=vision_config,
            vision_projection=tower.visual_projection is not None,
            **labels,
            **config_overrides,
        )
        model = cls._from_config(config, dtype=dtype)
        # Through load_state_dict, not from_pretrained: transformers would reverse its key mapping on saving.
        model.vidprism.vision_tower.load_state_dict(tower.state_dict())
        model.vision_source = source
        return model


__all__ = [
    "VidPrismForVideoClassification",
    "VidPrismForVideoClassificationOutput",
    "VidPrismModel",
    "VidPrismModelOutput",
    "VidPrismPreTrainedModel",
    "VidPrismTemporalModel",
]
