"""Shards of pairs as training batches: `batch.Batches` over sets too large to index in memory; see `tuwen.data.shards`.

    batches = ShardBatches(recipe.data, resolution=224, batch_size=32768, seed=0)
    batches.batch(epoch=0, number=1000)

An epoch shuffles the shards, and the lines of a few shards together. Any position of that order is found without
reading what comes before it, so that resuming costs nothing, and a process reads its own lines alone. Texts travel
without padding.
"""

from __future__ import annotations

import logging
import os
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO

import torch

from training.batch import Batch, InputIds, Keys
from training.dataset import check_batch_size, drop_words, encode_caption
from training.order import Order, shuffled, stable_hash, torch_generator
from training.pixels import Augmentation, Picture, to_batch
from training.recipe import DataSection
from training.sources import caption_key
from tuwen.data.shards import MAX_LINE_BYTES, ensure_index, find_shards, parse_line, read_index
from tuwen.errors import InvalidInput
from tuwen.image_transform import read_drafted
from tuwen.specs import CLS_ID, SEP_ID

log = logging.getLogger(__name__)

# Shards whose lines are shuffled together. Their offsets and order are in memory, 16 bytes a line, and nothing else.
SHARDS_TOGETHER = 4


@dataclass(frozen=True)
class _Item:
    """A pair as a batch has it, but for its picture."""

    image_id: int
    image_key: int
    text_key: int
    input_ids: InputIds


class ShardBatches:
    """Batches of pairs read from shards as they are needed; a pair's caption has the same row as its picture.

    No process knows the pairs of the others, so pairs that belong together are told by keys: hashes of the image id and
    of the normalised caption. A malformed line counts as an unreadable picture; it has a key of its own and, for an id,
    the negative of its number in the whole set, so that the ids of two such lines differ.

    Args:
        batch_size, augmentation: as for `dataset.IndexedBatches`.
    Raises:
        InvalidInput: there are no shards, one cannot be indexed, or they have fewer lines than a batch; or the recipe
            asks for what needs all captions of a picture or all pictures of a caption.
    """

    def __init__(
        self,
        data: DataSection,
        resolution: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
        augmentation: Augmentation | None = None,
    ) -> None:
        check_batch_size(batch_size, num_processes)
        for key in ("join_captions", "distinct_captions", "cache_decoded"):
            if getattr(data, key):
                raise InvalidInput(f"data.{key} is not for data.shards, of which a line at a time is known")
        self.data, self.resolution, self.batch_size, self.seed = data, resolution, batch_size, seed
        self.rank, self.num_processes, self.augmentation = rank, num_processes, augmentation
        self._order = ShardOrder(find_shards(data.shards or ""), seed)
        self._reader = LineReader()
        self._failed: set[int] = set()
        if len(self._order) < batch_size:
            raise InvalidInput(f"{data.shards}: {len(self._order)} pairs, fewer than one batch of {batch_size}")

    def __len__(self) -> int:
        """Global batches in an epoch."""
        return len(self._order) // self.batch_size

    def batch(self, epoch: int, number: int) -> Batch:
        """This process's share of a global batch."""
        size = self.batch_size // self.num_processes
        first = number * self.batch_size + self.rank * size
        items: list[_Item] = []

        def pictures() -> Iterator[Picture | None]:
            for position in range(first, first + size):
                item, picture = self._item(epoch, position)
                items.append(item)
                yield picture

        generator = torch_generator(self.seed, epoch, number, self.rank)
        pixels, is_readable = to_batch(pictures(), size, self.resolution, self.augmentation, generator)
        return Batch(
            epoch=epoch,
            number=number,
            image_ids=tuple(item.image_id for item in items),
            pixels=pixels,
            is_readable=is_readable,
            texts=tuple(item.input_ids for item in items),
            positives=Keys(
                images=torch.tensor([item.image_key for item in items]),
                texts=torch.tensor([item.text_key for item in items]),
            ),
        )

    def _item(self, epoch: int, position: int) -> tuple[_Item, Picture | None]:
        """A pair, and its picture: uint8 (R, R, 3), or None if it cannot be read."""
        line = self._order.line(epoch, position)
        where = f"{line.path}: pair {line.number}"
        try:
            record = parse_line(self._reader.read(line, where), where)
        except InvalidInput as error:
            self._warn(line.index, str(error))
            own_key = stable_hash("line", line.index)
            return _Item(-1 - line.index, own_key, own_key, (CLS_ID, SEP_ID)), None
        caption = caption_key(record.text)
        words = list(encode_caption(caption, self.data.context_length)[1:-1])
        # Seeded by the position in the epoch, so that it is the same whichever process has it.
        words = drop_words(words, self.data.drop_tokens, random.Random(f"{self.seed}/{epoch}/{position}"))
        image_id = record.image_id
        item = _Item(image_id, stable_hash("image", image_id), stable_hash(caption), (CLS_ID, *words, SEP_ID))
        return item, self._pixels(record.encoded, line.index, f"{where}: picture {image_id}")

    def _pixels(self, encoded: bytes, index: int, where: str) -> Picture | None:
        try:
            return read_drafted(encoded, self.resolution)
        except InvalidInput as error:
            self._warn(index, f"{where}: {error}")
            return None

    def _warn(self, index: int, sentence: str) -> None:
        if index not in self._failed:
            self._failed.add(index)
            log.warning("%s", sentence)


# --- where a line is ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of the set: which it is in all shards as they are sorted, and where it lies."""

    index: int
    path: Path
    number: int  # from 1, blank lines not counted
    start: int
    stop: int


class ShardOrder:
    """Position in an epoch -> line, a function of (seed, epoch)."""

    def __init__(self, shards: Sequence[Path], seed: int) -> None:
        self.shards, self._seed = list(shards), seed
        self._counts = [ensure_index(shard) for shard in shards]
        self._first_index = [0, *accumulate(self._counts)]
        self._epoch: tuple[int, list[list[int]], list[int]] | None = None
        self._group: tuple[int, int, _Group] | None = None

    def __len__(self) -> int:
        """Lines in all."""
        return self._first_index[-1]

    def line(self, epoch: int, position: int) -> Line:
        """The line at a position of 0..len-1 of an epoch."""
        groups, starts = self._groups(epoch)
        number = bisect_right(starts, position) - 1
        if self._group is None or self._group[:2] != (epoch, number):
            self._group = None  # first, so that two are never in memory
            self._group = (epoch, number, self._load(groups[number], epoch, number))
        return self._group[2].line(position - starts[number])

    def _groups(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        """The shards of each group, and the position where each group starts."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = shuffled(len(self.shards), self._seed, epoch, "shards").tolist()
            groups = [order[start : start + SHARDS_TOGETHER] for start in range(0, len(order), SHARDS_TOGETHER)]
            sizes = [sum(self._counts[shard] for shard in group) for group in groups]
            self._epoch = (epoch, groups, [0, *accumulate(sizes[:-1])])
        return self._epoch[1:]

    def _load(self, shards: list[int], epoch: int, number: int) -> _Group:
        paths = [self.shards[shard] for shard in shards]
        order = shuffled(sum(self._counts[shard] for shard in shards), self._seed, epoch, "lines", number)
        return _Group(
            paths, [self._first_index[shard] for shard in shards], [read_index(path) for path in paths], order
        )


class _Group:
    """A few shards, whose lines come in one order."""

    def __init__(self, paths: list[Path], first_index: list[int], offsets: list[Order], order: Order) -> None:
        self._paths, self._first_index, self._offsets, self._order = paths, first_index, offsets, order
        self._starts = [0, *accumulate(len(one) - 1 for one in offsets)]

    def line(self, position: int) -> Line:
        place = int(self._order[position])
        shard = bisect_right(self._starts, place) - 1
        row = place - self._starts[shard]
        start, stop = self._offsets[shard][row : row + 2].tolist()
        return Line(self._first_index[shard] + row, self._paths[shard], row + 1, start, stop)


class LineReader:
    """Reads single lines, keeping a few files open."""

    def __init__(self) -> None:
        self._files: dict[Path, IO[bytes]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"_files": {}}

    def read(self, line: Line, where: str) -> bytes:
        """The bytes of a line.

        Raises:
            InvalidInput: the line is too long, or its file cannot be read; `where` opens the sentence.
        """
        size = line.stop - line.start
        if size > MAX_LINE_BYTES:
            raise InvalidInput(f"{where}: the line has {size} bytes, the limit is {MAX_LINE_BYTES}")
        try:
            return _read_at(self._file(line.path), line.start, size)
        except OSError as error:
            raise InvalidInput(f"{where}: cannot be read: {error.strerror}") from None

    def _file(self, path: Path) -> IO[bytes]:
        if path not in self._files:
            while len(self._files) >= SHARDS_TOGETHER:
                self._files.pop(next(iter(self._files))).close()
            self._files[path] = open(path, "rb", buffering=0)  # noqa: SIM115, closed above
        return self._files[path]


def _read_at(file: IO[bytes], start: int, size: int) -> bytes:
    if hasattr(os, "pread"):  # forked processes share a file's position, and this has no use for it
        return os.pread(file.fileno(), size, start)
    file.seek(start)
    return file.read(size)
