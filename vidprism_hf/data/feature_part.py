"""The clips of a run whose features are kept: which rows there are of them, and which of the clips are bad.

Beside the rows, `bad.json` holds why clips cannot be decoded, under the keys that their rows would have: what is bad
about a clip's content stays so until the content, or the decoder, is another.
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

from ..util import atomic_write
from .bad_clips import Note
from .clip_contents import Signature, signature
from .dataset import ClipDataset, example
from .feature_shards import ShardFolder

# The key of a clip of zeros, whose features stand for those of a clip that cannot be decoded.
BLANK = "blank"
BAD = "bad.json"
CHANGES = "changes while it is read"
DECODER = f"av {av.__version__}"


class CachedClips(ClipDataset):
    """The examples of a `ClipDataset`, with `frame_features` in the place of pixels: (T', D), or (views, T', D).

    Args:
        clips: The examples with pixels.
        shards: Where the features are.
        places: Shard and row for each view and clip, (views, N, 2).
        blank: Features of a clip of zeros.
        causes: Why clips are bad, by index; they have no places.
        digest: The hash of all that the features follow from: tower, precision, processor, views, clips in order.
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
    """Clips of a run, in the views that it takes of them.

    Attributes:
        clips: The clips.
        about: What all rows have in common.
        shards: Where the rows are.
        contents: Hash and signature of each clip; no hash where it cannot be read.
        causes: Why clips are bad, by index: at first of those without a hash.
        keys: Key of each clip's rows, one for each training view; the views of an evaluation are in one row. None
            where the clip has no hash.
        places: Shard and row of each key that is there.
        seen: Shards that have been looked at: they are open, or have no row that is needed.
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
        """What tells the rows of a clip from each other."""
        reader = self.clips.reader
        if reader.augmentation is None:
            return [()]
        return [(reader.seed, view, self.clips.table.name(index)) for view in range(self.clips.train_views)]

    def known_causes(self) -> dict[str, str]:
        """Why clips are bad, by the keys of their rows, as earlier runs have found."""
        try:
            known = json.loads((self.shards.folder / BAD).read_text())
        except (OSError, ValueError):  # what it held is found out anew
            return {}
        return known["causes"] if isinstance(known, dict) and known.get("decoder") == DECODER else {}

    def keep_causes(self, new: dict[str, str]) -> None:
        """Adds to them."""
        if new:
            content = {"decoder": DECODER, "causes": self.known_causes() | new}
            atomic_write(self.shards.folder / BAD, json.dumps(content, allow_nan=False).encode())

    def learn(self, known: dict[str, str]) -> None:
        """Takes the clips for bad of which a row is among the keys."""
        self.causes |= {
            index: known[key] for index, keys in enumerate(self.keys) if known for key in keys if key in known
        }

    def needed(self) -> set[str]:
        """The keys of the rows that the run needs."""
        good = (keys for index, keys in enumerate(self.keys) if index not in self.causes)
        return {BLANK}.union(*good)

    def missing(self) -> list[tuple[int, int]]:
        """Clips and views to compute, the views of a clip one after the other."""
        return [
            (index, view)
            for index, keys in enumerate(self.keys)
            if index not in self.causes
            for view, key in enumerate(keys)
            if key not in self.places
        ]

    def cached(self) -> CachedClips:
        """The clips with features, which must be there."""
        places = np.full((len(self.keys[0]), len(self.keys), 2), -1, dtype=np.int32)
        for index, keys in enumerate(self.keys):
            if index not in self.causes:
                places[:, index] = [self.places[key] for key in keys]
        blank, digest = self.shards.row(*self.places[BLANK]), row_hash(self.shards.folder.name, self.keys)
        return CachedClips(self.clips, self.shards, places, blank, self.causes, digest)


def row_hash(*parts: object) -> str:
    """A key for what follows from the parts."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


class Pixels(Dataset):
    """Pixels of the clips and views whose features are to be computed, as a `ClipDataset` gives them.

    Where there are none, `lasting` tells whether they will be missing whenever these bytes are decoded.
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
        # What was hashed must be what was decoded.
        same = found is None or signature(table.video(index)) == found
        if pixels is not None and not same:
            pixels, bad = None, [(table.name(index), label, CHANGES)]
        lasting = pixels is None and same and self.clips.is_lasting(index)
        return example(self.clips.reader, pixels, label, index, bad) | {"lasting": lasting}
