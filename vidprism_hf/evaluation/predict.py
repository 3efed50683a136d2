"""`vidprism predict`: the top labels of video files, decoded beside the computation and classified in batches."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch.utils.data import Dataset
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

from ..errors import UserError, why_not_loaded
from ..model import VideoDecodeError, VidPrismForVideoClassification, VidPrismVideoProcessor
from ..workers import clip_loader

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
    clips = DecodedFiles(files, processor, model.config.num_frames)
    loader = clip_loader(
        clips,
        workers,
        _collate,
        batch_size=batch_size,
        pin_memory=model.device.type == "cuda",
    )
    loader.setting = "--workers"
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
    from ..data.tables import VIDEO_EXTENSIONS  # brings in all that trains, which takes seconds

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
            name_or_path, revision=revision, output_loading_info=True
        )
        processor = AutoVideoProcessor.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError, SafetensorError) as error:
        place = name_or_path if revision is None else f"{name_or_path} at {revision}"
        raise UserError(f"{place}: cannot be loaded ({why_not_loaded(name_or_path, error)})") from error
    if not isinstance(model, VidPrismForVideoClassification):
        raise UserError(f"{name_or_path}: a {model.config.model_type} model, not a VidPrism")
    if missing := sorted(info["missing_keys"]):  # transformers has filled them with random numbers
        raise UserError(f"{name_or_path}: not a whole classifier, {len(missing)} weights are missing ({missing[0]})")
    return model, processor
