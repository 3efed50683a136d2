"""`vidprism predict`: the top labels of video files."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

from ..errors import UserError, why_not_loaded
from ..model import VideoDecodeError, VidPrismForVideoClassification, VidPrismVideoProcessor


@dataclass
class Prediction:
    """The labels and scores of one file, best first, or why there are none."""

    file: str
    labels: list[str]
    scores: list[float]
    error: str | None = None


def predict(
    model: VidPrismForVideoClassification, processor: VidPrismVideoProcessor, files: list[str], top_k: int = 5
) -> Iterator[Prediction]:
    """Classifies files one by one; a file that cannot be decoded gives a prediction with `error`.

    Args:
        model: The classifier, in eval mode.
        processor: Its processor.
        files: Paths or URLs.
        top_k: Labels per file; no more than there are.
    """
    for file in files:
        try:
            inputs = processor(file, num_frames=model.config.num_frames, return_tensors="pt").to(model.device)
        except VideoDecodeError as error:
            yield Prediction(file, [], [], error=str(error))
            continue
        with torch.inference_mode():
            scores = model(inputs["pixel_values_videos"].to(model.dtype)).logits[0].float().softmax(-1)
        best = scores.topk(min(top_k, model.config.num_labels))
        labels = [model.config.id2label[index] for index in best.indices.tolist()]
        yield Prediction(file, labels, best.values.tolist())


def main(argv: list[str]) -> int:
    """Prints the predictions; 1 if a file could not be read."""
    parser = argparse.ArgumentParser(prog="vidprism predict", description="Top labels of video files.")
    parser.add_argument("model", help="exported folder or Hub id")
    parser.add_argument("files", nargs="+", metavar="FILE", help="video file or URL")
    parser.add_argument("--top-k", type=int, default=5, help="labels per file (5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a file and line instead of a table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    model, processor = load(args.model)
    failed = False
    table = Table("file", "label", "score")
    for prediction in predict(model.to(args.device).eval(), processor, args.files, args.top_k):
        failed |= prediction.error is not None
        if args.json:
            print(json.dumps(vars(prediction)), flush=True)
        elif prediction.error:
            print(f"vidprism predict: {prediction.error}", file=sys.stderr, flush=True)
        else:
            for place, (label, score) in enumerate(zip(prediction.labels, prediction.scores, strict=True)):
                table.add_row(prediction.file if place == 0 else "", label, f"{score:.4f}")
            table.add_section()
    if not args.json and table.row_count:
        Console().print(table)
    return int(failed)


def load(name_or_path: str) -> tuple[VidPrismForVideoClassification, VidPrismVideoProcessor]:
    """Loads a published classifier and its processor.

    Raises:
        UserError: If there is no such model, it is no VidPrism, or some of its weights are not there.
    """
    try:
        model, info = AutoModelForVideoClassification.from_pretrained(name_or_path, output_loading_info=True)
        processor = AutoVideoProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{name_or_path}: cannot be loaded ({why_not_loaded(name_or_path, error)})") from error
    if not isinstance(model, VidPrismForVideoClassification):
        raise UserError(f"{name_or_path}: a {model.config.model_type} model, not a VidPrism")
    if missing := sorted(info["missing_keys"]):  # transformers has filled them with random numbers
        raise UserError(f"{name_or_path}: not a whole classifier, {len(missing)} weights are missing ({missing[0]})")
    return model, processor
