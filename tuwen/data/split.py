"""Part the pictures of a split in two, for a set that has no validation pairs of its own.

    tuwen data split --data DIR --split valid --into tune_train,tune_valid --share 0.8

A picture's side follows from its file, so a rerun, on any machine, parts them alike, and copies of a file stay together.
Captions go with their pictures; one that describes pictures of both sides is on both, each time with that side's alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tuwen.data.pairs import (
    ImageRecord,
    TextRecord,
    jsonl_path,
    lmdb_folder,
    open_pairs,
    tsv_path,
    write_images,
    write_texts,
)
from tuwen.errors import InvalidInput

ProgressHook = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Part:
    """What one side got.

    Attributes:
        num_shared: of its captions, those that the other side has too.
    """

    name: str
    num_pictures: int
    num_captions: int
    num_shared: int


def split_pairs(
    data_dir: Path,
    split: str,
    into: tuple[str, str],
    share: float,
    on_progress: ProgressHook = lambda done, total, what: None,
) -> tuple[Part, Part]:
    """Write two splits beside `split`, of about `share` of its pictures and of the rest.

    Raises:
        InvalidInput: the split cannot be read, a name cannot be that of a new split, or a side would be empty.
    """
    _check_names(data_dir, split, into)
    pairs = open_pairs(data_dir, split)
    pictures: tuple[list[int], list[int]] = ([], [])
    for done, image_id in enumerate(pairs.image_ids, start=1):
        pictures[_fraction(pairs.image_bytes(image_id)) >= share].append(image_id)
        on_progress(done, len(pairs.image_ids), "reading pictures")
    for name, image_ids in zip(into, pictures, strict=True):
        if not image_ids:
            raise InvalidInput(f"{data_dir}: of {len(pairs.image_ids)} pictures none is left for {name!r}")
    texts = [_texts_of(pairs.texts, set(image_ids)) for image_ids in pictures]
    num_shared = len({one.text_id for one in texts[0]} & {one.text_id for one in texts[1]})
    for name, image_ids, chosen in zip(into, pictures, texts, strict=True):
        write_images(tsv_path(data_dir, name), (ImageRecord(one, pairs.image_bytes(one)) for one in image_ids))
        write_texts(jsonl_path(data_dir, name), chosen)
    first, second = (Part(*one, num_shared) for one in zip(into, map(len, pictures), map(len, texts), strict=True))
    return first, second


def _check_names(data_dir: Path, split: str, into: tuple[str, str]) -> None:
    for name in into:
        if not name or Path(name).name != name or name.startswith("."):
            raise InvalidInput(f"{name!r} is no name for a split")
        if lmdb_folder(data_dir, name):
            raise InvalidInput(f"{data_dir}: {name!r} is there as an LMDB, which would be read in place of the new one")
    if len({split, *into}) < 3:
        raise InvalidInput(f"{split!r} cannot be parted into {into[0]!r} and {into[1]!r}: expected three names")


def _fraction(encoded: bytes) -> float:
    """From 0 to 1, the same for the same file."""
    return int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big") / 2**64


def _texts_of(texts: Sequence[TextRecord], image_ids: set[int]) -> list[TextRecord]:
    """Those that describe some of these pictures, of these alone."""
    of_side = (replace(text, image_ids=tuple(one for one in text.image_ids if one in image_ids)) for text in texts)
    return [text for text in of_side if text.image_ids]
