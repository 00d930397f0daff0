"""Pictures with captions as training batches: pixels, input_ids, and which belong to which."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.recipe import DataSection
from tuwen.data.pairs import PairSet
from tuwen.errors import InvalidInput
from tuwen.image_transform import decode_image, resize_image
from tuwen.specs import CLS_ID, SEP_ID
from tuwen.tokenizer import default_tokenizer, normalize_text, pad_rows

# What stands between two captions that are joined.
_GLUE = ("", "的", "，")
# A short caption without one of its tokens is another caption.
_MIN_WORDS_TO_DROP = 4


@dataclass(frozen=True)
class Batch:
    """pixels float32 (B, 3, R, R) in [0, 1]; input_ids int64 (T, L); positives bool (B, T)."""

    pixels: Tensor
    input_ids: Tensor
    positives: Tensor


class ImageBatches:
    """Epochs of batches in which a picture comes with a few of its captions, each caption once a batch.

    A caption is a positive of every picture it describes, whichever picture it was drawn for.
    """

    def __init__(self, pairs: PairSet, data: DataSection, resolution: int, batch_size: int) -> None:
        self.pairs, self.data, self.resolution, self.batch_size = pairs, data, resolution, batch_size
        texts = [record for record in pairs.texts if record.image_ids]
        self.images_of_text = [frozenset(record.image_ids) for record in texts]
        self.texts_of_image: dict[int, list[int]] = {}
        for index, record in enumerate(texts):
            for image_id in record.image_ids:
                self.texts_of_image.setdefault(image_id, []).append(index)
        self.image_ids = [image_id for image_id in pairs.image_ids if image_id in self.texts_of_image]
        if len(self.image_ids) < batch_size:
            raise InvalidInput(
                f"training split: {len(self.image_ids)} pictures with captions, fewer than one batch of {batch_size}"
            )
        tokenizer = default_tokenizer()
        self.text_ids = [tokenizer.encode_ids(normalize_text(record.text), data.context_length) for record in texts]
        self._glue = [tokenizer.encode_ids(glue)[1:-1] for glue in _GLUE]
        self._decoded: dict[int, npt.NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        """Batches in an epoch; the remainder is left to the next epoch's shuffle."""
        return len(self.image_ids) // self.batch_size

    def epoch(self, seed: int, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch; their order is a function of (seed, epoch) alone."""
        rng = random.Random(f"{seed}/{epoch}")
        order = rng.sample(self.image_ids, len(self.image_ids))
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield self._batch(order[start : start + self.batch_size], rng)

    def _batch(self, image_ids: list[int], rng: random.Random) -> Batch:
        drawn: dict[tuple[int, ...], frozenset[int]] = {}  # keeps its order, and each caption once
        for image_id in image_ids:
            texts = self.texts_of_image[image_id]
            for index in rng.sample(texts, min(len(texts), self.data.captions_per_image)):
                input_ids, described = self._vary(index, texts, rng)
                drawn[input_ids] = drawn.get(input_ids, frozenset()) | described
        rows = list(drawn)
        positives = [[image_id in described for described in drawn.values()] for image_id in image_ids]
        pixels = np.stack([self._pixels(image_id) for image_id in image_ids])
        return Batch(
            pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255,
            input_ids=torch.from_numpy(pad_rows(rows, max(map(len, rows)))),
            positives=torch.tensor(positives),
        )

    def _vary(self, index: int, texts: list[int], rng: random.Random) -> tuple[tuple[int, ...], frozenset[int]]:
        """A caption as it is shown this time, and the pictures it describes: joined, shortened, or as it is."""
        words, described = self.text_ids[index][1:-1], self.images_of_text[index]
        if self.data.join_captions and rng.random() < self.data.join_captions:
            other = rng.choice(texts)
            words = [*words, *rng.choice(self._glue), *self.text_ids[other][1:-1]]
            described &= self.images_of_text[other]
        if self.data.drop_tokens and len(words) >= _MIN_WORDS_TO_DROP:
            words = [word for word in words if rng.random() >= self.data.drop_tokens] or words
        return (CLS_ID, *words[: self.data.context_length - 2], SEP_ID), described

    def _pixels(self, image_id: int) -> npt.NDArray[np.uint8]:
        """uint8 (R, R, 3)."""
        if image_id in self._decoded:
            return self._decoded[image_id]
        try:
            pixels = resize_image(decode_image(self.pairs.image_bytes(image_id)), self.resolution)
        except InvalidInput as error:
            raise InvalidInput(f"training picture {image_id}: {error}") from error
        if self.data.cache_decoded:
            self._decoded[image_id] = pixels
        return pixels
