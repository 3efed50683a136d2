"""The Lightning data module: turns a source of videos into batches of normalised pixels on the device."""

import inspect
from functools import cached_property
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from ..distributed import gathered, print_once
from ..errors import printable
from ..model import VidPrismForVideoClassification, VidPrismVideoProcessor
from ..util import preview
from ..workers import clip_loader, start_server
from .config import check_arguments
from .features.cache import FeatureCache
from .features.split import CachedClips
from .loading.dataset import ClipDataset, ClipReader, ClipSampler, PlainExamples, collate
from .loading.position import check_same_clips, fingerprint, go_on
from .loading.views import describe_training_views, mirrored, part_reader
from .open import DEMO, check_source, describe_split, open_source, source_name
from .reading.processor import DEFAULT_FRAMES, load_processor, normalize_clips, processor_for
from .reading.transforms import BatchMixing
from .sources.demo import DEMO_CLASSES, demo_folder
from .streaming.dataset import StreamedClips
from .tables import ClipSplits, ClipTable, DataError, stable_hash

if TYPE_CHECKING:
    from .streaming.open import ClipStreams


class VideoDataModule(L.LightningDataModule):
    """Loads labelled videos from any source as batches for training and evaluation.

    Use it with a Lightning Trainer, or take `examples` for a training loop of your own:

        model = VidPrismForVideoClassification(VidPrismConfig.from_preset("tiny"))
        data = VideoDataModule("path/to/folder", val_fraction=0.2)
        data.take_model(model)
        dataset = data.examples("train")

    Batches are dicts of `pixel_values_videos` (B, T, 3, H, W), `labels` (B,), `clip_index` (B,), `readable` (B,) and
    the entries that `collate` adds. Pixels are uint8 until they are on the device, where they become normalised floats.
    With several test views they are (B, views, T, 3, H, W). Mixup and cutmix add `soft_labels` (B, K) in training.

    Args:
        source: Folder with train/<class>/ and val/<class>/, or with <class>/ and a split rule; the folder that
            annotation files refer to; a benchmark (ucf101, hmdb51, k400, ssv2); a Hub dataset (org/name); or demo,
            videos rendered on first use (write ./demo for a folder of that name).
        root: Folder for downloaded benchmarks and archives and for the rendered demo.
        processor: Defines the evaluation input: a VidPrism or CLIP checkpoint (folder or Hub id) or a preset (b32,
            b16, l14, tiny). None takes frames, size and pixel statistics from the model: see `take_model`.
        num_frames: Frames per clip, with a named processor; None takes the model's (32 for a preset).
        batch_size: Videos per batch on each rank.
        num_workers: Loader processes per rank; 0 loads in the training process.
        worker_timeout: Seconds to wait for a batch from the loader processes before the run ends; null: no limit.
        split: Official split of a benchmark, 1 to 3 (ucf101, hmdb51).
        verify_counts: Whether to require as many videos as the benchmark's official annotations list.
        train_list: Annotation file of the training split, with labels (formats: sources/annotation_formats.py).
        val_list: With train_list, the annotation file of the validation split; otherwise a split rule: a text file
            with one validation video per line, relative to the source.
        label_names: File with the names of the class indices in annotation files, such as CSV rows id,name.
        allow_missing: Whether annotated videos may be missing on disk; they are counted and skipped.
        val_fraction: Split rule: fraction of each class for validation, drawn by seed and file name.
        val_pattern: Split rule: regular expression; matching videos go to the validation split. It is searched in
            the path below the class folder, so ^eli_ finds run/eli_run.avi.
        hub_config: Configuration of a Hub dataset.
        hub_revision: Branch, tag or commit of a Hub dataset.
        train_split: Split of a Hub dataset to train on.
        val_split: Its validation split; null takes the first of validation, val and test that exists.
        video_column: Column of a Hub dataset with the videos; null detects it.
        label_column: Column of a Hub dataset with the labels; null detects it.
        streaming: Whether a Hub dataset is streamed instead of downloaded.
        shots: Training videos per class (few-shot), drawn by seed and name; null uses all.
        seed: Seed of the demo, val_fraction, shots, the order and the augmentation.
        train_views: Number of fixed random views of each training video, one per epoch in turn; null draws a new
            view each epoch.
        feature_cache: Folder for the frame features of a frozen backbone: each view is computed once, and the head
            is trained on them. Several runs may use one folder.
        feature_cache_limit: Maximum size of that folder, such as 50GB; a run that would exceed it does not start.
        frame_stride: Step between the frames of a clip (dense sampling); null takes one frame from each of
            num_frames equal segments of the video: a random one in training, the middle one in evaluation.
        test_clips: Clips per video in the final evaluation and in evaluate; their scores are averaged.
        test_crops: Crops of each such clip, 1 (centre) or 3 along the longer side.
        augment: Whether to train on random views; false trains on the evaluation view, which suits heads on frozen
            towers with little data, and ignores min_crop_scale and grayscale.
        min_crop_scale: Smallest area of a training crop as a fraction of the frame, above 0 and at most 1.
        horizontal_flip: Whether to flip half of the training clips; null does unless a label names left, right or
            (counter-)clockwise.
        grayscale: Fraction of training clips converted to grayscale, from 0 to 1.
        rand_augment: Magnitude of RandAugment, 0 to 30; null disables it.
        random_erasing: Fraction of training clips with a random rectangle erased.
        mixup_alpha: Parameter of mixup's Beta distribution; 0 disables it.
        cutmix_alpha: Parameter of cutmix's Beta distribution; 0 disables it. With both, each batch draws one.
        max_bad_fraction: Fraction of training videos that may be undecodable before the run stops.
        clip_time_limit: Seconds that decoding one video may take before it counts as undecodable; null: no limit.

    Raises:
        DataError: If an argument is invalid or, once labels or videos are needed, the source cannot be used.
    """

    def __init__(
        self,
        source: str = "demo",
        root: str = "data",
        processor: str | None = None,
        num_frames: int | None = None,
        batch_size: int = 8,
        num_workers: int = 2,
        worker_timeout: float | None = 600.0,
        split: int = 1,
        verify_counts: bool = True,
        train_list: str | None = None,
        val_list: str | None = None,
        label_names: str | None = None,
        allow_missing: bool = False,
        val_fraction: float | None = None,
        val_pattern: str | None = None,
        hub_config: str | None = None,
        hub_revision: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        video_column: str | None = None,
        label_column: str | None = None,
        streaming: bool = False,
        shots: int | None = None,
        seed: int = 0,
        train_views: int | None = None,
        feature_cache: str | None = None,
        feature_cache_limit: str | int = "50GB",
        frame_stride: int | None = None,
        test_clips: int = 1,
        test_crops: int = 1,
        augment: bool = True,
        min_crop_scale: float = 0.08,
        horizontal_flip: bool | None = None,
        grayscale: float = 0.2,
        rand_augment: int | None = None,
        random_erasing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        max_bad_fraction: float = 0.01,
        clip_time_limit: float | None = 60.0,
    ):
        super().__init__()
        # Not to the logger, where names shared with the model (num_frames) would clash.
        self.save_hyperparameters(logger=False)
        check_arguments(self.hparams)
        parameters = inspect.signature(VideoDataModule).parameters
        check_source(self.hparams, {name: parameter.default for name, parameter in parameters.items()})
        self._splits: ClipSplits | None = None
        self._video_processor: VidPrismVideoProcessor | None = None
        self._mixing: BatchMixing | None = None
        self._cached: dict[tuple[str, str, str], CachedClips] = {}  # by tower digest, precision and part
        self._begin: dict[str, Any] | None = None  # where to resume
        self._bad_epoch = -1  # the last training epoch with an undecodable video

    @property
    def name(self) -> str:
        """Short name of the source: `demo`, a benchmark, a Hub id, or the folder's name."""
        return source_name(self.hparams.source)

    @property
    def split_description(self) -> str:
        """One phrase on how the validation split was chosen."""
        return describe_split(self.hparams, self._splits.description if self._splits else "")

    @property
    def id2label(self) -> dict[int, str]:
        """Label name of each class index; available before any video is rendered or read."""
        if self.hparams.source == DEMO:
            return dict(enumerate(DEMO_CLASSES))
        return dict(self.splits.id2label)

    @property
    def splits(self) -> "ClipSplits | ClipStreams":
        """The videos and labels of the source, downloaded and listed on first use."""
        if self._splits is None:
            self._splits = open_source(self.hparams)
            for note in self._splits.notes:
                rank_zero_warn(printable(note))
        return self._splits

    @property
    def num_clips(self) -> dict[str, int]:
        """Numbers of training and validation videos, as `train` and `val`."""
        if self.hparams.streaming:
            return {"train": self.splits.num_train, "val": self.splits.num_val}
        return {"train": len(self.splits.train), "val": len(self.splits.val)}

    @property
    def train_table(self) -> ClipTable:
        """The training videos; not available with streaming."""
        return self._table("train")

    @property
    def val_table(self) -> ClipTable:
        """The validation videos; not available with streaming."""
        return self._table("val")

    def _table(self, split: str) -> ClipTable:
        if self.hparams.streaming:
            raise DataError("data.streaming: streamed videos have no table; set it to false")
        return getattr(self.splits, split)

    @property
    def video_processor(self) -> VidPrismVideoProcessor:
        """The processor that defines the evaluation input."""
        if self._video_processor is None:
            name, frames = self.hparams.processor, self.hparams.num_frames
            module = self.trainer.lightning_module if self.trainer is not None else None
            if name is not None:
                self._video_processor = load_processor(name, frames or DEFAULT_FRAMES)
            elif hasattr(module, "video_processor"):
                self._video_processor = module.video_processor()
            else:
                raise DataError("data.processor: no model is known yet; call take_model(model), or name a checkpoint")
        return self._video_processor

    @video_processor.setter
    def video_processor(self, processor: VidPrismVideoProcessor) -> None:
        """Sets another model's processor, which must have the attributes that are used here."""
        self._video_processor = processor

    def take_model(self, model: VidPrismForVideoClassification) -> None:
        """Takes frames, size and pixel statistics from a model, unless `processor` is set.

        Not needed when a Trainer runs a `VidPrismLightningModule`.
        """
        if self.hparams.processor is None:
            self._video_processor = processor_for(model)

    def examples(self, split: str) -> PlainExamples:
        """Returns the examples of a split for a training loop of your own, such as transformers' Trainer.

        Args:
            split: `train` (random views) or `val` (evaluation view).

        Raises:
            DataError: If no model is known yet (see `take_model`), or the dataset is streamed.
        """
        return PlainExamples(self._clips(split))

    def prepare_data(self) -> None:
        """Renders the demo videos if they are needed and missing."""
        if self.hparams.source == DEMO:
            demo_folder(self.hparams.root, self.hparams.seed)

    def setup(self, stage: str | None = None) -> None:
        """Lists the videos and loads the processor, so that bad names fail before training starts."""
        splits = self.splits
        if self.hparams.num_workers:  # it starts in parallel with what follows
            start_server()
        _ = self.video_processor
        if stage in ("fit", None):
            seen = "training uses the evaluation view"
            if self.hparams.augment:
                seen = mirrored(self.hparams.horizontal_flip, self.id2label.values())[1]
            print_once(
                f"Data: {self.num_clips['train']} training and {self.num_clips['val']} validation videos of "
                f"{len(splits.id2label)} classes ({preview(list(splits.id2label.values()), 8)}); {seen}"
            )

    def train_dataloader(self) -> DataLoader:
        """Returns training clips in random order; the last batch may be smaller.

        A resumed run starts where it stopped. It sets the position itself, because Lightning asks for the loader
        before it knows the epoch.
        """
        loader = self._loader("train")
        epoch = self.trainer.fit_loop.epoch_progress.current.processed if self.trainer is not None else 0
        begin, self._begin = self._begin, None
        if begin is None or begin["epoch"] < epoch:
            begin = {"epoch": epoch, "batches": 0, "bad": False, "divided": self._divided}
        batches, said, exact = self._go_on(begin)
        if said:
            (print_once if exact else rank_zero_warn)(said)
        if self.hparams.streaming:
            loader.dataset.begin(begin["epoch"], batches, again=begin["bad"])
            if batches:  # its workers read past those first
                loader.timeout = 0
            self._bad_epoch = begin["epoch"] if begin["bad"] else -1
        else:
            loader.sampler.begin(begin["epoch"], batches * self.hparams.batch_size)
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in training (epoch, batches per rank, any bad videos) and what identifies the data."""
        loop = self.trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current.processed
        within = epochs.started > epochs.processed
        bad = any(gathered(within and self._bad_epoch == epochs.processed))
        place = {"epoch": epochs.processed, "batches": batches if within else 0, "bad": bad}
        return {**place, "divided": self._divided, **self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes the next training from a saved position; a test, which loads checkpoints too, ignores it.

        Raises:
            DataError: If the labels or the training videos have changed.
        """
        if self.trainer is None or self.trainer.state.fn == "fit":
            check_same_clips(self.hparams.source, state_dict, self._fingerprint)
            self._begin = state_dict

    def batches_had(self, state_dict: dict[str, Any]) -> int:
        """Returns how many batches of the interrupted epoch each rank skips, at this run's batch size."""
        return self._go_on(state_dict)[0]

    def _go_on(self, place: dict[str, Any]) -> tuple[int, str, bool]:
        harmless = () if self.hparams.streaming else ("processes", "batch_size")
        return go_on(place["batches"], place["divided"], self._divided, self.num_clips["train"], harmless)

    @property
    def _divided(self) -> dict[str, int]:
        """How an epoch is divided among ranks and batches, and what its order depends on."""
        world = self.trainer.world_size if self.trainer is not None else 1
        names = ("batch_size", "seed", *(["num_workers"] if self.hparams.streaming else []))
        return {"processes": world} | {name: self.hparams[name] for name in names}

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.splits)

    def val_dataloader(self) -> DataLoader:
        """Returns every validation video once, in the evaluation view."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """Returns the validation videos in all test views, for the final evaluation of the best checkpoint."""
        return self._loader("test")

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Records bad videos and draws the mixing seed of a training batch, before its indices are on the device."""
        if self.trainer is None or not self.trainer.training:
            return batch
        if batch.get("bad_clips"):
            self._bad_epoch = self.trainer.current_epoch
        if not self._mixes():
            return batch
        names = batch["clip_index"].tolist()
        return batch | {"mixing_seed": stable_hash("mixing", self.hparams.seed, self.trainer.current_epoch, *names)}

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Normalises the pixels on the device and applies mixup or cutmix to training batches."""
        if "frame_features" in batch:
            return batch
        pixels = normalize_clips(batch["pixel_values_videos"], self.video_processor)
        if "mixing_seed" not in batch:
            return batch | {"pixel_values_videos": pixels}
        if self._mixing is None:
            self._mixing = BatchMixing(len(self.id2label), self.hparams.mixup_alpha, self.hparams.cutmix_alpha)
        pixels, soft_labels = self._mixing(pixels, batch["labels"], batch["mixing_seed"])
        return batch | {"pixel_values_videos": pixels, "soft_labels": soft_labels}

    @property
    def augmentation(self) -> dict[str, Any]:
        """Description of the training augmentation."""
        return describe_training_views(self.hparams, self.video_processor, self.id2label.values())

    def _reader(self, part: str) -> ClipReader:
        return part_reader(part, self.hparams, self.video_processor, self.id2label.values())

    def _mixes(self) -> bool:
        return self.hparams.mixup_alpha > 0 or self.hparams.cutmix_alpha > 0

    def _loader(self, part: str) -> DataLoader:
        """Returns the loader of a part: train, val, or test (val in all test views)."""
        hparams, split = self.hparams, "train" if part == "train" else "val"
        world = self.trainer.world_size if self.trainer is not None else 1
        if self.num_clips[split] < world:
            # A rank without data would make the others hang in their next collective.
            count = self.num_clips[split]
            raise DataError(f"{self.name}: {count} videos in a split for {world} processes; use fewer devices")
        workers = hparams.num_workers
        if hparams.streaming:
            clips, sampler = StreamedClips(getattr(self.splits, split), self._reader(part)), None
        else:
            clips = self._clips(part)
            sampler = ClipSampler(len(clips), split == "train", hparams.seed, hparams.batch_size)
        if hparams.feature_cache:
            clips, workers = self._cached_clips(part), 0  # passing features between processes is slower than reading
        return clip_loader(
            clips,
            workers,
            collate,
            hparams.worker_timeout,
            # Each test view takes one place in the batch.
            batch_size=max(1, hparams.batch_size // (clips.reader.num_clips * clips.reader.num_crops)),
            sampler=sampler,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            # The loader draws a seed each epoch; its own generator leaves the run's random state untouched.
            generator=torch.Generator(),
        )

    def _clips(self, part: str) -> ClipDataset:
        table = self._table("train" if part == "train" else "val")
        return ClipDataset(table, self._reader(part), self.hparams.train_views, training=part == "train")

    def _cached_clips(self, part: str) -> CachedClips:
        """Returns the cached features of a part; before training, computes those of all its parts."""
        hparams, several = self.hparams, self.hparams.test_clips * self.hparams.test_crops > 1
        if self.trainer is None or not hasattr(self.trainer.lightning_module, "frame_encoder"):
            raise DataError("data.feature_cache: needs the tower; run a VidPrismLightningModule with a Trainer")
        encoder = self.trainer.lightning_module.frame_encoder()
        part = "val" if part == "test" and not several else part
        key = (encoder.digest, encoder.precision)
        if (*key, part) not in self._cached:
            parts = ("train", "val", "test")[: 2 + several] if self.trainer.state.fn == "fit" else (part,)
            settings = hparams.feature_cache_limit, encoder, hparams.batch_size, hparams.num_workers
            # A callback that handles signals may end the run between shards.
            callbacks = (getattr(callback, "between_shards", None) for callback in self.trainer.callbacks)
            between = next(filter(None, callbacks), None)
            cache = FeatureCache(hparams.feature_cache, *settings, between, hparams.worker_timeout)
            found = cache.cached({name: self._clips(name) for name in parts})
            self._cached |= {(*key, name): clips for name, clips in found.items()}
        return self._cached[(*key, part)]
