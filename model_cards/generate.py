"""Writes the cards of the presets, `<tower>.md`, from presets.yaml, the recipes and counts of the real models.

python model_cards/generate.py
"""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from vidprism_hf import VidPrismConfig
from vidprism_hf.data.sources.benchmarks import BENCHMARKS
from vidprism_hf.evaluation.compute import giga_macs_per_view, million_parameters, without_memory
from vidprism_hf.hub.card import BASE_LICENSES, TAGS, bibtex
from vidprism_hf.model import VISION_PRESETS

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
NOT_MEASURED = "not yet measured by us"


def cards() -> dict[str, str]:
    """The text of each card, by its file's name."""
    presets = yaml.safe_load((HERE / "presets.yaml").read_text(encoding="utf-8"))
    return {f"{name}.md": card(name, presets) for name in presets["towers"]}


def card(tower: str, presets: dict[str, Any]) -> str:
    """The card of one tower."""
    datasets = [describe_dataset(name, tower, presets) for name in presets["datasets"]]
    base_model = VISION_PRESETS[tower]["name_or_path"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="video-classification",
        base_model=base_model,
        datasets=[dataset["hub_id"] for dataset in datasets if dataset["hub_id"]],
        license="unknown",  # of weights that are not there yet
        tags=list(TAGS),
    )
    described = {
        "name": tower,
        "title": presets["towers"][tower],
        "base_model": base_model,
        "license": BASE_LICENSES[base_model],
        "sizes": [describe_size(tower, frames) for frames in presets["frames"]],
    }
    rendered = ModelCard.from_template(
        data,
        template_path=HERE / "preset.md",
        tower=described,
        # The metadata is named `datasets` too; what is given here comes first.
        datasets=datasets,
        paper=presets["paper"],
        bibtex=bibtex(),
    )
    return str(rendered).rstrip("\n") + "\n"


def describe_size(tower: str, frames: int) -> dict[str, Any]:
    """What the model costs with so many frames."""
    config = VidPrismConfig.from_preset(tower, num_frames=frames, id2label={index: str(index) for index in range(400)})
    parameters = million_parameters(without_memory(config))
    return {"frames": frames, "rates": config.rates, "gmacs": giga_macs_per_view(config), "parameters": parameters}


def describe_dataset(name: str, tower: str, presets: dict[str, Any]) -> dict[str, Any]:
    """A dataset, its recipe, and what is known of results on it."""
    benchmark = BENCHMARKS[name]
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    model, data = recipe["model"], recipe["data"]
    counts = "; ".join(f"{train:,} / {held_out:,}" for train, held_out in filter(None, benchmark.counts))
    return {
        "name": name,
        "title": benchmark.title,
        "num_classes": benchmark.num_classes,
        "counts": counts if len(set(benchmark.counts)) > 1 else counts.partition(";")[0],
        "views": f"{model['num_frames']} x {data.get('test_crops', 1)} x {data.get('test_clips', 1)}",
        "settings": {
            "learning rate": model["learning_rate"],
            "backbone": f"learning rate x {model['backbone_lr_scale']}",
            "weight decay": model["weight_decay"],
            "epochs (warm-up)": f"{recipe['trainer']['max_epochs']} ({model['warmup_epochs']})",
            "clips a step and GPU": data["batch_size"],
        },
        "hub_id": getattr(benchmark.parts.get("clips"), "repo", None),
        "home": benchmark.home,
        "terms": benchmark.terms,
        "results": results(name, tower, presets),
    }


def results(dataset: str, tower: str, presets: dict[str, Any]) -> list[dict[str, Any]]:
    """The paper's figures that can be of this model, and ours."""
    rows = []
    for row in presets["paper"]["results"]:
        if row["dataset"] != dataset or row["tower"] not in (tower, None):
            continue
        what = row.get("what") or f"{row['frames']} frames x {row['views']} views, {row['gflops']} GFLOPs a view"
        which = "" if row["tower"] else "; tower not stated in the note"
        rows.append({"whose": "the paper's", "top1": row["top1"], "what": what + which})
    ours = [row for row in presets["measured"] if (row["dataset"], row["tower"]) == (dataset, tower)]
    for row in ours:
        what = f"{row['frames']} frames x {row['views']} views; {row['run']}"
        rows.append({"whose": "ours", "top1": row["top1"], "what": what})
    return rows if ours else [*rows, {"whose": NOT_MEASURED, "top1": "", "what": ""}]


def main() -> None:
    for name, text in cards().items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(f"written: {HERE / name}")


if __name__ == "__main__":
    main()
