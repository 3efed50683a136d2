"""Where clips come from: folders and the demo, splits, augmentation, datasets and the data module."""

from .datamodule import VideoDataModule
from .loading.dataset import ClipDataset, ClipReader, ClipSampler
from .reading.processor import load_processor, normalize_clips
from .reading.sampling import random_in_segments
from .reading.transforms import ClipAugmentation
from .sources.demo import DEMO_CLASSES, demo_folder, render_demo
from .sources.folder import scan_folder
from .tables import ClipSplits, ClipTable, DataError, FileTable

__all__ = [
    "DEMO_CLASSES",
    "ClipAugmentation",
    "ClipDataset",
    "ClipReader",
    "ClipSampler",
    "ClipSplits",
    "ClipTable",
    "DataError",
    "FileTable",
    "VideoDataModule",
    "demo_folder",
    "load_processor",
    "normalize_clips",
    "random_in_segments",
    "render_demo",
    "scan_folder",
]
