"""Loads VidPrism checkpoints for data whose classes may be in another order."""

import torch
from transformers import AutoConfig

from ..errors import UserError, why_not_loaded
from ..model import VidPrismConfig, VidPrismForVideoClassification
from ..model.loading import check_attention, load_classifier
from .labels import matched_labels


def load_checkpoint(name_or_path: str, id2label: dict[int, str], num_frames: int) -> VidPrismForVideoClassification:
    """Loads a VidPrism checkpoint, with its classes in the data's order and spelling.

    Raises:
        UserError: If it is not a VidPrism checkpoint, has other classes or does not support this number of frames.
    """
    config, order = fitting_config(name_or_path, id2label, num_frames)
    config.num_frames = num_frames
    place = f"model.checkpoint {name_or_path}"
    model = load_classifier(name_or_path, config=config, dtype=torch.float32, place=place)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter[order])
    model.config.id2label = dict(id2label)
    model.config.label2id = {label: index for index, label in id2label.items()}
    return model


def fitting_config(name_or_path: str, id2label: dict[int, str], num_frames: int) -> tuple[VidPrismConfig, list[int]]:
    """Loads the configuration of a VidPrism checkpoint and its index of each of the data's classes.

    Raises:
        UserError: If it is not a VidPrism checkpoint, has other classes or does not support this number of frames.
    """
    config = read_checkpoint_config(name_or_path)
    if config.time_position == "learned" and config.num_frames != num_frames:
        raise UserError(
            f"model.checkpoint {name_or_path}: has learned positions for {config.num_frames} frames; "
            f"set model.num_frames to that, not {num_frames}"
        )
    return config, matched_labels(f"model.checkpoint {name_or_path}", config.id2label, id2label)


def read_checkpoint_config(name_or_path: str) -> VidPrismConfig:
    """Loads the configuration of a VidPrism checkpoint.

    Raises:
        UserError: If it is not a VidPrism checkpoint.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # transformers may raise anything on invalid files
        raise UserError(
            f"model.checkpoint {name_or_path}: cannot be loaded ({why_not_loaded(name_or_path, error)})"
        ) from error
    if not isinstance(config, VidPrismConfig):
        raise UserError(f"model.checkpoint {name_or_path}: a {config.model_type} model; give it as model.backbone")
    check_attention(config, f"model.checkpoint {name_or_path}")
    return config
