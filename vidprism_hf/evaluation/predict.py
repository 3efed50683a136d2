"""Predicts the top labels of video files, in batches, decoding the next ones meanwhile."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset
from transformers import AutoVideoProcessor

from ..errors import UserError
from ..model import VideoDecodeError, VidPrismForVideoClassification, VidPrismVideoProcessor
from ..model.loading import load_classifier, load_config, named, one_line
from ..workers import clip_loader, start_server

STDIN = "-"
MOST_WORKERS = 8  # default limit: each worker keeps two batches in memory, and more are rarely needed


@dataclass
class Prediction:
    """Labels and scores of one file, best first, or the error."""

    file: str
    labels: list[str]
    scores: list[float]
    error: str | None = None


class DecodedFiles(Dataset):
    """Items are a file's resized and cropped pixels, uint8 (T, 3, H, W), or an error message."""

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
    """Classifies files, in order; a file that cannot be decoded yields a prediction with `error`.

    Use it for many files; for a few, `transformers.pipeline` will do. Batch size and workers change scores only by
    rounding.

    Args:
        model: The classifier, in eval mode.
        processor: Its processor.
        files: Paths or URLs.
        top_k: Labels per file, at most the number of classes.
        batch_size: Files per forward pass.
        workers: Processes that decode the next batches; 0 decodes in this process.

    Raises:
        UserError: If scores are not finite.

    Example:
        ```python
        model, processor = load("runs/mine/export")
        for found in predict(model, processor, ["a.mp4", "b.mp4"], top_k=1):
            print(found.file, found.labels, found.scores)
        ```
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


def predict_files(
    model: str,
    files: Iterable[str],
    *,
    top_k: int = 5,
    batch_size: int = 8,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> Iterator[Prediction]:
    """Classifies files by a published model; see `predict`.

    Args:
        model: Exported folder or Hub id.
        files: Paths, URLs or folders of videos.
        top_k: Labels per file, at most the number of classes.
        batch_size: Files per forward pass.
        workers: Processes that decode the next batches; None takes one per core, none for a single batch.
        device: Where the model runs.
        revision: Branch, tag or commit on the Hub.

    Raises:
        UserError: If the model cannot be loaded, a folder has no videos, or scores are not finite.

    Example:
        ```python
        for found in vidprism_hf.predict("runs/mine/export", ["clips/holiday.mp4"], top_k=1):
            print(found.file, found.labels, found.scores, found.error)
        ```
    """
    listed = list_files(files)
    workers = default_workers(len(listed), batch_size) if workers is None else workers
    if workers:  # the server imports while the model loads
        start_server()
    classifier, processor = load(model, revision)
    yield from predict(classifier.to(device).eval(), processor, listed, top_k, batch_size, workers)


def _collate(items: list[torch.Tensor | str]) -> tuple[torch.Tensor, list[str | None]]:
    """Returns the pixels of the decoded files, and each file's error or None."""
    pixels = [item for item in items if not isinstance(item, str)]
    errors = [item if isinstance(item, str) else None for item in items]
    return torch.stack(pixels) if pixels else torch.empty(0), errors


def _classify(
    model: VidPrismForVideoClassification, processor: VidPrismVideoProcessor, pixels: torch.Tensor, top_k: int
) -> list[tuple[list[str], list[float]]]:
    """Returns labels and scores of each clip of a batch, uint8 (B, T, 3, H, W), best first."""
    pixels = pixels.to(model.device, non_blocking=True)
    # The processor's last step, done on the device: uint8 is a quarter of the data to copy.
    pixels = processor.rescale_and_normalize(
        pixels,
        processor.do_rescale,
        processor.rescale_factor,
        processor.do_normalize,
        processor.image_mean,
        processor.image_std,
    )
    with torch.inference_mode():
        scores = model(pixels.to(model.dtype), return_dict=True).logits.float().softmax(-1)
    if not torch.isfinite(scores).all():
        raise UserError(
            f"{model.name_or_path or 'the model'}: gives scores that are not finite numbers in {model.dtype}; its "
            "weights or its processor's settings are damaged, or it needs a precision with a wider range"
        )
    best = scores.topk(min(top_k, model.config.num_labels))
    labels = [[model.config.id2label[index] for index in row] for row in best.indices.tolist()]
    return list(zip(labels, best.values.tolist(), strict=True))


def list_files(arguments: Iterable[str]) -> list[str]:
    """Expands arguments to files, in order: a folder to the videos below it, sorted by path, `-` to lines of stdin.

    Raises:
        UserError: If a folder has no videos or standard input is empty.
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
    """Returns the videos in a folder and its subfolders, sorted by path; hidden ones are skipped."""
    from ..data.tables import VIDEO_EXTENSIONS  # imports the training stack, which takes seconds

    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        videos = [name for name in names if os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS]
        found += [os.path.join(root, name) for name in videos if not name.startswith(".")]
    return sorted(found)


def default_workers(num_files: int, batch_size: int) -> int:
    """Returns one decoding worker per core, at most one per batch, and none for a single batch."""
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
        UserError: If there is no such model, it is not a VidPrism, or its files are damaged.
    """
    if revision is not None and os.path.isdir(name_or_path):
        raise UserError(f"--revision {revision}: {name_or_path} is a folder, which has none; leave it out")
    config = load_config(name_or_path, revision)
    with one_line(name_or_path, named(name_or_path, revision), "video_preprocessor_config.json"):
        processor = AutoVideoProcessor.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
        crop, edge = processor.crop_size, config.vision_config.image_size
        if processor.do_center_crop and (crop["height"], crop["width"]) != (edge, edge):
            raise ValueError(
                f"its processor crops to {crop['height']} x {crop['width']}, its tower takes {edge} x {edge}"
            )
    return load_classifier(name_or_path, revision, config=config), processor
