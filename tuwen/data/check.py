"""What is off in a set of pairs, before it is trained on: dirty data looks like a bad setting from inside a run.

    tuwen data check --data DIR --split train

Pictures are decoded in processes of their own; every finding is a count and its first few examples.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from tuwen.data.pairs import PairSet, TextRecord, open_pairs
from tuwen.errors import InvalidInput, TuwenError
from tuwen.image_transform import decode_drafted
from tuwen.specs import CONTEXT_LENGTH
from tuwen.tokenizer import MAX_TEXT_CHARS, default_tokenizer, normalize_text

MAX_EXAMPLES = 5
# Of pictures that a process decodes at a time: enough that handing them out costs nothing beside it.
_CHUNK = 32
# A large JPEG is decoded as the largest published model has it.
_RESOLUTION = 336

ProgressHook = Callable[[int, int, str], None]
Hashes = npt.NDArray[np.int64]
Example = TypeVar("Example")


class UnreadablePicture(NamedTuple):
    image_id: int
    reason: str


class RepeatedCaption(NamedTuple):
    text: str
    num_pictures: int


@dataclass(frozen=True)
class Finding(Generic[Example]):
    """How many there are, and the first few, or the worst."""

    count: int
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a split holds, and what is off.

    Attributes:
        unreadable: pictures that cannot be decoded.
        same_file, same_pixels: pictures that are copies of another, by SHA-256 of the file or of the decoded picture;
            the first of its kind does not count, and is the first id of its example.
        empty: text ids of captions without a word.
        repeated: captions that describe several pictures, under one text id or several.
        repeated_share: how many of the pairs have one of those.
        truncated: text ids of captions that are longer than `context_length`.
        tokens: length in tokens, with [CLS] and [SEP], of how many captions.
        without_caption, without_picture: image ids, text ids. An LMDB has no captions without a picture.
    """

    num_pictures: int
    num_captions: int
    num_pairs: int
    context_length: int
    unreadable: Finding[UnreadablePicture]
    same_file: Finding[tuple[int, ...]]
    same_pixels: Finding[tuple[int, ...]]
    empty: Finding[int]
    repeated: Finding[RepeatedCaption]
    repeated_share: float
    truncated: Finding[int]
    tokens: dict[int, int]
    without_caption: Finding[int]
    without_picture: Finding[int]

    @property
    def advice(self) -> list[str]:
        """What to do about each finding, a sentence each."""
        unreadable, copies = self.unreadable.count, self.same_pixels.count
        sentences = {
            f"Pictures that cannot be read ({unreadable}): mend or remove them, or have training skip them, with "
            f"data.max_corrupt = {unreadable}.": unreadable,
            f"Copies of other pictures ({copies}): keep one of each with the captions of all, or training takes what "
            "describes the one for wrong of the other.": copies,
            f"Empty captions ({self.empty.count}): remove them; training leaves them out.": self.empty.count,
            f"Repeated captions ({self.repeated_share:.1%} of the pairs): training takes every picture of a caption "
            "for right; data.distinct_captions = true keeps them out of one batch.": self.repeated.count,
            f"Captions of more than {self.context_length} tokens ({self.truncated.count}): they lose their end; "
            "shorten them, or raise data.context_length.": self.truncated.count,
            f"Pictures without a caption ({self.without_caption.count}): training never shows them; caption or "
            "remove them.": self.without_caption.count,
            f"Captions without a picture ({self.without_picture.count}): training never shows them; remove them, or "
            "see whether their pictures were lost.": self.without_picture.count,
        }
        return [sentence for sentence, count in sentences.items() if count]


def check_pairs(
    data_dir: Path,
    split: str,
    context_length: int = CONTEXT_LENGTH,
    num_workers: int | None = None,
    on_progress: ProgressHook = lambda done, total, what: None,
) -> Report:
    """Read all of a split and say what is off.

    Args:
        num_workers: processes that decode; None: one a core; 0: this one.
    Raises:
        InvalidInput: the split cannot be opened.
        TuwenError: a process died over a picture.
    """
    pairs = open_pairs(data_dir, split)
    texts, image_ids = pairs.texts, pairs.image_ids
    unreadable, same_file, same_pixels = _check_pictures(pairs, num_workers, on_progress)
    on_progress(0, 0, "reading captions")
    lengths = _token_lengths(texts)
    repeated, repeated_share = _repeated(texts)
    described = {image_id for record in texts for image_id in record.image_ids}
    return Report(
        num_pictures=len(image_ids),
        num_captions=len(texts),
        num_pairs=sum(len(record.image_ids) for record in texts),
        context_length=context_length,
        unreadable=unreadable,
        same_file=same_file,
        same_pixels=same_pixels,
        empty=_find(record.text_id for record in texts if not _key(record.text)),
        repeated=repeated,
        repeated_share=repeated_share,
        truncated=_find(
            record.text_id for record, length in zip(texts, lengths, strict=True) if length > context_length
        ),
        tokens=dict(sorted(Counter(lengths).items())),
        without_caption=_find(image_id for image_id in image_ids if image_id not in described),
        without_picture=_find(record.text_id for record in texts if not record.image_ids),
    )


def _find(examples: Iterable[Example]) -> Finding[Example]:
    """Counts all, keeps the first few."""
    rest = iter(examples)
    first = tuple(islice(rest, MAX_EXAMPLES))
    return Finding(len(first) + sum(1 for _ in rest), first)


# --- captions -----------------------------------------------------------------------------------------------


def _key(text: str) -> str:
    """Captions with the same key are the same to training."""
    return normalize_text(text).strip()


def _token_lengths(texts: Sequence[TextRecord]) -> array[int]:
    """Of every caption, with [CLS] and [SEP], before it is cut."""
    tokenizer = default_tokenizer()
    return array("i", (len(tokenizer.encode_ids(normalize_text(one.text), MAX_TEXT_CHARS)) for one in texts))


def _repeated(texts: Sequence[TextRecord]) -> tuple[Finding[RepeatedCaption], float]:
    """Captions that describe several pictures, most pictures first, and the share of pairs that have one."""
    hashes, pictures = array("q"), array("q")
    for record in texts:
        if key := _key(record.text):
            hashes.extend([_hash(key.encode())] * len(record.image_ids))
            pictures.extend(record.image_ids)
    pairs = np.unique(np.stack([np.array(hashes, np.int64), np.array(pictures, np.int64)]), axis=1)
    captions, counts = np.unique(pairs[0], return_counts=True)
    several = counts > 1
    worst = [at for at in np.argsort(-counts, kind="stable")[:MAX_EXAMPLES] if several[at]]
    named = {int(captions[at]): int(counts[at]) for at in worst}
    keys = (_key(record.text) for record in texts)
    text_of = {found: key for key in keys if (found := _hash(key.encode())) in named}
    examples = tuple(RepeatedCaption(text_of[one], count) for one, count in named.items())
    share = float(counts[several].sum() / max(1, counts.sum()))
    return Finding(int(several.sum()), examples), share


def _hash(content: bytes) -> int:
    """64 bits of SHA-256: among ten million, the chance that any two are taken for one is 3 in a million."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True)


# --- pictures -----------------------------------------------------------------------------------------------


class _Picture(NamedTuple):
    """What a process finds out about one; `file` and `pixels` are hashes, None where it cannot be read."""

    image_id: int
    file: int | None
    pixels: int | None
    reason: str


def _check_pictures(
    pairs: PairSet, num_workers: int | None, on_progress: ProgressHook
) -> tuple[Finding[UnreadablePicture], Finding[tuple[int, ...]], Finding[tuple[int, ...]]]:
    """Those that cannot be read, copies by file, and copies by pixels."""
    total = len(pairs.image_ids)
    files, pixels = _Copies(), _Copies()
    unreadable: list[UnreadablePicture] = []
    num_unreadable = 0
    for done, picture in enumerate(_looked_at(pairs, num_workers), start=1):
        files.add(picture.image_id, picture.file)
        pixels.add(picture.image_id, picture.pixels)
        if picture.pixels is None:
            num_unreadable += 1
            if len(unreadable) < MAX_EXAMPLES:
                unreadable.append(UnreadablePicture(picture.image_id, picture.reason))
        on_progress(done, total, "decoding pictures")
    return Finding(num_unreadable, tuple(unreadable)), files.found(), pixels.found()


class _Copies:
    """Pictures by hash, 16 bytes each."""

    def __init__(self) -> None:
        self._ids, self._hashes = array("q"), array("q")

    def add(self, image_id: int, content: int | None) -> None:
        if content is not None:
            self._ids.append(image_id)
            self._hashes.append(content)

    def found(self) -> Finding[tuple[int, ...]]:
        """Copies beyond the first of each; the examples are the ids of most alike."""
        ids, hashes = np.array(self._ids, np.int64), np.array(self._hashes, np.int64)
        _, first, group, counts = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
        most = [at for at in np.lexsort((first, -counts))[:MAX_EXAMPLES] if counts[at] > 1]
        examples = tuple(tuple(ids[group == at][:MAX_EXAMPLES].tolist()) for at in most)
        return Finding(len(ids) - len(counts), examples)


def _looked_at(pairs: PairSet, num_workers: int | None) -> Iterator[_Picture]:
    """Every picture, in order."""
    chunks = _chunks(pairs.image_ids)
    num_workers = (os.cpu_count() or 1) if num_workers is None else num_workers
    if not num_workers:
        _use(pairs)
        for chunk in chunks:
            yield from _look_at(chunk)
        return
    with ProcessPoolExecutor(num_workers, initializer=_use, initargs=(pairs,)) as pool:
        pending: deque[tuple[list[int], Future[list[_Picture]]]] = deque()
        for chunk in chunks:
            pending.append((chunk, pool.submit(_look_at, chunk)))
            if len(pending) > 2 * num_workers:  # so that millions do not stand in a queue
                yield from _result(*pending.popleft())
        while pending:
            yield from _result(*pending.popleft())


def _chunks(image_ids: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(image_ids), _CHUNK):
        yield list(image_ids[start : start + _CHUNK])


def _result(chunk: list[int], future: Future[list[_Picture]]) -> list[_Picture]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise TuwenError(
            f"a process died while it decoded pictures, around id {chunk[0]}: for want of memory, or of a fault in "
            "the decoder"
        ) from None


_opened: PairSet


def _use(pairs: PairSet) -> None:
    """What this process reads pictures from; set once in each worker, as the set is too large to send along."""
    global _opened
    _opened = pairs


def _look_at(image_ids: list[int]) -> list[_Picture]:
    return [_look_at_one(image_id) for image_id in image_ids]


def _look_at_one(image_id: int) -> _Picture:
    file = None
    try:
        encoded = _opened.image_bytes(image_id)
        file = _hash(encoded)
        image, _ = decode_drafted(encoded, _RESOLUTION)
        pixels = _hash(f"{image.size}".encode() + image.convert("RGB").tobytes())
    except InvalidInput as error:
        return _Picture(image_id, file, None, str(error))
    return _Picture(image_id, file, pixels, "")
