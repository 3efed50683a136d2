"""`vidprism predict`: the top labels of video files, decoded beside the computation and classified in batches."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pickle import UnpicklingError

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

from ..errors import UserError, first_line, printable, why_not_loaded
from ..model import VideoDecodeError, VidPrismForVideoClassification, VidPrismVideoProcessor

STDIN = "-"
MOST_WORKERS = 8  # without --workers: each holds two batches, and decoding is seldom short of more


@dataclass
class Prediction:
    """The labels and scores of one file, best first, or why there are none."""

    file: str
    labels: list[str]
    scores: list[float]
    error: str | None = None


class DecodedFiles(Dataset):
    """Items are a file's pixels as the processor cuts them, uint8 (T, 3, H, W), or the reason why there are none."""

    def __init__(self, files: Sequence[str], processor: VidPrismVideoProcessor, num_frames: int):
        self.files = list(files)
        self.processor = processor
        self.num_frames = num_frames

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        settings = {"num_frames": self.num_frames, "do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        try:
            return self.processor(self.files[index], **settings)["pixel_values_videos"][0]
        except VideoDecodeError as error:
            return str(error)


def predict(
    model: VidPrismForVideoClassification,
    processor: VidPrismVideoProcessor,
    files: Sequence[str],
    top_k: int = 5,
    batch_size: int = 8,
    workers: int = 0,
) -> Iterator[Prediction]:
    """Classifies files, in their order; one that cannot be decoded gives a prediction with `error`.

    Neither batch size nor workers change a score by more than rounding.

    Args:
        model: The classifier, in eval mode.
        processor: Its processor.
        files: Paths or URLs.
        top_k: Labels per file; no more than there are.
        batch_size: Files that go through the model together.
        workers: Processes that decode the next batches meanwhile; 0 decodes in between.
    """
    loader = DataLoader(
        DecodedFiles(files, processor, model.config.num_frames),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=model.device.type == "cuda",
    )
    names = iter(files)
    for pixels, errors in loader:
        best = iter(_classify(model, processor, pixels, top_k) if len(pixels) else ())
        for error in errors:
            labels, scores = ([], []) if error else next(best)
            yield Prediction(next(names), labels, scores, error)


def _collate(items: list[torch.Tensor | str]) -> tuple[torch.Tensor, list[str | None]]:
    """The pixels of the files that could be decoded, and for each file its error or None."""
    pixels = [item for item in items if not isinstance(item, str)]
    errors = [item if isinstance(item, str) else None for item in items]
    return torch.stack(pixels) if pixels else torch.empty(0), errors


def _classify(
    model: VidPrismForVideoClassification, processor: VidPrismVideoProcessor, pixels: torch.Tensor, top_k: int
) -> list[tuple[list[str], list[float]]]:
    """Labels and scores of each clip of a batch, uint8 (B, T, 3, H, W), best first."""
    pixels = pixels.to(model.device, non_blocking=True)
    # The processor's own last step, on the device: four times less to copy.
    pixels = processor.rescale_and_normalize(
        pixels,
        processor.do_rescale,
        processor.rescale_factor,
        processor.do_normalize,
        processor.image_mean,
        processor.image_std,
    )
    with torch.inference_mode():
        scores = model(pixels.to(model.dtype)).logits.float().softmax(-1)
    best = scores.topk(min(top_k, model.config.num_labels))
    labels = [[model.config.id2label[index] for index in row] for row in best.indices.tolist()]
    return list(zip(labels, best.values.tolist(), strict=True))


def main(argv: list[str]) -> int:
    """Prints the predictions; 1 if a file could not be read."""
    parser = argparse.ArgumentParser(prog="vidprism predict", description="Top labels of video files.")
    parser.add_argument("model", help="exported folder or Hub id")
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="video file, URL, folder of videos, or - for a list on standard input"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub (main)")
    parser.add_argument("--top-k", type=int, default=5, help="labels per file (5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a file and line instead of a table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=8, help="files that go through the model together (8)")
    parser.add_argument(
        "--workers", type=int, help="processes that decode the next batches meanwhile (one a core, none for one batch)"
    )
    args = parser.parse_args(argv)
    for name, least in (("top_k", 1), ("batch_size", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # no such kind, or none here
        raise UserError(f"--device {args.device}: {first_line(error)}") from error

    files = list_files(args.files)
    model, processor = load(args.model, args.revision)
    workers = default_workers(len(files), args.batch_size) if args.workers is None else args.workers
    model = model.to(args.device).eval()
    predictions = predict(model, processor, files, args.top_k, args.batch_size, workers)
    failed = print_predictions(predictions, as_json=args.json)
    if failed:
        print(f"{failed} of {len(files)} files could not be decoded", file=sys.stderr, flush=True)
    return int(failed > 0)


def print_predictions(predictions: Iterable[Prediction], as_json: bool) -> int:
    """Prints predictions as they come, or as a table in the end; returns how many have an error."""
    failed = 0
    table = Table("file", "label", "score")
    for prediction in predictions:
        failed += prediction.error is not None
        if as_json:
            print(json.dumps(vars(prediction)), flush=True)
        elif prediction.error:
            print(f"vidprism predict: {printable(prediction.error)}", file=sys.stderr, flush=True)
        else:
            for place, (label, score) in enumerate(zip(prediction.labels, prediction.scores, strict=True)):
                # As Text: names may look like rich's markup.
                name = Text(printable(prediction.file) if place == 0 else "")
                table.add_row(name, Text(label), f"{score:.4f}")
            table.add_section()
    if table.row_count:
        Console().print(table)
    return failed


def list_files(arguments: Iterable[str]) -> list[str]:
    """The files that arguments stand for, in their order: a folder for the videos below it, sorted by path, and `-`
    for the lines of standard input.

    Raises:
        UserError: If a folder holds no video, or standard input no line.
    """
    files: list[str] = []
    for argument in arguments:
        if argument == STDIN:
            found = [line for line in sys.stdin.read().splitlines() if line.strip()]
        elif os.path.isdir(argument):
            found = videos_below(argument)
        else:
            found = [argument]
        if not found:
            raise UserError(f"{argument}: holds no videos; name files, folders of them, or - for a list")
        files += found
    return files


def videos_below(folder: str | os.PathLike) -> list[str]:
    """The videos in a folder and those below it, sorted by path; hidden ones are skipped."""
    from ..data.folder import VIDEO_EXTENSIONS  # brings in all that trains, which takes seconds

    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        videos = [name for name in names if os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS]
        found += [os.path.join(root, name) for name in videos if not name.startswith(".")]
    return sorted(found)


def default_workers(num_files: int, batch_size: int) -> int:
    """One decoding process a core, but none beside a single batch, and no more than there are batches."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    batches = -(-num_files // batch_size)
    return 0 if batches <= 1 else min(cores, batches, MOST_WORKERS)


def load(
    name_or_path: str, revision: str | None = None
) -> tuple[VidPrismForVideoClassification, VidPrismVideoProcessor]:
    """Loads a published classifier and its processor.

    Args:
        name_or_path: Exported folder or Hub id.
        revision: Branch, tag or commit on the Hub; main if None.

    Raises:
        UserError: If there is no such model, it is no VidPrism, or some of its weights are not there.
    """
    if revision is not None and os.path.isdir(name_or_path):
        raise UserError(f"--revision {revision}: {name_or_path} is a folder, which has none; leave it out")
    try:
        model, info = AutoModelForVideoClassification.from_pretrained(
            name_or_path, revision=revision, output_loading_info=True, trust_remote_code=False
        )
        processor = AutoVideoProcessor.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        place = name_or_path if revision is None else f"{name_or_path} at {revision}"
        raise UserError(f"{place}: cannot be loaded ({why_not_loaded(name_or_path, error)})") from error
    if not isinstance(model, VidPrismForVideoClassification):
        raise UserError(f"{name_or_path}: a {model.config.model_type} model, not a VidPrism")
    if missing := sorted(info["missing_keys"]):  # transformers has filled them with random numbers
        raise UserError(f"{name_or_path}: not a whole classifier, {len(missing)} weights are missing ({missing[0]})")
    return model, processor
