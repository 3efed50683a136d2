"""The model card: facts of a run or a conversion, rendered by one template."""

import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import printable

TEMPLATE = Path(__file__).with_name("card_template.md")
PACKAGES = ("vidprism_hf", "torch", "transformers", "lightning", "huggingface_hub", "av")


@dataclass
class CardFacts:
    """What a card says.

    Args:
        model_name: Title of the card.
        labels: Label names in index order.
        num_frames: Frames per clip.
        rates: Of the streams.
        base_model: Hub id of the tower's checkpoint; None where it is no Hub id.
        backbone: The tower in words, as the recipe names it.
        dataset: Name or folder name of the data.
        split: How it was split.
        train_clips: Training clips used, `N` or `N of M`.
        eval_clips: Held-out clips that could be decoded, likewise.
        train_list_hash: sha256 over names and labels of the training clips.
        bad_clips: Clips that could not be decoded, with `split`, `name` and `cause`.
        metrics: Held-out metrics, such as {"top1": 0.9}; empty where nothing was evaluated.
        protocol: How they were measured.
        hyper_parameters: Names and values, in order.
        origin: One sentence on where the weights come from.
    """

    model_name: str
    labels: list[str]
    num_frames: int
    rates: list[int]
    origin: str
    base_model: str | None = None
    backbone: str | None = None
    dataset: str | None = None
    split: str | None = None
    train_clips: str | None = None
    eval_clips: str | None = None
    train_list_hash: str | None = None
    bad_clips: list[Any] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    protocol: str | None = None
    hyper_parameters: dict[str, Any] = field(default_factory=dict)


def render_card(facts: CardFacts) -> ModelCard:
    """Renders the card, with the metadata that the Hub reads."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="video-classification",
        base_model=facts.base_model,
        metrics=["accuracy"] if facts.metrics else None,
        tags=["vidprism", "video-classification", "action-recognition", "mixture-of-experts"],
        model_name=facts.model_name,
        eval_results=evaluation_results(facts) or None,
    )
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return ModelCard.from_template(data, template_path=TEMPLATE, facts=facts, versions=versions, printable=printable)


def evaluation_results(facts: CardFacts) -> list[EvalResult]:
    """The metrics in the form of the Hub's model index."""
    names = {"top1": "Top-1 accuracy", "top5": "Top-5 accuracy"}
    return [
        EvalResult(
            task_type="video-classification",
            dataset_type=facts.dataset,
            dataset_name=facts.dataset,
            dataset_split="val",
            metric_type="accuracy",
            metric_name=names[name],
            metric_value=value,
        )
        for name, value in facts.metrics.items()
        if name in names
    ]
