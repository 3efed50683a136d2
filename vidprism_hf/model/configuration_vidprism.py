"""Configuration of VidPrism: the CLIP tower, the streams, their interaction, the experts and the losses.

Field defaults are the paper's where paper and released code differ; `VidPrismConfig.released(...)` switches
to the released code's behaviour (see `vidprism convert`).
"""

import contextlib
import dataclasses
import json
import math
import numbers
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.utils import cached_file

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

# Where trust_remote_code finds each class, beside the weights.
AUTO_MAP = {
    "AutoConfig": "configuration_vidprism.VidPrismConfig",
    "AutoModel": "modeling_vidprism.VidPrismModel",
    "AutoModelForVideoClassification": "modeling_vidprism.VidPrismForVideoClassification",
    "AutoVideoProcessor": "video_processing_vidprism.VidPrismVideoProcessor",
}
PROCESSOR = "video_preprocessor_config.json"
# Bounds well above any model there is: a damaged or hostile config.json asks for no memory that no machine has.
MOST_FRAMES = 1024  # of a clip, and in a window: the blocks relate each frame to each
MOST_STREAMS = 16  # gates and convolutions are of pairs of streams
MOST_LABELS = 100_000
TOWER_BOUNDS = {
    "hidden_size": 16384,
    "intermediate_size": 65536,
    "projection_dim": 16384,
    "num_hidden_layers": 64,
    "num_attention_heads": 1024,
    "num_channels": 3,
    "image_size": 4096,
    "patch_size": 4096,
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
        self._fit_labels(kwargs.get("num_labels"))
        if self.vision_config is None:
            self.vision_config = dict(VISION_PRESETS["b16"]["vision_config"])
        super().__post_init__(**kwargs)
        if self.rates is None:
            self.rates = [2, 4, 8, 16] if self.num_frames >= 16 else [2, 4, 8]
        self.rates = list(self.rates)
        if self.hidden_size is None:
            self.hidden_size = self.feature_size

    def _fit_labels(self, num_labels: int | None) -> None:
        """Makes label names text and ids 0, 1, ..., with `label2id` as the inverse.

        Raises:
            ValueError: If that cannot be.
        """
        if self.id2label is None and self.label2id:
            self.id2label = {index: label for label, index in self.label2id.items()}
        if self.id2label is None:
            if num_labels is not None and not 0 <= num_labels <= MOST_LABELS:
                raise ValueError(f"num_labels must be 0 to {MOST_LABELS}, got {num_labels}.")
            return
        names = label_names(self.id2label)
        if num_labels not in (None, len(names)):
            raise ValueError(f"num_labels is {num_labels}, but id2label names {len(names)}; leave one of them out.")
        ids = {str(label): as_index("label2id", index) for label, index in (self.label2id or {}).items()}
        # What of transformers' placeholders is left beside names that were set later says nothing.
        ids = {label: index for label, index in ids.items() if label != f"LABEL_{index}"}
        if wrong := [label for label, index in ids.items() if names.get(index) != label]:
            raise ValueError(
                f"label2id says {ids[wrong[0]]} for {wrong[0]!r}, id2label {names.get(ids[wrong[0]])!r}; leave out one "
                "of them, it follows from the other."
            )
        self.id2label, self.label2id = names, {label: index for index, label in names.items()}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """The configuration of a file, with changes; another `num_labels` takes the place of the file's labels."""
        if kwargs.get("num_labels") not in (None, len(config_dict.get("id2label") or ())):
            config_dict = {name: value for name, value in config_dict.items() if name not in ("id2label", "label2id")}
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Saves the configuration, and beside it all that trust_remote_code needs where this package is not installed.

        Whatever saves a model comes by here: `save_pretrained` of models and pipelines, `push_to_hub`, `Trainer`.
        Pipelines do not save video processors: where the folder has none yet, that of the checkpoint the model was
        loaded from is put there, if it is on this machine. One that is saved next replaces it.
        """
        if self.id2label is not None:  # may have been replaced since
            self.id2label = label_names(self.id2label)
            self.label2id = {label: index for index, label in self.id2label.items()}
        self.auto_map = dict(AUTO_MAP)
        folder = Path(save_directory)
        if not folder.is_file():  # transformers says what is wrong then
            folder.mkdir(parents=True, exist_ok=True)
            for code in self._code():
                if not (folder / code.name).exists() or not (folder / code.name).samefile(code):
                    shutil.copyfile(code, folder / code.name)
            if self.name_or_path and not (folder / PROCESSOR).exists() and (settings := self._known_processor()):
                (folder / PROCESSOR).write_text(
                    json.dumps(settings, indent=2, allow_nan=False) + "\n", encoding="utf-8"
                )
        super().save_pretrained(save_directory, **kwargs)

    def _code(self) -> list[Path]:
        """The files that trust_remote_code needs: those beside this one.

        As remote code itself, of which transformers keeps each class's in a folder of its own, it is in part only where
        the checkpoint came from.
        """
        folders = [Path(__file__).parent]
        if __name__.startswith("transformers_modules."):
            with contextlib.suppress(OSError, ValueError):
                folders.append(Path(cached_file(self.name_or_path, "config.json", local_files_only=True)).parent)
        return list({file.name: file for folder in folders[::-1] for file in folder.glob("*_vidprism.py")}.values())

    def _known_processor(self) -> dict[str, Any] | None:
        """The settings of the processor that lies where the checkpoint came from."""
        try:
            settings = json.loads(
                Path(cached_file(self.name_or_path, PROCESSOR, local_files_only=True)).read_text(encoding="utf-8")
            )
        except (OSError, ValueError):
            return None
        return settings if isinstance(settings, dict) and "video_processor_type" in settings else None

    @property
    def feature_size(self) -> int:
        """Width of the frame features that the tower hands over."""
        return self.vision_config.projection_dim if self.vision_projection else self.vision_config.hidden_size

    def validate_values(self):
        """Part of `@strict` validation: no number is infinite or NaN."""
        for place, config in (("", self), ("vision_config.", self.vision_config)):
            for field in dataclasses.fields(config) if isinstance(config, PreTrainedConfig) else ():
                value = getattr(config, field.name)
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{place}{field.name} must be a finite number, got {value}.")

    def validate_tower(self):
        """Part of `@strict` validation: the sizes of the tower."""
        if not isinstance(self.vision_config, PreTrainedConfig):
            return
        for name, most in TOWER_BOUNDS.items():
            check_range(f"vision_config.{name}", getattr(self.vision_config, name), most)
        if self.vision_config.patch_size > self.vision_config.image_size:
            raise ValueError(
                f"vision_config.patch_size ({self.vision_config.patch_size}) must not exceed image_size "
                f"({self.vision_config.image_size})."
            )
        if self.vision_config.hidden_size % self.vision_config.num_attention_heads:
            raise ValueError(
                f"vision_config.hidden_size ({self.vision_config.hidden_size}) must be a multiple of "
                f"num_attention_heads ({self.vision_config.num_attention_heads})."
            )

    def validate_streams(self):
        """Part of `@strict` validation: the streams."""
        if self.num_frames < 1 or self.kept_per_window < 1:
            raise ValueError(
                f"num_frames and kept_per_window must be at least 1, got {self.num_frames} and {self.kept_per_window}."
            )
        check_range("num_frames", self.num_frames, MOST_FRAMES)
        check_range("kept_per_window", self.kept_per_window, MOST_FRAMES)
        check_range("slow_rate", self.slow_rate)
        if self.rates is None:
            return
        if not 1 <= len(self.rates) <= MOST_STREAMS:
            raise ValueError(
                f"rates must be 1 to {MOST_STREAMS} positive integers that do not decrease, got {len(self.rates)}."
            )
        if self.rates[0] < 1 or self.rates[-1] > MOST_FRAMES or list(self.rates) != sorted(self.rates):
            raise ValueError(
                f"rates must be positive integers that do not decrease, up to {MOST_FRAMES}, got {list(self.rates)}."
            )

    def validate_width(self):
        """Part of `@strict` validation: the width divides into heads."""
        check_range("num_attention_heads", self.num_attention_heads)
        if self.hidden_size is None:
            return
        check_range("hidden_size", self.hidden_size, TOWER_BOUNDS["hidden_size"])
        if self.hidden_size % self.num_attention_heads != 0:
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
        """Part of `@strict` validation: shares, weights and thresholds."""
        if not 0 <= self.score_mix <= 1:
            raise ValueError(f"score_mix must be between 0 and 1, got {self.score_mix}.")
        if not 0 <= self.head_dropout <= 1:
            raise ValueError(f"head_dropout must be between 0 and 1, got {self.head_dropout}.")
        # A threshold above 1 is allowed: it closes every gate.
        for name in ("merge_weight", "gate_threshold", "rank_loss_weight", "gate_loss_weight", "diversity_loss_weight"):
            if not getattr(self, name) >= 0:  # NaN, too
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")

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


def label_names(id2label: dict) -> dict[int, str]:
    """Label names by index, in order; numbers that serve as names become text.

    Raises:
        ValueError: If indices are not 0, 1, ..., or names are neither text nor whole numbers, or not all different.
    """
    if not isinstance(id2label, dict):
        raise ValueError(f"id2label must map indices to names, got {type(id2label).__name__}.")
    names = {}
    for index, label in id2label.items():
        if isinstance(label, bool) or not isinstance(label, (str, numbers.Integral)):
            raise ValueError(f"id2label: the name of {index} must be text, got {label!r}.")
        names[as_index("id2label", index)] = str(label)
    if len(names) < len(id2label) or sorted(names) != list(range(len(names))):
        raise ValueError(f"id2label: indices must be 0 to {len(id2label) - 1}, got {preview(id2label)}.")
    if twice := [label for label, count in Counter(names.values()).items() if count > 1]:
        raise ValueError(f"id2label: several indices have the name {preview(twice)}; names must differ.")
    return dict(sorted(names.items()))


def as_index(name: str, index) -> int:
    """The index of a label, which JSON may have as text."""
    if not str(index).isdecimal():
        raise ValueError(f"{name}: {index!r} is no index; indices are 0, 1, 2, ...")
    return int(index)


def preview(items) -> str:
    """The first few of some items."""
    items = [repr(item) for item in items]
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")


def check_range(name: str, value: int, most: int | None = None) -> None:
    """Raises a ValueError unless a whole number is at least 1, and at most a bound."""
    if not isinstance(value, int) or value < 1 or (most is not None and value > most):
        raise ValueError(f"{name} must be at least 1" + (f" and at most {most}" if most else "") + f", got {value}.")


__all__ = ["AUTO_MAP", "VISION_PRESETS", "VidPrismConfig"]
