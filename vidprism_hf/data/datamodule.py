"""The Lightning data module: from a source of clips to batches of normalised pixels on the device."""

import inspect
from functools import cached_property
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from ..errors import printable
from ..model import VidPrismVideoProcessor
from ..workers import clip_loader, start_server
from .arguments import check_arguments
from .dataset import ClipDataset, ClipReader, ClipSampler, collate
from .demo import DEMO_CLASSES, demo_folder
from .epoch_place import check_same_clips, fingerprint, go_on
from .feature_cache import FeatureCache
from .feature_part import CachedClips
from .processor import load_processor, normalize_clips
from .ranks import gathered
from .sources import DEMO, check_source, describe_split, open_source, source_name
from .streamed_clips import StreamedClips
from .tables import ClipSplits, ClipTable, DataError, stable_hash
from .transforms import BatchMixing
from .views import describe_training_views, mirrored, part_reader

if TYPE_CHECKING:
    from .streaming import ClipStreams


class VideoDataModule(L.LightningDataModule):
    """Clips of any source as batches for training and evaluation.

    Batches are dicts of `pixel_values_videos` (B, T, 3, H, W), `labels` (B,), `clip_index` (B,), `readable` (B,),
    `bad_clips`, a list of notes, and two numbers, of clips that count and of unreadable ones: see ClipDataset and
    collate. Pixels are uint8 until they are on the device and become normalised floats there. In testing with several
    views pixels are (B, views, T, 3, H, W). With mixup or cutmix training batches also hold `soft_labels` (B, K).

    Args:
        source: Folder with train/<class>/ and val/<class>/, or with <class>/ and a rule that holds clips out; the
            folder that list files speak of; a benchmark (ucf101, hmdb51, k400, ssv2); a dataset of the Hub
            (org/name); or demo, clips that are rendered on first use (write ./demo for a folder of that name).
        root: Folder that benchmarks and archives are fetched into and demo clips are rendered into.
        processor: What defines the evaluation input: a VidPrism or CLIP checkpoint (folder or Hub id) or a
            preset (b32, b16, l14, tiny). The command line takes it from the model.
        num_frames: Frames per clip. The command line takes it from the model.
        batch_size: Clips per batch in each process.
        num_workers: Loader processes beside each training process; 0 loads in the training process.
        worker_timeout: Seconds to wait for a batch of the loader processes before the run ends; null is no limit.
        split: Which of a benchmark's official splits, 1 to 3 (ucf101, hmdb51).
        verify_counts: Whether a benchmark must have as many clips as its official lists say.
        train_list: List file of the training clips, with labels (lists.py tells the forms).
        val_list: With train_list the list file of the held-out clips; else a rule: text file with one held-out
            clip a line, relative to the source.
        label_names: File with the names of the class indices in list files, such as CSV rows id,name.
        allow_missing: Whether clips that list files name may be missing on disk; they are counted and left out.
        val_fraction: Rule: share of each class to hold out, drawn by seed and file name.
        val_pattern: Rule: regular expression; clips in which it is found are held out. It is searched in the
            path below the class folder, so ^eli_ finds run/eli_run.avi.
        hub_config: Configuration of a Hub dataset.
        hub_revision: Branch, tag or commit of a Hub dataset.
        train_split: Name of the split of a Hub dataset to train on.
        val_split: Name of its held-out split; null takes validation, val or test, the first that there is.
        video_column: Column of a Hub dataset with the videos; null finds it.
        label_column: Column of a Hub dataset with the labels; null finds it.
        streaming: Whether a Hub dataset is read as it comes instead of being fetched first.
        shots: Few-shot: so many training clips of each class, drawn by seed and clip name; null takes all.
        seed: Seed of the demo clips, of val_fraction and shots, of the order and of the augmentation.
        train_views: Random views of each training clip, gone through in turn, one an epoch; null draws a new view
            each epoch.
        feature_cache: Folder in which the frame features of a frozen backbone are kept: those of each training view
            and of the evaluation are computed once, and the head is trained from them. Runs may share it.
        feature_cache_limit: Size that the folder may come to, such as 50GB; above it the run does not start.
        frame_stride: Frames between those of a clip (dense sampling); null takes one frame from each of num_frames
            equal segments of the whole video: at random in training, the middle one in evaluation.
        test_clips: Clips taken from each video in the final evaluation and by evaluate; what they say is averaged.
        test_crops: Crops of each such clip, 1 (centre) or 3 along the longer side.
        augment: Whether training clips are seen in random views; false trains on the view of the evaluation, which
            serves heads on frozen towers best where clips are few, and leaves min_crop_scale and grayscale unused.
        min_crop_scale: Smallest area of a training crop as a share of the picture, above 0 and at most 1.
        horizontal_flip: Whether to mirror half of the training clips; null does unless a label speaks of
            left, right or (counter-)clockwise.
        grayscale: Share of training clips that lose their colour, from 0 to 1.
        rand_augment: Magnitude of RandAugment, 0 to 30; null leaves it out.
        random_erasing: Share of training clips in which a random rectangle is blanked.
        mixup_alpha: Parameter of mixup's Beta distribution; 0 is off.
        cutmix_alpha: Parameter of cutmix's; 0 is off. With both, each batch takes one of them at random.
        max_bad_fraction: Share of training clips that may be undecodable before the run stops.
        clip_time_limit: Seconds that decoding one clip may take before it counts as undecodable; null is no limit.

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
        self._cached: dict[tuple[str, str, str], CachedClips] = {}  # by digest and precision of the tower, and part
        self._begin: dict[str, Any] | None = None  # where a stopped run goes on
        self._bad_epoch = -1  # the last one of training in which a clip could not be decoded

    @property
    def name(self) -> str:
        """A short name of the source: `demo`, a benchmark, a Hub id, or the folder's own name."""
        return source_name(self.hparams.source)

    @property
    def split_description(self) -> str:
        """How the held-out clips were chosen, in a phrase."""
        return describe_split(self.hparams, self._splits.description if self._splits else "")

    @property
    def id2label(self) -> dict[int, str]:
        """Label name of each class index; known from construction on, before any clip is rendered or read."""
        if self.hparams.source == DEMO:
            return dict(enumerate(DEMO_CLASSES))
        return dict(self.splits.id2label)

    @property
    def splits(self) -> "ClipSplits | ClipStreams":
        """The clips and labels of the source, which is fetched and listed on first use."""
        if self._splits is None:
            self._splits = open_source(self.hparams)
            for note in self._splits.notes:
                rank_zero_warn(printable(note))
        return self._splits

    @property
    def num_clips(self) -> dict[str, int]:
        """Numbers of training and held-out clips, as `train` and `val`."""
        if self.hparams.streaming:
            return {"train": self.splits.num_train, "val": self.splits.num_val}
        return {"train": len(self.splits.train), "val": len(self.splits.val)}

    @property
    def train_table(self) -> ClipTable:
        """The clips to train on; streamed ones are in no table."""
        return self._table("train")

    @property
    def val_table(self) -> ClipTable:
        """The held-out clips; streamed ones are in no table."""
        return self._table("val")

    def _table(self, split: str) -> ClipTable:
        if self.hparams.streaming:
            raise DataError("data.streaming: streamed clips are in no table; set it to false")
        return getattr(self.splits, split)

    @property
    def video_processor(self) -> VidPrismVideoProcessor:
        """What defines evaluation input."""
        if self._video_processor is None:
            self._video_processor = load_processor(self.hparams.processor, self.hparams.num_frames)
        return self._video_processor

    @video_processor.setter
    def video_processor(self, processor: VidPrismVideoProcessor) -> None:
        """Takes one of another model, which has to offer what is used of ours."""
        self._video_processor = processor

    def prepare_data(self) -> None:
        """Renders the demo clips if they are needed and not there."""
        if self.hparams.source == DEMO:
            demo_folder(self.hparams.root, self.hparams.seed)

    def setup(self, stage: str | None = None) -> None:
        """Lists the clips and loads the processor, so that bad names show before training starts."""
        splits = self.splits
        if self.hparams.num_workers:  # while what follows is made ready
            start_server()
        _ = self.video_processor
        if stage in ("fit", None):
            seen = "training clips are seen as in the evaluation"
            if self.hparams.augment:
                seen = mirrored(self.hparams.horizontal_flip, self.id2label.values())[1]
            rank_zero_info(
                f"Data: {self.num_clips['train']} training and {self.num_clips['val']} held-out clips of "
                f"{len(splits.id2label)} labels; {seen}"
            )

    def train_dataloader(self) -> DataLoader:
        """Augmented clips in random order; the last batch may be smaller.

        Those of a resumed run begin where it was stopped: it asks for its clips before Lightning knows the epoch.
        """
        loader = self._loader("train")
        epoch = self.trainer.fit_loop.epoch_progress.current.processed if self.trainer is not None else 0
        begin, self._begin = self._begin, None
        if begin is None or begin["epoch"] < epoch:
            begin = {"epoch": epoch, "batches": 0, "bad": False, "divided": self._divided}
        batches, said, exact = self._go_on(begin)
        if said:
            (rank_zero_info if exact else rank_zero_warn)(said)
        if self.hparams.streaming:
            loader.dataset.begin(begin["epoch"], batches, again=begin["bad"])
            if batches:  # its workers come to the first one by way of those
                loader.timeout = 0
            self._bad_epoch = begin["epoch"] if begin["bad"] else -1
        else:
            loader.sampler.begin(begin["epoch"], batches * self.hparams.batch_size)
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Where the training is: the epoch, how many of its batches each process has had, and whether a clip was bad
        among them; and by what a run finds out whether that is the same place for it.
        """
        loop = self.trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current.processed
        within = epochs.started > epochs.processed
        bad = any(gathered(within and self._bad_epoch == epochs.processed))
        place = {"epoch": epochs.processed, "batches": batches if within else 0, "bad": bad}
        return {**place, "divided": self._divided, **self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the next training begin there; a test, which loads checkpoints too, changes nothing.

        Raises:
            DataError: If the labels or the training clips are others.
        """
        if self.trainer is None or self.trainer.state.fn == "fit":
            check_same_clips(self.hparams.source, state_dict, self._fingerprint)
            self._begin = state_dict

    def batches_had(self, state_dict: dict[str, Any]) -> int:
        """How many batches, as this run makes them, each process leaves out of the epoch in which a run was stopped."""
        return self._go_on(state_dict)[0]

    def _go_on(self, place: dict[str, Any]) -> tuple[int, str, bool]:
        harmless = () if self.hparams.streaming else ("processes", "batch_size")
        return go_on(place["batches"], place["divided"], self._divided, self.num_clips["train"], harmless)

    @property
    def _divided(self) -> dict[str, int]:
        """How an epoch is divided, and what its order depends on."""
        world = self.trainer.world_size if self.trainer is not None else 1
        names = ("batch_size", "seed", *(["num_workers"] if self.hparams.streaming else []))
        return {"processes": world} | {name: self.hparams[name] for name in names}

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.splits)

    def val_dataloader(self) -> DataLoader:
        """Every held-out clip once, in one view, as the processor makes it."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """The held-out clips again, in all test views, for the final evaluation of the best checkpoint."""
        return self._loader("test")

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Draws the seed of a training batch's mixing while its clips are still known without asking the device; notes
        that clips were bad.
        """
        if self.trainer is None or not self.trainer.training:
            return batch
        if batch.get("bad_clips"):
            self._bad_epoch = self.trainer.current_epoch
        if not self._mixes():
            return batch
        names = batch["clip_index"].tolist()
        return batch | {"mixing_seed": stable_hash("mixing", self.hparams.seed, self.trainer.current_epoch, *names)}

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Normalises the pixels where they are now, and mixes training clips if that is asked for."""
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
        """What training clips go through, in words."""
        return describe_training_views(self.hparams, self.video_processor, self.id2label.values())

    def _reader(self, part: str) -> ClipReader:
        return part_reader(part, self.hparams, self.video_processor, self.id2label.values())

    def _mixes(self) -> bool:
        return self.hparams.mixup_alpha > 0 or self.hparams.cutmix_alpha > 0

    def _loader(self, part: str) -> DataLoader:
        """The loader of a part: train, val, or test, which is val in all test views."""
        hparams, split = self.hparams, "train" if part == "train" else "val"
        world = self.trainer.world_size if self.trainer is not None else 1
        if self.num_clips[split] < world:
            # A process without a clip would leave the others waiting for it.
            count = self.num_clips[split]
            raise DataError(f"{self.name}: {count} clips in a split for {world} processes; use fewer devices")
        workers = hparams.num_workers
        if hparams.streaming:
            clips, sampler = StreamedClips(getattr(self.splits, split), self._reader(part)), None
        else:
            clips = self._clips(part)
            sampler = ClipSampler(len(clips), split == "train", hparams.seed, hparams.batch_size)
        if hparams.feature_cache:
            clips, workers = self._cached_clips(part), 0  # to hand features over would take longer than to read them
        return clip_loader(
            clips,
            workers,
            collate,
            hparams.worker_timeout,
            # Several views of a clip take the place of as many clips.
            batch_size=max(1, hparams.batch_size // (clips.reader.num_clips * clips.reader.num_crops)),
            sampler=sampler,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Its own: the loader draws from it each epoch, and the run's random states go on without.
            generator=torch.Generator(),
        )

    def _clips(self, part: str) -> ClipDataset:
        table = self._table("train" if part == "train" else "val")
        return ClipDataset(table, self._reader(part), self.hparams.train_views, training=part == "train")

    def _cached_clips(self, part: str) -> CachedClips:
        """The clips of a part with frame features; before a training those of all its parts are computed."""
        hparams, several = self.hparams, self.hparams.test_clips * self.hparams.test_crops > 1
        if self.trainer is None or not hasattr(self.trainer.lightning_module, "frame_encoder"):
            raise DataError("data.feature_cache: needs the tower; let a Trainer run VidPrismLightningModule")
        encoder = self.trainer.lightning_module.frame_encoder()
        part = "val" if part == "test" and not several else part
        key = (encoder.digest, encoder.precision)
        if (*key, part) not in self._cached:
            parts = ("train", "val", "test")[: 2 + several] if self.trainer.state.fn == "fit" else (part,)
            settings = hparams.feature_cache_limit, encoder, hparams.batch_size, hparams.num_workers
            # A callback that takes note of signals may end the run in between.
            callbacks = (getattr(callback, "between_shards", None) for callback in self.trainer.callbacks)
            between = next(filter(None, callbacks), None)
            cache = FeatureCache(hparams.feature_cache, *settings, between, hparams.worker_timeout)
            found = cache.cached({name: self._clips(name) for name in parts})
            self._cached |= {(*key, name): clips for name, clips in found.items()}
        return self._cached[(*key, part)]
