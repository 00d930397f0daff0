"""Several sets of pairs as one: which captions describe which pictures, in arrays that worker processes share.

    table = PairTable(open_sources(recipe.data))
    table.text(table.captions_of(0)[0])

All of it lies in NumPy arrays and one buffer of UTF-8; a million pairs with captions of twenty characters took 176 MiB.
A forked process that only reads copies none of it, as it would copy Python objects, whose reference counts change as
they are looked at.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.order import stable_hash
from training.recipe import DataSection
from tuwen.data.lmdb import LmdbPairs
from tuwen.data.pairs import PairSet, open_pairs
from tuwen.tokenizer import normalize_text

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class WeightedPairs:
    """One of several sets; `name` is what its warnings call it, `weight` as `recipe.Source` has it."""

    pairs: PairSet
    name: str = "training split"
    weight: float = 1.0


def open_sources(data: DataSection) -> tuple[WeightedPairs, ...]:
    """The training split of every source of a recipe.

    Raises:
        InvalidInput: one of them is not there or malformed.
    """
    return tuple(
        WeightedPairs(open_pairs(source.path, data.train_split), f"{source.path} ({data.train_split})", source.weight)
        for source in data.all_sources
    )


def caption_key(text: str) -> str:
    """Captions with the same key are the same caption, whatever their ids; "" describes nothing."""
    return normalize_text(text).strip()


class PairTable:
    """Pictures of all sources that have a caption, numbered 0..N-1, and all captions, numbered by what they say.

    The numbers are a function of ids and texts, not of how a source stores them: a source's pictures are in the order
    of their ids. Two sources may use the same id for different pictures.

    Attributes:
        image_ids: int64 (N,), as in their source.
        source_starts: the first picture of each source, and N.
        captions: int64 (P,), the caption of every pair, by picture.
        caption_starts: int64 (N + 1,); where each picture's captions start in `captions`, and P.
    """

    def __init__(self, sources: Sequence[WeightedPairs]) -> None:
        self.sources = tuple(sources)
        texts = _TextLog()
        starts, image_ids, pictures, runs = [0], [], [], []
        for source in sources:
            ids, text_runs = _read(source, texts)
            unique_ids, picture = np.unique(ids, return_inverse=True)
            image_ids.append(unique_ids)
            pictures.append(picture + starts[-1])
            runs.append(text_runs)
            starts.append(starts[-1] + len(unique_ids))
        self.source_starts = starts
        self.image_ids = np.concatenate(image_ids)
        caption_of_run, self._text_starts, self._text_ends = texts.numbered()
        self._text_bytes = texts.encoded
        captions = caption_of_run[np.concatenate(runs)]
        self.caption_starts, self.captions = _by_picture(np.concatenate(pictures), captions, len(self.image_ids))

    def __len__(self) -> int:
        """Pictures with a caption."""
        return len(self.image_ids)

    def captions_of(self, picture: int) -> list[int]:
        """The numbers of all captions of a picture."""
        return self.captions[self.caption_starts[picture] : self.caption_starts[picture + 1]].tolist()

    def text(self, caption: int) -> str:
        """What a caption says, normalised."""
        return self._text_bytes[self._text_starts[caption] : self._text_ends[caption]].decode()

    def source_of(self, picture: int) -> WeightedPairs:
        """The set that a picture is in."""
        return self.sources[int(np.searchsorted(self.source_starts, picture, side="right")) - 1]

    def encoded(self, picture: int) -> bytes:
        """The encoded picture file.

        Raises:
            InvalidInput: its base64 is broken.
        """
        return self.source_of(picture).pairs.image_bytes(int(self.image_ids[picture]))


class _TextLog:
    """Captions as they are read, end to end, a repeated one again; equal ones get one number at the end."""

    def __init__(self) -> None:
        self.encoded = bytearray()
        self._hashes, self._starts = array("q"), array("q")

    def add(self, key: str) -> int:
        """Returns the number of this run."""
        self._hashes.append(stable_hash(key))
        self._starts.append(len(self.encoded))
        self.encoded += key.encode()
        return len(self._hashes) - 1

    def numbered(self) -> tuple[Ints, Ints, Ints]:
        """The caption number of every run, and where each caption's text starts and ends."""
        # 64 bits: among ten million captions the chance that any two are taken for one is 3 in a million.
        _, first, caption_of_run = np.unique(_ints(self._hashes), return_index=True, return_inverse=True)
        bounds = np.append(_ints(self._starts), len(self.encoded))
        return caption_of_run, bounds[first], bounds[first + 1]


def _read(source: WeightedPairs, texts: _TextLog) -> tuple[Ints, Ints]:
    """Image id and text run of every pair of a source, blank captions and missing pictures left out."""
    ids, runs = array("q"), array("q")
    previous, run, num_blank = None, -1, 0
    for image_id, text in _pairs(source.pairs):
        if text != previous:
            previous, key = text, caption_key(text)
            run = texts.add(key) if key else -1
        if run < 0:
            num_blank += 1
            continue
        ids.append(image_id)
        runs.append(run)
    known = np.isin(_ints(ids), np.fromiter(source.pairs.image_ids, np.int64))
    if num_blank or not known.all():
        log.warning(
            "%s: left out %d pairs with an empty caption and %d with a picture that is not there",
            source.name,
            num_blank,
            len(known) - known.sum(),
        )
    return _ints(ids)[known], _ints(runs)[known]


def _pairs(pairs: PairSet) -> Iterator[tuple[int, str]]:
    """Image id and text of every pair; an LMDB's one by one, so that millions never stand in memory as objects."""
    if isinstance(pairs, LmdbPairs):
        yield from ((pair.image_id, pair.text) for pair in pairs.pairs())
    else:
        yield from ((image_id, record.text) for record in pairs.texts for image_id in record.image_ids)


def _by_picture(pictures: Ints, captions: Ints, num_pictures: int) -> tuple[Ints, Ints]:
    """The pairs grouped by picture, each once: where every picture's captions start, and the captions."""
    order = np.lexsort((captions, pictures))
    pictures, captions = pictures[order], captions[order]
    is_new = np.ones(len(order), np.bool_)
    is_new[1:] = (np.diff(pictures) != 0) | (np.diff(captions) != 0)
    pictures, captions = pictures[is_new], captions[is_new]
    return np.searchsorted(pictures, np.arange(num_pictures + 1)).astype(np.int64), captions


def _ints(values: array[int]) -> Ints:
    return np.frombuffer(values, np.int64) if values else np.empty(0, np.int64)
