"""An iterable dataset of streamed rows, with the same items as `ClipDataset`."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset

from ...model import VideoDecodeError
from ..bad_videos import Note
from ..loading.dataset import ClipReader, example
from ..tables import stable_hash

if TYPE_CHECKING:  # the datasets library takes a second to import
    from .rows import StreamedRow, StreamedRows

HELD_BYTES = 64 * 2**20  # of compressed videos that a worker keeps as replacements for bad ones


class StreamedClips(IterableDataset):
    """Examples from streamed rows, with the same items as `ClipDataset`.

    `clip_index` is a hash of the video's name, since rows have no numbers. In training a video that cannot be decoded
    is replaced by another view of a good one, so that each worker's shard keeps its length: the last of its class in
    the shard, else the next, else one of another class. For this a worker keeps the last good video of each class, the
    most recent within `HELD_BYTES`.

    Args:
        rows: The rows.
        reader: Makes their pixels.
    """

    def __init__(self, rows: "StreamedRows", reader: ClipReader):
        self.rows = rows
        self.reader = reader
        self._begun = (0, 0, False)

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; call it before making the epoch's iterator."""
        self.rows.set_epoch(epoch)

    def begin(self, epoch: int, batches: int = 0, again: bool = False) -> None:
        """Sets the epoch and how many of its batches this rank has already used.

        Args:
            epoch: The epoch.
            batches: Batches that its next iterator skips.
            again: Whether to decode the skipped batches again: needed if one of their videos was bad, since its
                replacement affects what follows. Otherwise their rows are not read.
        """
        self.set_epoch(epoch)
        self._begun = (epoch, batches, again)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Read once, here: a later epoch may be set before the first item is made.
        epoch = self.rows.epoch
        if not self.reader.augmentation:
            return self._evaluation(epoch)
        begun, batches, again = self._begun
        if epoch != begun or not batches:
            return self._training(epoch, self.rows.read(epoch))
        had = self.rows.rows_of_batches(batches)
        whole = self.rows.read(epoch, batches, again=True)
        if again:
            return islice(self._training(epoch, whole), had, None)
        return self._training(epoch, self.rows.read(epoch, batches), earlier=islice(whole, had))

    def _evaluation(self, epoch: int) -> Iterator[dict[str, Any]]:
        for row in self.rows.read(epoch):
            bad: list[Note] = []
            yield self._item(row, self._pixels(row, (epoch, row.name, 0), bad), bad)

    def _training(
        self, epoch: int, rows: Iterable["StreamedRow"], earlier: Iterable["StreamedRow"] = ()
    ) -> Iterator[dict[str, Any]]:
        """Yields the items of an epoch; `earlier` are skipped good rows, read only if a replacement is needed."""
        bad: list[Note] = []
        owed: Counter[int] = Counter()
        good = GoodRows(HELD_BYTES)

        def stand_in(row: "StreamedRow") -> dict[str, Any]:
            item = self._item(row, self._pixels(row, (epoch, row.name, good.next_view(row)), bad), bad.copy())
            bad.clear()
            return item

        for row in rows:
            pixels = self._pixels(row, (epoch, row.name, 0), bad)
            if pixels is None:
                good.precede(earlier)
                earlier = ()
            if pixels is not None:
                yield self._item(row, pixels, bad.copy())
                bad.clear()
                good.add(row)
                for _ in range(owed.pop(row.label, 0)):
                    yield stand_in(row)
            elif row.label in good:
                yield stand_in(good[row.label])
            else:
                owed[row.label] += 1
        for label in owed.elements():
            if good.last is not None:
                yield stand_in(good.last)
            else:  # no video decodes
                yield example(self.reader, None, label, 0, bad.copy()) | {"name": ""}
                bad.clear()

    def _pixels(self, row: "StreamedRow", key: tuple, bad: list[Note]) -> torch.Tensor | None:
        """Returns the pixels of a video, or None after adding an entry to `bad`."""
        try:
            if not row.cause:
                return self.reader(row.video, key)
            cause = row.cause
        except VideoDecodeError as error:
            cause = error.cause or str(error)
        bad.append((row.name, row.label, cause))
        return None

    def _item(self, row: "StreamedRow", pixels: torch.Tensor | None, bad: list[Note]) -> dict[str, Any]:
        return example(self.reader, pixels, row.label, stable_hash(row.name), bad) | {"name": row.name}


class GoodRows:
    """The last good row of each class; above the limit the oldest are dropped, but never the last one.

    Args:
        limit: Bytes of video to keep.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._rows: OrderedDict[int, StreamedRow] = OrderedDict()
        self._size = 0
        self._views: Counter[str] = Counter()

    def __contains__(self, label: int) -> bool:
        return label in self._rows

    def __getitem__(self, label: int) -> "StreamedRow":
        return self._rows[label]

    @property
    def last(self) -> "StreamedRow | None":
        """The most recently added row, or None."""
        return next(reversed(self._rows.values()), None)

    def add(self, row: "StreamedRow") -> None:
        """Adds a row, replacing the older one of its class."""
        if row.label in self._rows:
            self._size -= len(self._rows.pop(row.label).video)
        self._rows[row.label] = row
        self._size += len(row.video)
        while self._size > self.limit and len(self._rows) > 1:
            _, oldest = self._rows.popitem(last=False)
            self._size -= len(oldest.video)

    def precede(self, rows: Iterable["StreamedRow"]) -> None:
        """Adds rows as if they had been added before all others."""
        later = list(self._rows.values())
        self._rows.clear()
        self._size = 0
        for row in chain(rows, later):
            self.add(row)

    def next_view(self, row: "StreamedRow") -> int:
        """Returns the number, from 1, of a row's next extra view."""
        self._views[row.name] += 1
        return self._views[row.name]
