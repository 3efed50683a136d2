"""Where the weights of a run come from: the words of its card, and the base model in its metadata."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..hub.export import README, is_vidprism_config
from ..model import VISION_PRESETS
from ..safe_yaml import card_metadata


def starting_point(checkpoint: str | None, backbone: str, base_model: str | None) -> str:
    """What a training started from, in words.

    Args:
        checkpoint: VidPrism checkpoint, folder or Hub id; goes before the backbone.
        backbone: Preset, folder or Hub id.
        base_model: What `base_model` found for the one that counts.
    """
    name, kind = (checkpoint, "VidPrism checkpoint") if checkpoint else (backbone, "CLIP checkpoint")
    if not checkpoint and backbone in VISION_PRESETS:
        return f"the preset {backbone}, {base_model or 'with random weights'}"
    if name == base_model:
        return f"the {kind} {name}"
    return f"a {kind} in a folder, {Path(name).name}" + (f", which comes from {base_model}" if base_model else "")


def is_random(checkpoint: str | None, backbone: str) -> bool:
    """Whether a training starts from random weights: that of a preset without a checkpoint of its own."""
    return not checkpoint and backbone in VISION_PRESETS and VISION_PRESETS[backbone]["name_or_path"] is None


def base_model(name: str) -> str | None:
    """The Hub id of the checkpoint that a tower's weights come from, by the name that they are about to be loaded by.

    A folder with a VidPrism export tells its own base model; of any other folder none is known.

    Args:
        name: Preset, folder or Hub id.
    """
    if name in VISION_PRESETS:
        return VISION_PRESETS[name]["name_or_path"]
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
    """The name if it can be the id of a Hub repository, org/name, and None if it cannot.

    A bare name counts for none: the Hub has moved its models without an owner, and a folder looks the same.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and "/" in name else None
