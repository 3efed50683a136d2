"""The Lightning data module: from a source of clips to batches of normalised pixels on the device."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from transformers import AutoConfig

from ..errors import first_line
from ..model import VISION_PRESETS, VidPrismConfig, VidPrismVideoProcessor
from .dataset import ClipDataset, ClipSampler
from .demo import DEMO_CLASSES, demo_folder
from .folder import scan_folder
from .tables import ClipSplits, ClipTable, DataError
from .transforms import ClipAugmentation

DEMO = "demo"
# Labels with one of these words may change their meaning in a mirror.
MIRROR_WORDS = frozenset(
    {"left", "right", "leftward", "rightward", "leftwards", "rightwards"}
    | {"clockwise", "counterclockwise", "anticlockwise"}
)


class VideoDataModule(L.LightningDataModule):
    """Clips of a folder, or the demo, as batches for training and evaluation.

    Batches are dicts of `pixel_values_videos` (B, T, 3, H, W), `labels` (B,) and `clip_index` (B,). Pixels
    are uint8 until they are on the device and become normalised floats there.

    Args:
        source: Folder with train/<class>/ and val/<class>/, or with <class>/ and a rule that holds clips out;
            or demo, clips that are rendered on first use (write ./demo for a folder of that name).
        root: Folder that demo clips are rendered into.
        processor: What defines the evaluation input: a VidPrism or CLIP checkpoint (folder or Hub id) or a
            preset (b32, b16, l14, tiny). The command line takes it from the model.
        num_frames: Frames per clip. The command line takes it from the model.
        batch_size: Clips per batch in each process.
        num_workers: Loader processes beside each training process; 0 loads in the training process.
        val_fraction: Rule: share of each class to hold out, drawn by seed and file name.
        val_list: Rule: text file with one held-out clip a line, relative to the source.
        val_pattern: Rule: regular expression; clips in which it is found are held out. It is searched in the
            path below the class folder, so ^eli_ finds run/eli_run.avi.
        seed: Seed of the demo clips, of val_fraction, of the order and of the augmentation.
        train_views: Random views of each training clip, gone through in turn, one an epoch; null draws a new view
            each epoch. With a number, a frozen backbone computes the features of each view once, in memory.
        min_crop_scale: Smallest area of a training crop as a share of the picture, above 0 and at most 1.
        horizontal_flip: Whether to mirror half of the training clips; null does unless a label speaks of
            left, right or (counter-)clockwise.
        grayscale: Share of training clips that lose their colour, from 0 to 1.

    Raises:
        DataError: If an argument or, as soon as labels or clips are needed, the source cannot be used.
    """

    def __init__(
        self,
        source: str = DEMO,
        root: str = "data",
        processor: str = "b16",
        num_frames: int = 32,
        batch_size: int = 8,
        num_workers: int = 2,
        val_fraction: float | None = None,
        val_list: str | None = None,
        val_pattern: str | None = None,
        seed: int = 0,
        train_views: int | None = None,
        min_crop_scale: float = 0.08,
        horizontal_flip: bool | None = None,
        grayscale: float = 0.2,
    ):
        super().__init__()
        # Not to the logger, where names shared with the model (num_frames) would clash.
        self.save_hyperparameters(logger=False)
        _check_arguments(**self.hparams)
        self._splits: ClipSplits | None = None
        self._video_processor: VidPrismVideoProcessor | None = None

    @property
    def name(self) -> str:
        """A short name of the source: `demo`, or the folder's own name."""
        return DEMO if self.hparams.source == DEMO else Path(self.hparams.source).resolve().name

    @property
    def split_description(self) -> str:
        """How the held-out clips were chosen, in a phrase."""
        hparams = self.hparams
        if hparams.source == DEMO:
            return f"rendered clips, train and held-out drawn apart (seed {hparams.seed})"
        if hparams.val_fraction is not None:
            return f"a share of {hparams.val_fraction:g} of each class held out (seed {hparams.seed})"
        if hparams.val_list is not None:
            return f"held-out clips listed in {Path(hparams.val_list).name}"
        if hparams.val_pattern is not None:
            return f"held out: file names in which `{hparams.val_pattern}` is found"
        return "the source's own folders for training and held-out clips"

    @property
    def id2label(self) -> dict[int, str]:
        """Label name of each class index; known from construction on, before any clip is rendered or read."""
        if self.hparams.source == DEMO:
            return dict(enumerate(DEMO_CLASSES))
        return dict(self._scan().id2label)

    @property
    def train_table(self) -> ClipTable:
        """The clips to train on."""
        return self._scan().train

    @property
    def val_table(self) -> ClipTable:
        """The held-out clips."""
        return self._scan().val

    @property
    def video_processor(self) -> VidPrismVideoProcessor:
        """What defines evaluation input."""
        if self._video_processor is None:
            self._video_processor = load_processor(self.hparams.processor, self.hparams.num_frames)
        return self._video_processor

    def prepare_data(self) -> None:
        """Renders the demo clips if they are needed and not there."""
        if self.hparams.source == DEMO:
            demo_folder(self.hparams.root, self.hparams.seed)

    def setup(self, stage: str | None = None) -> None:
        """Lists the clips and loads the processor, so that bad names show before training starts."""
        splits, _ = self._scan(), self.video_processor
        if stage in ("fit", None):
            rank_zero_info(
                f"Data: {len(splits.train)} training and {len(splits.val)} held-out clips of "
                f"{len(splits.id2label)} labels; {self._flip()[1]}"
            )

    def train_dataloader(self) -> DataLoader:
        """Augmented clips in random order; the last batch may be smaller."""
        crop = self.video_processor.crop_size
        augmentation = ClipAugmentation(
            (crop["height"], crop["width"]),
            min_crop_scale=self.hparams.min_crop_scale,
            horizontal_flip=self._flip()[0],
            grayscale=self.hparams.grayscale,
        )
        return self._loader(self.train_table, augmentation)

    def val_dataloader(self) -> DataLoader:
        """Every held-out clip once, as the processor makes it."""
        return self._loader(self.val_table, None)

    def test_dataloader(self) -> DataLoader:
        """The held-out clips again, for the final evaluation of the best checkpoint."""
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Normalises the pixels where they are now."""
        return batch | {"pixel_values_videos": normalize_clips(batch["pixel_values_videos"], self.video_processor)}

    def _scan(self) -> ClipSplits:
        if self._splits is None:
            hparams = self.hparams
            rules = {name: hparams[name] for name in ("val_fraction", "val_list", "val_pattern")}
            if hparams.source == DEMO:
                self._splits = scan_folder(demo_folder(hparams.root, hparams.seed))
            else:
                self._splits = scan_folder(hparams.source, seed=hparams.seed, **rules)
            for note in self._splits.notes:
                rank_zero_warn(note)
        return self._splits

    def _flip(self) -> tuple[bool, str]:
        """Whether to mirror clips, and the reason in words."""
        asked = self.hparams.horizontal_flip
        sided = mirror_label(self.id2label.values())
        if asked is not None:
            doubt = f", although label {sided!r} names a side" if asked and sided else ""
            return asked, f"horizontal flip {'on' if asked else 'off'} as asked{doubt}"
        if sided is not None:
            return False, f"horizontal flip off, since label {sided!r} names a side"
        return True, "horizontal flip on, since no label names a side"

    def _loader(self, table: ClipTable, augmentation: ClipAugmentation | None) -> DataLoader:
        seed, workers = self.hparams.seed, self.hparams.num_workers
        world = self.trainer.world_size if self.trainer is not None else 1
        if len(table) < world:
            # A process without a clip would leave the others waiting for it.
            raise DataError(f"{table.origin}: {len(table)} clips in a split for {world} processes; use fewer devices")
        return DataLoader(
            ClipDataset(table, self.video_processor, augmentation, seed, self.hparams.train_views),
            batch_size=self.hparams.batch_size,
            sampler=ClipSampler(len(table), training=augmentation is not None, seed=seed),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def load_processor(name: str, num_frames: int) -> VidPrismVideoProcessor:
    """The processor of a preset, a VidPrism checkpoint or a CLIP checkpoint.

    Args:
        name: Preset (b32, b16, l14, tiny), folder or Hub id.
        num_frames: Frames per clip.

    Raises:
        DataError: If there is no such checkpoint.
    """
    if name in VISION_PRESETS:
        # Presets are OpenAI's CLIP, whose mean and deviation are the processor's own: nothing to fetch.
        edge = VidPrismConfig.from_preset(name).vision_config.image_size
        return VidPrismVideoProcessor(
            num_frames=num_frames, size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}
        )
    try:
        if isinstance(AutoConfig.from_pretrained(name), VidPrismConfig):
            return VidPrismVideoProcessor.from_pretrained(name, num_frames=num_frames)
        return VidPrismVideoProcessor.from_vision_pretrained(name, num_frames)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name}: no CLIP or VidPrism checkpoint ({first_line(error)}); give a folder, a Hub id or "
            f"one of {', '.join(VISION_PRESETS)}"
        ) from error


def mirror_label(labels: Iterable[str]) -> str | None:
    """The first label with a word that a mirror may turn wrong, None if there is none."""
    for label in labels:
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", label)
        if MIRROR_WORDS.intersection(word.lower() for word in words):
            return label
    return None


def normalize_clips(pixels: torch.Tensor, processor: VidPrismVideoProcessor) -> torch.Tensor:
    """Turns uint8 pixels (..., 3, H, W) into the float32 ones that the processor's full output holds."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device)[:, None, None]
        for values in (processor.image_mean, processor.image_std)
    )
    return (pixels.float() * processor.rescale_factor - mean) / std


def _check_arguments(
    source: str,
    batch_size: int,
    num_workers: int,
    num_frames: int,
    train_views: int | None,
    seed: int,
    min_crop_scale: float,
    grayscale: float,
    val_fraction: float | None,
    val_list: str | None,
    val_pattern: str | None,
    **_: Any,
) -> None:
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_frames", num_frames, 1),
        ("num_workers", num_workers, 0),
        ("train_views", 1 if train_views is None else train_views, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise DataError(f"data.{name}={value}: must be at least {least}")
    if not 0 < min_crop_scale <= 1:
        raise DataError(f"data.min_crop_scale={min_crop_scale}: must be above 0 and at most 1")
    if not 0 <= grayscale <= 1:
        raise DataError(f"data.grayscale={grayscale}: must lie between 0 and 1")
    rules = {"val_fraction": val_fraction, "val_list": val_list, "val_pattern": val_pattern}
    given = [name for name, value in rules.items() if value is not None]
    if source == DEMO and given:
        raise DataError(f"data.{given[0]}: the demo is already split; remove it")
