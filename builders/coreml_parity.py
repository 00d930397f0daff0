"""The gate before a package is handed over: does the program that was saved compute what PyTorch computes?

The program is run by `builders.mil_evaluator`, on any machine. What a device's own arithmetic adds is not seen here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from builders.coreml_towers import INPUT_NAMES, OUTPUT_NAMES, Precision, text_buckets
from builders.mil_evaluator import Package
from builders.towers import TowerKind, sample_captions, sample_pictures
from tuwen.image_transform import decode_image, normalize_pixels, resize_image
from tuwen.model import ChineseCLIP
from tuwen.specs import CLS_ID, SEP_ID
from tuwen.tokenizer import default_tokenizer, pad_rows

NUM_REAL = 16


@dataclass(frozen=True)
class Bound:
    """What a tower of one precision must keep to."""

    min_cosine: float
    max_abs_diff: float
    max_length_error: float


# The first three cosines are the specification's. int8 costs what an 8-bit palette does: 255 even steps, a scale for
# each row of a matrix. The steps of 64 values are four times as wide as those of 256, and the loss sixteen times as
# large: no architecture's worst item was below 0.993 (docs/coreml_figures.md), and 0.98 leaves room for weights less
# even than random ones. Lengths are off by what dividing in half precision, with 11 bits, leaves of them.
BOUNDS: Mapping[Precision, Bound] = {
    "fp32": Bound(0.999999, 1e-4, 1e-5),
    "fp16": Bound(0.999, 1, 1e-3),
    "palette8": Bound(0.99, 1, 1e-3),
    "palette6": Bound(0.98, 1, 1e-3),
    "int8": Bound(0.99, 1, 1e-3),
}


@dataclass(frozen=True)
class Parity:
    """Worst cosine, largest absolute difference and largest error of a length over `num_items` embeddings."""

    min_cosine: float
    max_abs_diff: float
    max_length_error: float
    num_items: int

    def keeps(self, bound: Bound) -> bool:
        """False too where anything is not a number."""
        return (
            self.min_cosine >= bound.min_cosine
            and self.max_abs_diff <= bound.max_abs_diff
            and self.max_length_error <= bound.max_length_error
        )


@dataclass(frozen=True, eq=False)
class Item:
    """What a package is fed, and the embedding (D,) that PyTorch makes of it."""

    feed: npt.NDArray[np.generic]
    expected: npt.NDArray[np.float32]


def measure_parity(package: Package, kind: TowerKind, items: Sequence[Item]) -> Parity:
    """
    Raises:
        UnusablePackage: the program cannot be run.
    """
    expected = np.stack([item.expected for item in items])
    found = np.stack([package.run({INPUT_NAMES[kind]: item.feed})[OUTPUT_NAMES[kind]][0] for item in items])
    lengths = np.linalg.norm(found, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):  # what is no number keeps to no bound
        cosines = (found * expected).sum(axis=1) / (lengths * np.linalg.norm(expected, axis=1))
    return Parity(
        min_cosine=float(cosines.min()),
        max_abs_diff=float(np.abs(found - expected).max()),
        max_length_error=float(np.abs(lengths - 1).max()),
        num_items=len(items),
    )


def parity_items(model: ChineseCLIP, kind: TowerKind, num_real: int = NUM_REAL) -> list[Item]:
    """Real input and random, and for texts each length with padding and without."""
    return _text_items(model, num_real) if kind == "text" else _image_items(model, num_real)


@torch.inference_mode()
def _image_items(model: ChineseCLIP, num_real: int) -> list[Item]:
    resolution = model.spec.vision.resolution
    pictures = [resize_image(decode_image(encoded), resolution) for encoded in sample_pictures(num_real)]
    pictures.append(np.random.default_rng(0).integers(0, 256, (resolution, resolution, 3), np.uint8))
    items = []
    for pixels in pictures:
        pixel_values = torch.from_numpy(normalize_pixels(pixels))[None]
        items.append(Item(pixels, model.encode_image(pixel_values, normalize=True)[0].numpy()))
    return items


@torch.inference_mode()
def _text_items(model: ChineseCLIP, num_real: int) -> list[Item]:
    """PyTorch sees every text padded to the longest length: that padding changes nothing is part of what counts."""
    buckets = text_buckets(model.spec)
    random = np.random.default_rng(0)
    rows = [default_tokenizer().encode_ids(caption, buckets[-1]) for caption in sample_captions(num_real)]
    lengths = [pad_length(len(row), buckets) for row in rows]
    for bucket in buckets:
        for num_tokens in (bucket, bucket - 2):
            middle = random.integers(SEP_ID + 1, model.spec.text.vocab_size, num_tokens - 2)
            rows.append([CLS_ID, *map(int, middle), SEP_ID])
            lengths.append(bucket)
    items = []
    for row, length in zip(rows, lengths, strict=True):
        padded = torch.from_numpy(pad_rows([row], buckets[-1]))
        expected = model.encode_text(padded, normalize=True)[0].numpy()
        items.append(Item(pad_rows([row], length).astype(np.int32), expected))
    return items


def pad_length(num_tokens: int, buckets: Sequence[int]) -> int:
    """The shortest of `buckets` that holds a text."""
    return next(length for length in buckets if length >= num_tokens)
