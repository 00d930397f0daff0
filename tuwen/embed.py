"""Embed a whole set of pairs with PyTorch, and score it: what validation and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from tuwen.data.pairs import PairSet, TextRecord
from tuwen.errors import InvalidInput
from tuwen.image_transform import preprocess_image
from tuwen.model import ChineseCLIP
from tuwen.retrieval import first_relevant_ranks, recalls_of_ranks
from tuwen.tokenizer import default_tokenizer, normalize_text, pad_rows

Embeddings = npt.NDArray[np.float32]
RECALL_KS = (1, 5, 10)
IMAGE_BATCH_SIZE = 64


@dataclass(frozen=True)
class RetrievalScores:
    """recall@1, @5 and @10 as fractions, one direction, and the number of queries."""

    r1: float
    r5: float
    r10: float
    num_queries: int

    @property
    def mean_recall(self) -> float:
        return (self.r1 + self.r5 + self.r10) / 3


def embed_images(
    model: ChineseCLIP,
    encoded: Iterator[bytes],
    batch_size: int = IMAGE_BATCH_SIZE,
    on_batch: Callable[[int], None] | None = None,
) -> Embeddings:
    """image_embeds float32 (N, D), unit length, of picture files; `on_batch` hears how many are done."""
    resolution = model.spec.vision.resolution
    return embed_pixels(model, (preprocess_image(one, resolution) for one in encoded), batch_size, on_batch)


@torch.inference_mode()
def embed_pixels(
    model: ChineseCLIP,
    pixels: Iterator[Embeddings],
    batch_size: int = IMAGE_BATCH_SIZE,
    on_batch: Callable[[int], None] | None = None,
) -> Embeddings:
    """image_embeds float32 (N, D), unit length, of pixel_values (3, R, R) each."""
    rows: list[Embeddings] = []
    done = 0
    while batch := list(islice(pixels, batch_size)):
        pixel_values = torch.from_numpy(np.stack(batch)).to(_device(model))
        rows.append(model.encode_image(pixel_values, normalize=True).float().cpu().numpy())
        done += len(batch)
        if on_batch:
            on_batch(done)
    return np.concatenate(rows) if rows else np.zeros((0, model.spec.embed_dim), np.float32)


@torch.inference_mode()
def embed_texts(model: ChineseCLIP, texts: Sequence[str], batch_size: int = 256) -> Embeddings:
    """text_embeds float32 (N, D), unit length, of texts, normalised as in training; order kept."""
    tokenizer = default_tokenizer()
    rows = [tokenizer.encode_ids(normalize_text(text), model.spec.context_length) for text in texts]
    embeds = np.zeros((len(rows), model.spec.embed_dim), np.float32)
    # Texts of like length share a batch, so that none is padded to the longest of all.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        input_ids = pad_rows([rows[index] for index in chosen], max(len(rows[index]) for index in chosen))
        features = model.encode_text(torch.from_numpy(input_ids).to(_device(model)), normalize=True)
        embeds[chosen] = features.float().cpu().numpy()
    return embeds


def _device(model: ChineseCLIP) -> torch.device:
    return model.logit_scale.device


@dataclass(frozen=True)
class RetrievalSet:
    """What asks and what is asked for: texts, pictures, and which text describes which pictures.

    Attributes:
        images_of_text: for each text, indices into `image_ids`.
    """

    image_ids: tuple[int, ...]
    texts: tuple[str, ...]
    images_of_text: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, pairs: PairSet) -> RetrievalSet:
        """Texts that describe no picture take no part, as an LMDB does not hold them.

        Raises:
            InvalidInput: fewer than 10 pictures or texts, so recall@10 means nothing; or a picture is missing.
        """
        image_ids = tuple(pairs.image_ids)
        records = [record for record in pairs.texts if record.image_ids]
        if min(len(image_ids), len(records)) < max(RECALL_KS):
            raise InvalidInput(
                f"retrieval: {len(image_ids)} pictures and {len(records)} texts, expected at least 10 of each"
            )
        column = {image_id: index for index, image_id in enumerate(image_ids)}
        images_of_text = tuple(_columns(record, column) for record in records)
        return cls(image_ids, tuple(record.text for record in records), images_of_text)

    def score(self, image_embeds: Embeddings, text_embeds: Embeddings) -> dict[str, RetrievalScores]:
        """Both directions: {"text_to_image": ..., "image_to_text": ...}.

        Pictures without a text are in the gallery but ask nothing.

        Args:
            image_embeds: (N, D), in the order of `image_ids`.
            text_embeds: (T, D), in the order of `texts`.
        """
        texts_of_image: list[list[int]] = [[] for _ in self.image_ids]
        for text, images in enumerate(self.images_of_text):
            for image in images:
                texts_of_image[image].append(text)
        asking = [image for image, texts in enumerate(texts_of_image) if texts]
        return {
            "text_to_image": _score(text_embeds, image_embeds, self.images_of_text),
            "image_to_text": _score(image_embeds[asking], text_embeds, [texts_of_image[image] for image in asking]),
        }


def score_retrieval(
    model: ChineseCLIP, pairs: PairSet, on_batch: Callable[[int], None] | None = None
) -> dict[str, RetrievalScores]:
    """Both directions over a set of pairs: {"text_to_image": ..., "image_to_text": ...}.

    Raises:
        InvalidInput: as `RetrievalSet.of`; or a picture is broken, which the sentence names.
    """
    chosen = RetrievalSet.of(pairs)
    image_embeds = embed_pictures(model, pairs, chosen.image_ids, on_batch=on_batch)
    return chosen.score(image_embeds, embed_texts(model, chosen.texts))


def embed_pictures(
    model: ChineseCLIP,
    pairs: PairSet,
    image_ids: Sequence[int],
    batch_size: int = IMAGE_BATCH_SIZE,
    on_batch: Callable[[int], None] | None = None,
) -> Embeddings:
    """image_embeds float32 (N, D), unit length, of a set's pictures.

    Raises:
        InvalidInput: a picture is missing or broken; the sentence names it.
    """
    pixels = _pixels(pairs, image_ids, model.spec.vision.resolution)
    return embed_pixels(model, pixels, batch_size, on_batch)


def _pixels(pairs: PairSet, image_ids: Sequence[int], resolution: int) -> Iterator[Embeddings]:
    """pixel_values (3, R, R) of each picture."""
    for image_id in image_ids:
        encoded = pairs.image_bytes(image_id)
        try:
            pixel_values = preprocess_image(encoded, resolution)
        except InvalidInput as error:
            raise InvalidInput(f"picture {image_id}: {error}") from error
        yield pixel_values


def _columns(record: TextRecord, column: Mapping[int, int]) -> tuple[int, ...]:
    for image_id in record.image_ids:
        if image_id not in column:  # an LMDB's pairs and pictures are two files
            raise InvalidInput(f"text {record.text_id}: names picture {image_id}, which is not in the set")
    return tuple(column[image_id] for image_id in record.image_ids)


def _score(queries: Embeddings, items: Embeddings, relevant: Sequence[Sequence[int]]) -> RetrievalScores:
    ranks = first_relevant_ranks(queries, items, relevant)
    r1, r5, r10 = recalls_of_ranks(ranks, len(items), RECALL_KS)
    return RetrievalScores(r1, r5, r10, num_queries=len(ranks))
