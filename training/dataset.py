"""Indexed sets of pairs (LMDB, or TSV and JSONL) as training batches: `batch.Batches` over one set or several.

    batches = IndexedBatches(open_sources(recipe.data), recipe.data, resolution=224, batch_size=128, seed=0)
    batches.batch(epoch=0, number=0)

Every process plans the whole of a global batch, which takes ids and texts only, and decodes its own pictures. Texts
travel without padding, so that nothing need be sorted by length: who encodes them packs them end to end.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from training.batch import Batch, InputIds, Positives, Share, share_of
from training.order import EpochOrder, Order, deal_distinct, torch_generator
from training.pixels import Augmentation, Picture, PictureMemory, to_batch
from training.recipe import DataSection
from training.sources import PairTable, WeightedPairs
from tuwen.errors import InvalidInput
from tuwen.image_transform import read_drafted
from tuwen.specs import CLS_ID, SEP_ID
from tuwen.tokenizer import default_tokenizer

log = logging.getLogger(__name__)

# What stands between two captions that are joined.
_GLUE = ("", "的", "，")
# A short caption without one of its tokens is another caption.
_MIN_WORDS_TO_DROP = 4
# Of captions with their input_ids: some 20 MB, and all of a small set, where the same ones come every epoch.
_CACHED_CAPTIONS = 2**15


def check_batch_size(batch_size: int, num_processes: int) -> None:
    """A global batch must divide evenly.

    Raises:
        InvalidInput: it does not.
    """
    if batch_size % num_processes:
        raise InvalidInput(f"optim.batch_size {batch_size} does not divide among {num_processes} processes")


@lru_cache(maxsize=_CACHED_CAPTIONS)
def encode_caption(text: str, context_length: int) -> InputIds:
    """input_ids of a normalised caption, with [CLS] and [SEP]."""
    return tuple(default_tokenizer().encode_ids(text, context_length))


def drop_words(words: list[int], share: float, rng: random.Random) -> list[int]:
    """Leave out a share of a caption's tokens, unless it is short; at least one stays."""
    if not share or len(words) < _MIN_WORDS_TO_DROP:
        return words
    return [word for word in words if rng.random() >= share] or words


class IndexedBatches:
    """Batches of pictures with some of their captions, or of pairs (`data.unit`), each distinct caption once a batch.

    A caption is a positive of every picture it describes, whichever picture it was drawn for; captions that say the
    same are one. The global batch is the same for any number of processes, and what a batch holds depends on nothing
    that was asked for before.

    Args:
        batch_size: of the global batch.
        augmentation: of this process's pixels; its generator is seeded from (seed, epoch, number, rank).
    Raises:
        InvalidInput: fewer items than a batch, or a batch that does not divide among the processes.
    """

    def __init__(
        self,
        sources: Sequence[WeightedPairs],
        data: DataSection,
        resolution: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
        augmentation: Augmentation | None = None,
    ) -> None:
        check_batch_size(batch_size, num_processes)
        self.data, self.resolution, self.batch_size, self.seed = data, resolution, batch_size, seed
        self.rank, self.num_processes, self.augmentation = rank, num_processes, augmentation
        self.table = PairTable(sources)
        self._memory = PictureMemory(len(self.table), resolution, data.cache_decoded)
        self._picture_of_item, item_starts = _items(self.table, data.unit)
        self._order = EpochOrder(item_starts, [source.weight for source in sources], seed)
        if len(self._order) < batch_size:
            unit = "pictures with captions" if data.unit == "image" else "pairs"
            raise InvalidInput(f"training data: {len(self._order)} {unit}, fewer than one batch of {batch_size}")
        self._dealt_epoch, self._dealt = 0, self._deal(0)
        self._length = len(self._dealt)
        if not self._length:
            raise InvalidInput(f"data.distinct_captions: no {batch_size} pictures in a row that share no caption")

    def __len__(self) -> int:
        """Global batches in an epoch; the remainder is left to the next epoch's shuffle."""
        return self._length

    def batch(self, epoch: int, number: int) -> Batch:
        """This process's share of a global batch."""
        items = self._batches_of(epoch)[number]
        texts, pictures, captions = self._captions(items, random.Random(f"{self.seed}/{epoch}/{number}"))
        my_items = share_of(len(items), self.rank, self.num_processes)
        my_texts = share_of(len(texts), self.rank, self.num_processes)
        mine = self._picture_of_item[items[my_items.start : my_items.stop]]
        generator = torch_generator(self.seed, epoch, number, self.rank)
        decoded = map(self._pixels, mine.tolist())
        pixels, is_readable = to_batch(decoded, len(mine), self.resolution, self.augmentation, generator)
        return Batch(
            epoch=epoch,
            number=number,
            image_ids=tuple(self.table.image_ids[mine].tolist()),
            pixels=pixels,
            is_readable=is_readable,
            texts=tuple(texts[my_texts.start : my_texts.stop]),
            positives=_positives(pictures, captions, my_items, my_texts, (len(items), len(texts))),
        )

    # --- the order ------------------------------------------------------------------------------------------

    def _batches_of(self, epoch: int) -> Order:
        """int64 (len(self), batch_size): the items of every batch of an epoch, kept while the epoch lasts."""
        if epoch != self._dealt_epoch:
            dealt = self._deal(epoch)
            if len(dealt) < self._length:
                # With distinct captions an unlucky order fills fewer batches than the first epoch's; its last help out.
                dealt = np.concatenate([dealt, self._deal(0)[len(dealt) : self._length]])
            self._dealt_epoch, self._dealt = epoch, dealt[: self._length]
        return self._dealt

    def _deal(self, epoch: int) -> Order:
        items = self._order.items(epoch)
        if self.data.distinct_captions:
            return deal_distinct(items, self._captions_of_item, self.batch_size)
        return items[: len(items) // self.batch_size * self.batch_size].reshape(-1, self.batch_size)

    def _captions_of_item(self, item: int) -> list[int]:
        return self.table.captions_of(self._picture_of_item[item])

    # --- captions -------------------------------------------------------------------------------------------

    def _captions(self, items: Order, rng: random.Random) -> tuple[list[InputIds], Order, Order]:
        """The distinct captions of a global batch, and every match as (index of its picture, index of its caption)."""
        captions_of = [self._captions_of_item(item) for item in items.tolist()]
        # Each text with the two captions that a picture must both have for it; mostly they are the same one. Different
        # captions may come to one text, by being cut for instance.
        drawn: dict[InputIds, list[tuple[int, int]]] = {}
        for item, captions in zip(items.tolist(), captions_of, strict=True):
            for caption in self._drawn_for(item, captions, rng):
                other = self._joined_to(caption, captions, rng)
                drawn.setdefault(self._input_ids(caption, other, rng), []).append((caption, other))
        texts_with: dict[int, list[tuple[int, int]]] = {}
        for index, origins in enumerate(drawn.values()):
            for caption, other in set(origins):
                texts_with.setdefault(caption, []).append((index, other))
        matches = {
            (row, index)
            for row, captions in enumerate(map(frozenset, captions_of))
            for caption in captions
            for index, other in texts_with.get(caption, ())
            if other in captions
        }
        rows, columns = np.array(list(matches), np.int64).T
        return list(drawn), rows, columns

    def _drawn_for(self, item: int, captions: list[int], rng: random.Random) -> list[int]:
        if self.data.unit == "pair":
            return [int(self.table.captions[item])]
        return rng.sample(captions, min(len(captions), self.data.captions_per_image))

    def _joined_to(self, caption: int, captions: list[int], rng: random.Random) -> int:
        """Another caption of the same picture, or this one alone."""
        if not self.data.join_captions or len(captions) < 2 or rng.random() >= self.data.join_captions:
            return caption
        return rng.choice([other for other in captions if other != caption])

    def _input_ids(self, caption: int, other: int, rng: random.Random) -> InputIds:
        """A caption as it is shown this time: joined, shortened, or as it is."""
        words = list(self._words(caption))
        if other != caption:
            words += [*encode_caption(rng.choice(_GLUE), self.data.context_length)[1:-1], *self._words(other)]
        words = drop_words(words, self.data.drop_tokens, rng)
        return (CLS_ID, *words[: self.data.context_length - 2], SEP_ID)

    def _words(self, caption: int) -> InputIds:
        return encode_caption(self.table.text(caption), self.data.context_length)[1:-1]

    # --- pictures -------------------------------------------------------------------------------------------

    def _pixels(self, picture: int) -> Picture | None:
        """uint8 (R, R, 3), or None for a picture that cannot be read, which is logged once."""
        if (kept := self._memory.pixels(picture)) is not None:
            return kept
        try:
            pixels = read_drafted(self.table.encoded(picture), self.resolution)
        except InvalidInput as error:
            if self._memory.is_first_failure(picture):
                name, image_id = self.table.source_of(picture).name, self.table.image_ids[picture]
                log.warning("%s: picture %d cannot be read: %s", name, image_id, error)
            return None
        self._memory.keep(picture, pixels)
        return pixels


def _items(table: PairTable, unit: str) -> tuple[Order, list[int]]:
    """The picture of every item, and where the items of each source start, and their number."""
    pictures = np.arange(len(table))
    if unit == "image":
        return pictures, table.source_starts
    num_captions = np.diff(table.caption_starts)
    return np.repeat(pictures, num_captions), table.caption_starts[table.source_starts].tolist()


def _positives(pictures: Order, captions: Order, mine: Share, my_texts: Share, counts: tuple[int, int]) -> Positives:
    """Of matches (index of its picture, index of its caption) in a batch of so many pictures and captions."""
    image_rows = _rows(pictures, captions, mine, counts[1])
    if (mine.size, my_texts.size) == counts:  # all are mine: one matrix, which grows with the square of the batch
        return Positives(image_rows, image_rows.t())
    return Positives(image_rows, _rows(captions, pictures, my_texts, counts[0]))


def _rows(rows: Order, columns: Order, share: Share, num_columns: int) -> Tensor:
    """Bool (share.size, num_columns), true at (row, column) of the rows within the share."""
    matrix = torch.zeros(share.size, num_columns, dtype=torch.bool)
    within = share.of(rows)
    matrix[torch.from_numpy(rows[within] - share.start), torch.from_numpy(columns[within])] = True
    return matrix
