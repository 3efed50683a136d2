"""One split of the feature cache: its rows and its bad videos.

`bad.json` records why videos cannot be decoded, under the keys that their rows would have. An entry is valid until the
video's content or the decoder changes.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
import torch
from torch.utils.data import Dataset

from ...util import atomic_write
from ..bad_videos import Note
from ..fetch.contents import Signature, signature
from ..loading.dataset import ClipDataset, example
from .shards import ShardFolder

# The key of an all-zero clip, whose features replace those of a video that cannot be decoded.
BLANK = "blank"
BAD = "bad.json"
CHANGES = "changes while it is read"
DECODER = f"av {av.__version__}"


class CachedClips(ClipDataset):
    """A `ClipDataset` with `frame_features` instead of pixels: (T', D), or (views, T', D).

    Args:
        clips: The dataset with pixels.
        shards: The folder of features.
        places: Shard and row of each view and video, (views, N, 2).
        blank: Features of an all-zero clip.
        causes: Why videos are bad, by index; those have no places.
        digest: Hash of everything the features depend on: tower, precision, processor, views, ordered videos.
    """

    def __init__(
        self,
        clips: ClipDataset,
        shards: ShardFolder,
        places: np.ndarray,
        blank: torch.Tensor,
        causes: dict[int, str],
        digest: str,
    ):
        super().__init__(clips.table, clips.reader, clips.train_views, clips.training)
        self._shards, self._places, self._blank, self._causes = shards, places, blank, causes
        self.digest = digest

    def __getitem__(self, key: int | tuple) -> dict[str, Any]:
        item = super().__getitem__(key)
        features = item.pop("pixel_values_videos")
        return item | {"frame_features": features if item["readable"] else self._blank}

    def _load(self, index: int, view: int) -> torch.Tensor:
        return self._shards.row(*self._places[view, index].tolist())


@dataclass
class Part:
    """The videos of one part of a run, with the state of their rows.

    Attributes:
        clips: The dataset with pixels.
        about: What all rows have in common.
        shards: The folder of rows.
        contents: Hash and signature of each video; the hash is None if it cannot be read.
        causes: Why videos are bad, by index; at first only those without a hash.
        keys: Keys of each video's rows, one per training view; evaluation views share one row. None if the video has
            no hash.
        places: Shard and row of each existing key.
        seen: Shards already checked: open, or without needed rows.
    """

    clips: ClipDataset
    about: dict[str, Any]
    shards: ShardFolder
    contents: list[tuple[str | None, Signature | None]]
    causes: dict[int, str]
    keys: list[list[str | None]] = field(init=False)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def __post_init__(self):
        self.keys = [
            [content and row_hash(content, *drawn) for drawn in self._draws(index)]
            for index, (content, _) in enumerate(self.contents)
        ]

    def _draws(self, index: int) -> list[tuple]:
        """Returns what distinguishes the rows of a video from each other."""
        reader = self.clips.reader
        if reader.augmentation is None:
            return [()]
        return [(reader.seed, view, self.clips.table.name(index)) for view in range(self.clips.train_views)]

    def known_causes(self) -> dict[str, str]:
        """Returns the causes that earlier runs recorded, by row key."""
        try:
            known = json.loads((self.shards.folder / BAD).read_text())
        except (OSError, ValueError):  # the causes will be found again
            return {}
        return known["causes"] if isinstance(known, dict) and known.get("decoder") == DECODER else {}

    def keep_causes(self, new: dict[str, str]) -> None:
        """Records new causes."""
        if new:
            content = {"decoder": DECODER, "causes": self.known_causes() | new}
            atomic_write(self.shards.folder / BAD, json.dumps(content, allow_nan=False).encode())

    def learn(self, known: dict[str, str]) -> None:
        """Marks videos as bad if the cause of one of their rows is known."""
        self.causes |= {
            index: known[key] for index, keys in enumerate(self.keys) if known for key in keys if key in known
        }

    def needed(self) -> set[str]:
        """Returns the keys of the rows that the run needs."""
        good = (keys for index, keys in enumerate(self.keys) if index not in self.causes)
        return {BLANK}.union(*good)

    def missing(self) -> list[tuple[int, int]]:
        """Returns the (video, view) pairs to compute, grouped by video."""
        return [
            (index, view)
            for index, keys in enumerate(self.keys)
            if index not in self.causes
            for view, key in enumerate(keys)
            if key not in self.places
        ]

    def cached(self) -> CachedClips:
        """Returns the dataset with features; all of them must exist."""
        places = np.full((len(self.keys[0]), len(self.keys), 2), -1, dtype=np.int32)
        for index, keys in enumerate(self.keys):
            if index not in self.causes:
                places[:, index] = [self.places[key] for key in keys]
        blank, digest = self.shards.row(*self.places[BLANK]), row_hash(self.shards.folder.name, self.keys)
        return CachedClips(self.clips, self.shards, places, blank, self.causes, digest)


def row_hash(*parts: object) -> str:
    """Hashes the parts to a key."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


class Pixels(Dataset):
    """Pixels of the videos and views to compute, with the items of `ClipDataset`.

    `lasting` is True where decoding these bytes will always fail.
    """

    def __init__(self, part: Part, rows: Sequence[tuple[int, int]]):
        self.clips = part.clips
        self.rows = [(*row, part.contents[row[0]][1]) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        index, view, found = self.rows[number]
        table, bad = self.clips.table, list[Note]()
        pixels, label = self.clips.read(index, view, bad), int(table.labels[index])
        # The file must not have changed between hashing and decoding.
        same = found is None or signature(table.video(index)) == found
        if pixels is not None and not same:
            pixels, bad = None, [(table.name(index), label, CHANGES)]
        lasting = pixels is None and same and self.clips.is_lasting(index)
        return example(self.clips.reader, pixels, label, index, bad) | {"lasting": lasting}
