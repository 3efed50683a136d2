"""Where clips come from: folders and the demo, splits, augmentation, datasets and the data module."""

from .datamodule import VideoDataModule
from .dataset import ClipDataset, ClipReader, ClipSampler
from .demo import DEMO_CLASSES, demo_folder, render_demo
from .folder import scan_folder
from .processor import load_processor, normalize_clips
from .sampling import random_in_segments
from .tables import ClipSplits, ClipTable, DataError, FileTable
from .transforms import ClipAugmentation

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
