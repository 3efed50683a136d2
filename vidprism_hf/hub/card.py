"""The model card: facts of a run or a conversion, rendered by one template, and merged with what a person wrote."""

import platform
import subprocess
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..errors import printable
from ..evaluation.intervals import wilson_interval
from .card_merge import merge_card

__all__ = ["CardFacts", "eval_results_file", "merge_card", "render_card"]

TEMPLATE = Path(__file__).with_name("card_template.md")
CITATION = Path(__file__).with_name("citation.cff")
PACKAGES = ("vidprism_hf", "torch", "transformers", "lightning", "huggingface_hub", "av")
METRICS = {"top1": "Top-1 accuracy", "top5": "Top-5 accuracy"}
NOT_STATED = "not stated"
# Licence of a backbone's weights, by Hub id. Source: github.com/openai/CLIP (LICENSE); the Hub's pages state none.
BASE_LICENSES = {f"openai/clip-vit-{size}": "MIT" for size in ("base-patch32", "base-patch16", "large-patch14")}
TAGS = ("vidprism", "video-classification", "action-recognition", "mixture-of-experts")


@dataclass
class CardFacts:
    """What a card says. Dictionaries are names and values in the order of their table's rows.

    Args:
        model_name: Title of the card.
        labels: Label names in index order.
        num_frames: Frames per clip.
        rates: Of the streams.
        origin: One sentence on where the weights come from.
        base_model: Hub id of the tower's checkpoint; None where it is no Hub id.
        backbone: The tower in words, as the recipe names it.
        dataset: Title or folder name of the data.
        dataset_id: Its id on the Hub, if it has one.
        data_license: Its licence and terms, in a line.
        split: How it was split.
        train_clips: Training clips used, `N` or `N of M`.
        eval_clips: Held-out clips that could be decoded, likewise.
        train_list_hash: sha256 over names and labels of the training clips.
        bad_clips: Clips that could not be decoded, with `split`, `name` and `cause`.
        metrics: Held-out metrics as shares, such as {"top1": 0.9}; empty where nothing was evaluated.
        num_evaluated: Clips that they are shares of; None gives no intervals.
        protocol: How they were measured.
        hyper_parameters: Of the training.
        augmentation: Of the training clips.
        compute: Multiply-adds, parameters, device, time, memory.
        figures: Caption of each picture of the export, by its path.
        expert_weights: Mean weight of each expert over the held-out clips.
        license: Of the weights, an id of the Hub; None where nobody has stated it.
    """

    model_name: str
    labels: list[str]
    num_frames: int
    rates: list[int]
    origin: str
    base_model: str | None = None
    backbone: str | None = None
    dataset: str | None = None
    dataset_id: str | None = None
    data_license: str = NOT_STATED
    split: str | None = None
    train_clips: str | None = None
    eval_clips: str | None = None
    train_list_hash: str | None = None
    bad_clips: list[Any] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    num_evaluated: int | None = None
    protocol: str | None = None
    hyper_parameters: dict[str, Any] = field(default_factory=dict)
    augmentation: dict[str, Any] = field(default_factory=dict)
    compute: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    expert_weights: dict[str, float] = field(default_factory=dict)
    license: str | None = None

    @property
    def base_license(self) -> str:
        """Licence of the tower's weights."""
        return BASE_LICENSES.get(self.base_model or "", NOT_STATED)

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Wilson's 95 % interval of each metric."""
        clips = self.num_evaluated
        return {name: wilson_interval(value, clips) for name, value in self.metrics.items()} if clips else {}


def render_card(facts: CardFacts) -> ModelCard:
    """Renders the card, with the metadata that the Hub reads; its generated part stands between two marks."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="video-classification",
        base_model=facts.base_model,
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        metrics=["accuracy"] if facts.metrics else None,
        license=facts.license or "unknown",
        tags=list(TAGS),
        model_name=facts.model_name,
        eval_results=evaluation_results(facts) or None,
    )
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    texts = {"plain": plain, "code": code, "cell": cell}
    return ModelCard.from_template(
        data, template_path=TEMPLATE, facts=facts, versions=versions, revision=git_revision(), bibtex=bibtex(), **texts
    )


def plain(text: object) -> str:
    """Text of strangers, such as a label's name, as one line that is no markup and no mark of ours."""
    return " ".join(printable(str(text)).split()).replace("<", "&lt;")


def code(text: object) -> str:
    """The same for a file's name, which keeps its stars and underscores."""
    return "`" + " ".join(printable(str(text)).split()).replace("`", "'").replace("<!--", "<! --") + "`"


def cell(value: object) -> str:
    """A table's cell, with whatever markup it has."""
    return " ".join(printable(str(value)).split()).replace("|", "\\|").replace("<!--", "<! --")


def evaluation_results(facts: CardFacts) -> list[EvalResult]:
    """The metrics in the form of the Hub's model index."""
    return [
        EvalResult(
            task_type="video-classification",
            dataset_type=facts.dataset_id or facts.dataset or "unknown",
            dataset_name=facts.dataset or "unknown",
            dataset_split="val",
            metric_type="accuracy",
            metric_name=METRICS[name],
            metric_value=value,
        )
        for name, value in facts.metrics.items()
        if name in METRICS
    ]


def eval_results_file(facts: CardFacts) -> dict[str, bytes]:
    """The metrics in the newer form, by the file's path; nothing where the Hub has not got the dataset.

    The Hub shows them where the dataset is registered as a benchmark with these tasks (hub/eval-results in its
    documentation), and keeps them otherwise.
    """
    if not facts.dataset_id or not facts.metrics:
        return {}
    entries = [
        EvalResultEntry(dataset_id=facts.dataset_id, task_id=name, value=value, notes=facts.protocol)
        for name, value in facts.metrics.items()
        if name in METRICS
    ]
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    return {f".eval_results/{facts.dataset_id.replace('/', '--').replace('.', '-')}.yaml": text.encode()}


@cache
def git_revision() -> str:
    """The commit of this package's checkout, marked where files differ from it; `unknown` for an installed one."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return "unknown"
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}, with changes" if changes else commit


def bibtex() -> str:
    """The citation of CITATION.cff in BibTeX's form."""
    cited = yaml.safe_load(CITATION.read_text(encoding="utf-8"))["preferred-citation"]
    # Braces keep the name in one piece: it is no person's.
    authors = " and ".join(f"{{{author['name']}}}" for author in cited["authors"])
    fields = {
        "title": cited["title"],
        "author": authors,
        "booktitle": cited["collection-title"],
        "year": cited["year"],
        "url": cited["url"],
    }
    lines = [f"  {name} = {{{value}}}" for name, value in fields.items()]
    return "@inproceedings{vidprism,\n" + ",\n".join(lines) + "\n}"
