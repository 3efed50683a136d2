"""Origin of a run's weights: its description on the model card, and the base model in its metadata."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..hub.export import README, is_vidprism_config
from ..model import VISION_PRESETS
from ..safe_yaml import card_metadata


def starting_point(checkpoint: str | None, backbone: str | None, base_model: str | None) -> str:
    """Describes what the training started from.

    Args:
        checkpoint: VidPrism checkpoint, folder or Hub id; takes precedence over the backbone.
        backbone: Preset, folder or Hub id; None for a model built from its configuration.
        base_model: Result of `base_model` for the checkpoint or backbone in use.
    """
    name, kind = (checkpoint, "VidPrism checkpoint") if checkpoint else (backbone, "CLIP checkpoint")
    if name is None:
        return "a configuration, with random weights"
    if not checkpoint and backbone in VISION_PRESETS:
        return f"the preset {backbone}, {base_model or 'with random weights'}"
    if name == base_model:
        return f"the {kind} {name}"
    return f"a {kind} in a folder, {Path(name).name}" + (f", which comes from {base_model}" if base_model else "")


def is_random(checkpoint: str | None, backbone: str | None) -> bool:
    """Returns whether training starts from random weights: from a configuration, or a preset without a checkpoint."""
    return not checkpoint and VISION_PRESETS.get(backbone, {"name_or_path": backbone})["name_or_path"] is None


def base_model(name: str | None) -> str | None:
    """Returns the Hub id of the checkpoint that a tower's weights come from; None if unknown.

    A VidPrism export names its own base model; other folders do not.

    Args:
        name: Preset, folder or Hub id.
    """
    if name is None or name in VISION_PRESETS:
        return VISION_PRESETS.get(name, {}).get("name_or_path")
    folder = Path(name)
    if not folder.exists():
        return hub_id(name)
    if not is_vidprism_config(folder / "config.json"):
        return None
    stated = card_metadata(folder / README).get("base_model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    candidates = [*(stated if isinstance(stated, list) else [stated]), config.get("_name_or_path")]
    return next(filter(None, map(hub_id, candidates)), None)


def hub_id(name: Any) -> str | None:
    """Returns the name if it is a valid Hub repository id, org/name; None otherwise.

    A bare name is rejected: the Hub has moved models without an owner, and a folder looks the same.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and "/" in name else None
