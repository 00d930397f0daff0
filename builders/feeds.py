"""What a tower is fed, batch by batch: pictures and texts -> the inputs of its graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tuwen.image_transform import preprocess_image
from tuwen.tokenizer import default_tokenizer, pack_rows

# Input name -> array; an answer has the same form.
Feed = dict[str, npt.NDArray[Any]]
_Item = TypeVar("_Item")


def image_feeds(pictures: Iterable[bytes], resolution: int, batch_size: int) -> Iterator[Feed]:
    """`pixel_values` float32 (B, 3, R, R) of encoded files."""
    for some in _batches(pictures, batch_size):
        yield {"pixel_values": np.stack([preprocess_image(each, resolution) for each in some])}


def text_feeds(texts: Iterable[str], context_length: int, batch_size: int) -> Iterator[Feed]:
    """Packed texts, as `tuwen.tokenizer.pack_rows` lays them, of at most `context_length` tokens each."""
    for some in _batches(texts, batch_size):
        yield dict(pack_rows([default_tokenizer().encode_ids(each, context_length) for each in some]))


def _batches(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch
