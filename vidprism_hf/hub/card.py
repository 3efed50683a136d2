"""The model card: facts of a run or a conversion, rendered by one template, and merged with what a person wrote."""

import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import requires, version
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..model import VidPrismConfig
from ..safe_yaml import parse_yaml
from . import card_merge
from .card_merge import BEGIN, merge_card, take_apart
from .markdown import Markdown, compiled, escape, listed, table

__all__ = ["CardFacts", "addressed", "eval_results_file", "merge_card", "render_card"]

TEMPLATE = Path(__file__).with_name("card_template.md")
CITATION = Path(__file__).with_name("citation.cff")
PACKAGES = ("vidprism_hf", "torch", "transformers", "lightning", "huggingface_hub", "av")
NEEDED = ("av", "torch", "torchvision", "transformers")  # by the code files of a model and the pipeline
METRICS = {"top1": "Top-1 accuracy", "top5": "Top-5 accuracy"}
NOT_STATED = "not stated"
UNKNOWN = "unknown"  # the Hub's id where nobody has stated a licence
# Where the snippets of the template name the model: see `addressed`.
SNIPPET = re.compile(r"^```(?:python|bash)\r?\n.*?^```", re.DOTALL | re.MULTILINE)
ADDRESS = re.compile(r'^(?P<python>model_id = )"[^\r\n]*|^(?P<bash>vidprism predict )\S+', re.MULTILINE)
# What a generated card calls the model, in its metadata and as its title.
NAME = re.compile(r"^(?P<key>model_name: |model-index:\r?\n- name: )(?P<name>[^\r\n]+)", re.MULTILINE)
TITLE = re.compile(rf"(?P<begin>^{re.escape(BEGIN)}[^\n]*\n\s*# )(?P<name>[^\r\n]+)", re.MULTILINE)
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
        from_scratch: Whether the training started from random weights.
        backbone: What the training started from, in words.
        dataset: Title or folder name of the data.
        dataset_id: Its id on the Hub, if it has one.
        dataset_split: Name there of the part that was held out; None where it has no name.
        dataset_config: Its configuration there, where one was named.
        dataset_revision: Its revision there, where one was named.
        data_license: Its licence and terms, in a line.
        split: How it was split.
        train_clips: Training clips used, `N` or `N of M`.
        eval_clips: Held-out clips that could be decoded, likewise.
        train_list_hash: sha256 over names and labels of the training clips.
        bad_clips: Clips that could not be decoded, with `split`, `name` and `cause`.
        metrics: Held-out metrics as shares, such as {"top1": 0.9}; empty where nothing was evaluated.
        intervals: The 95 % intervals of these, as far as they are known.
        num_evaluated: Clips that they are shares of.
        per_class: What was found of each class, as `evaluation_body` takes it.
        protocol: How they were measured, in sentences.
        conditions: What figures must have in common with them to be compared: views and split, in a phrase.
        hyper_parameters: Of the training.
        augmentation: Of the training clips.
        compute: Multiply-adds, parameters, device, time, memory.
        figures: Caption of each picture of the export, by its path.
        expert_weights: Mean weight of each expert over the held-out clips.
        license: Of the weights, an id of the Hub; None where nobody has stated it.
        config: Of the model; None is the default one of these frames and rates.
    """

    model_name: str
    labels: list[str]
    num_frames: int
    rates: list[int]
    origin: str
    base_model: str | None = None
    from_scratch: bool = False
    backbone: str | None = None
    dataset: str | None = None
    dataset_id: str | None = None
    dataset_split: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    data_license: str = NOT_STATED
    split: str | None = None
    train_clips: str | None = None
    eval_clips: str | None = None
    train_list_hash: str | None = None
    bad_clips: list[Any] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    num_evaluated: int | None = None
    per_class: list[dict[str, Any]] = field(default_factory=list)
    protocol: str | None = None
    conditions: str | None = None
    hyper_parameters: dict[str, Any] = field(default_factory=dict)
    augmentation: dict[str, Any] = field(default_factory=dict)
    compute: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    expert_weights: dict[str, float] = field(default_factory=dict)
    license: str | None = None
    config: VidPrismConfig | None = None

    def __post_init__(self):
        self.config = self.config or VidPrismConfig(num_frames=self.num_frames, rates=self.rates)

    @property
    def parts(self) -> str:
        """What the model is made of."""
        tower = (
            "an image tower built as CLIP's are, but not pre-trained," if self.from_scratch else "a CLIP image tower"
        )
        experts = "a heterogeneous mixture of temporal experts" if len(self.rates) > 1 else "one temporal expert"
        return f"{tower} with {experts}"

    @property
    def streams(self) -> str:
        """What becomes of a clip's frames."""
        kept = self.config.kept_per_window
        of = {
            "rgsta": "one frame kept in every {}" if kept == 1 else f"{kept} frames kept in every {{}}",
            "stride": "the first frame of every {}",
            "mean": "the mean of every {} frames",
            "max": "the maximum of every {} frames",
        }[self.config.aggregation]
        windows = [kept * rate for rate in self.rates] if self.config.aggregation == "rgsta" else self.rates
        number = f"{len(self.rates)} streams" if len(self.rates) > 1 else "one stream"
        return f"{number} ({of.format(', '.join(map(str, windows)))})"

    @property
    def expert_share(self) -> str | None:
        """What the experts' weights are shares of."""
        return expert_share(self.config)

    @property
    def base_license(self) -> str:
        """Licence of the weights that the tower started from."""
        if self.from_scratch:
            return "none: it started from random weights"
        return BASE_LICENSES.get(self.base_model or "", NOT_STATED)

    @property
    def evaluation(self) -> Markdown:
        """What the card says of the evaluation."""
        measured = self.metrics, self.intervals, self.num_evaluated
        return evaluation_body(self.protocol or "", *measured, len(self.labels), self.per_class)


def expert_share(config: VidPrismConfig) -> str | None:
    """What the experts' weights of a model are shares of; None where they tell nothing of a clip.

    Under the mean they follow from the lengths of the streams, and one expert has all the weight.
    """
    of = {"query": "the global query's attention that each expert holds", "max": "the channels that each expert gives"}
    return of.get(config.readout) if len(config.rates) > 1 else None


def render_card(facts: CardFacts) -> ModelCard:
    """Renders the card, with the metadata that the Hub reads; its generated part stands between two marks."""
    data = Metadata(
        library_name="transformers",
        pipeline_tag="video-classification",
        base_model=facts.base_model,
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        metrics=["accuracy"] if facts.metrics else None,
        license=facts.license or UNKNOWN,
        tags=list(TAGS),
        model_name=facts.model_name,
        eval_results=evaluation_results(facts) or None,
    )
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    ours = {"card_data": data.to_yaml(), "needed": requirements(), "bibtex": bibtex()}
    text = compiled(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        versions=versions,
        revision=git_revision(),
        table=table,
        listed=listed,
        raw=Markdown,
        **{name: Markdown(value) for name, value in ours.items()},
    )
    return Card(text)


class Exact(yaml.SafeDumper):
    """Writes texts so that they are read as they were: YAML folds some line breaks that it does not quote."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"')


Exact.add_representer(str, Exact.represent_text)


class Metadata(ModelCardData):
    """The YAML of a card."""

    def to_yaml(self, line_break: str | None = None, original_order: list[str] | None = None) -> str:
        super().to_yaml(line_break, original_order)  # brings the keys into that order
        told = {"sort_keys": False, "allow_unicode": True, "line_break": line_break}
        return yaml.dump(self.to_dict(), Dumper=Exact, **told).strip()


class Card(ModelCard):
    """A card whose metadata are `Metadata`."""

    card_data_class = Metadata


def addressed(card_text: str, repo_id: str) -> str:
    """The card that names the model as the Hub does: what a push publishes.

    A generated card names it as `.`, the folder that it lies in, in lines `model_id = "."` and `vidprism predict .`
    of its snippets. These lines are replaced, whichever model they name; so is its title, unless a person has changed
    that, and nothing else. Of a card without exactly one generated part nothing is.

    Args:
        card_text: The README.
        repo_id: `org/name`.
    """

    def name(line: re.Match) -> str:
        return f'{line["python"]}"{repo_id}"' if line["python"] else f"{line['bash']}{repo_id}"

    section = take_apart(card_text).section
    if section is None:
        return card_text
    snippets = SNIPPET.sub(lambda snippet: ADDRESS.sub(name, snippet[0]), section)
    return titled(card_text.replace(section, snippets), repo_id.rpartition("/")[2])


def titled(card_text: str, name: str) -> str:
    """The card with this name as title and in the metadata, if the two agree: else one of them is a person's own."""

    def scalar(text: str) -> str:  # in quotes, where it would be a number
        return yaml.safe_dump(text, allow_unicode=True).splitlines()[0]

    stated, title = NAME.search(card_text), TITLE.search(card_text)
    if not stated or not title or escape(card_merge.value(f"name: {stated['name']}")) != title["name"]:
        return card_text
    renamed = NAME.sub(lambda found: found["key"] + scalar(name), card_text, count=1)
    return TITLE.sub(lambda found: found["begin"] + escape(name), renamed, count=1)


def evaluation_body(
    protocol: str,
    metrics: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    num_evaluated: int | None,
    num_labels: int,
    per_class: Sequence[Mapping[str, Any]] = (),
) -> Markdown:
    """What a card says of an evaluation, in Markdown.

    Args:
        protocol: How it was done, in sentences.
        metrics: `top1` and the like, `mean_class`, `ece`.
        intervals: Of these, where they are known.
        num_evaluated: Clips that they are shares of.
        num_labels: Classes.
        per_class: Of each class `label`, `clips`, `unreadable`, `top1`, `low`, `high` and `taken_for`.
    """
    if not metrics:
        return escape(protocol)
    rows = ["| metric | value | 95 % interval | by guessing |", "| --- | --- | --- | --- |"]
    for name, value in metrics.items():
        unknown = "not known" if name in METRICS else ""
        interval = "{:.4f} to {:.4f}".format(*intervals[name]) if name in intervals else unknown
        guesses = int(name.removeprefix("top")) if name in METRICS else 1
        chance = "" if name == "ece" else f"{min(1.0, guesses / num_labels):.4f}"
        rows.append(f"| {name} | {value:.4f} | {interval} | {chance} |")
    said = []
    if num_evaluated and intervals.keys() & METRICS.keys():
        said.append(f"The interval (Wilson's) is that of {num_evaluated} clips drawn at random;")
        said.append("it knows nothing of other seeds.")
    if "mean_class" in intervals:
        said.append("That of mean_class, the mean over the classes, puts theirs together (MOVER).")
    if "ece" in metrics:
        said.append("ece is the expected calibration error of the best label's score.")
    parts = [escape(protocol), "\n".join(rows), " ".join(said)]
    if any(row["clips"] for row in per_class):
        parts.append(class_details(per_class))
    return Markdown("\n\n".join(part for part in parts if part))


def class_details(per_class: Sequence[Mapping[str, Any]]) -> str:
    """The table of the classes, folded."""
    lost = any(row["unreadable"] for row in per_class)
    titles = ["class", "clips", *["unreadable"] * lost, "top1", "95 % interval", "most often taken for"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for row in per_class:
        label, other = (escape(name or "") for name in (row["label"], row["taken_for"]))
        clips = f"{row['clips']} | {row['unreadable']}" if lost else row["clips"]
        shares = f"{row['top1']:.4f} | {row['low']:.4f} to {row['high']:.4f}" if row["clips"] else " | "
        lines.append(f"| {label} | {clips} | {shares} | {other} |")
    return "<details><summary>By class</summary>\n\n" + "\n".join(lines) + "\n\n</details>"


def evaluation_results(facts: CardFacts) -> list[EvalResult]:
    """The metrics in the form of the Hub's model index."""
    return [
        EvalResult(
            task_type="video-classification",
            dataset_type=facts.dataset_id or facts.dataset or "unknown",
            dataset_name=facts.dataset or "unknown",
            dataset_split=facts.dataset_split,
            dataset_config=facts.dataset_config,
            dataset_revision=facts.dataset_revision,
            metric_type="accuracy",
            metric_name=METRICS[name],
            metric_value=rounded(value),
        )
        for name, value in facts.metrics.items()
        if name in METRICS
    ]


def rounded(value: float) -> float:
    """A share without the digits that are but float32's."""
    return round(value, 6)


def eval_results_file(facts: CardFacts) -> dict[str, bytes]:
    """The metrics in the newer form, by the file's path; nothing where the Hub has not got the dataset.

    The Hub shows them where the dataset is registered as a benchmark with these tasks (hub/eval-results in its
    documentation), and keeps them otherwise.
    """
    if not facts.dataset_id or not facts.metrics:
        return {}
    conditions = facts.conditions or ""
    notes = ". ".join(text for text in (conditions, facts.protocol) if text)
    return eval_results(facts.dataset_id, facts.metrics, conditions, notes)


def eval_results(
    dataset_id: str,
    metrics: Mapping[str, float],
    conditions: str,
    notes: str,
    existing: Mapping[str, bytes] = MappingProxyType({}),
) -> dict[str, bytes]:
    """A file of results on a dataset of the Hub, by its path in an export.

    Results of a task under other conditions have a file of their own, as the Hub wants it, with a number in its name.

    Args:
        dataset_id: Of the dataset.
        metrics: Its `top1` and `top5` are told.
        conditions: Views and split, with which the notes begin.
        notes: How they were measured.
        existing: The files that there are, by path; in them other tasks stay.

    Raises:
        ValueError: If one of them is no list of results.
    """
    entries = [
        EvalResultEntry(dataset_id=dataset_id, task_id=name, value=rounded(value), notes=notes)
        for name, value in metrics.items()
        if name in METRICS
    ]
    tasks = {entry.task_id for entry in entries}
    for number in count(1):
        path = (
            f".eval_results/{dataset_id.replace('/', '--').replace('.', '-')}{f'-{number}' if number > 1 else ''}.yaml"
        )
        known = parse_yaml(existing.get(path, b"")) or []
        if not isinstance(known, list) or not all(isinstance(entry, dict) for entry in known):
            raise ValueError(f"{path} is no list of results")
        same = [entry for entry in known if (entry.get("dataset") or {}).get("task_id") in tasks]
        if all(str(entry.get("notes") or "").startswith(f"{conditions}.") for entry in same):
            break
    kept = [entry for entry in known if entry not in same] + eval_result_entries_to_yaml(entries)
    return {path: yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).encode()}


@cache
def requirements() -> str:
    """What a stranger needs to run the model's own code, as pip takes it in a shell."""
    found = {re.match(r"[\w-]+", line)[0]: line.partition(";")[0].strip() for line in requires("vidprism_hf")}
    return " ".join(f"'{found[name]}'" for name in NEEDED)


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
