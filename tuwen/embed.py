"""Embed a whole set of pairs with PyTorch, and score it: what validation and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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

    @cached_property
    def texts_of_image(self) -> tuple[tuple[int, ...], ...]:
        """For each picture, indices into `texts`; empty where none describes it."""
        found: list[list[int]] = [[] for _ in self.image_ids]
        for text, images in enumerate(self.images_of_text):
            for image in images:
                found[image].append(text)
        return tuple(map(tuple, found))

    @cached_property
    def asking_images(self) -> tuple[int, ...]:
        """Indices of the pictures that ask: those with a text. The others are in the gallery only."""
        return tuple(image for image, texts in enumerate(self.texts_of_image) if texts)

    def ranks(self, image_embeds: Embeddings, text_embeds: Embeddings) -> dict[str, npt.NDArray[np.int64]]:
        """Rank of each query's best right answer, 0 is the top: int64 (T,) of every text against the pictures,
        "text_to_image", and (len(asking_images),) of every picture that asks against the texts, "image_to_text".

        Args:
            image_embeds: (N, D), in the order of `image_ids`.
            text_embeds: (T, D), in the order of `texts`.
        """
        asking = list(self.asking_images)
        right_texts = [self.texts_of_image[image] for image in asking]
        return {
            "text_to_image": first_relevant_ranks(text_embeds, image_embeds, self.images_of_text),
            "image_to_text": first_relevant_ranks(image_embeds[asking], text_embeds, right_texts),
        }

    def score(self, image_embeds: Embeddings, text_embeds: Embeddings) -> dict[str, RetrievalScores]:
        """Both directions: {"text_to_image": ..., "image_to_text": ...}; args as `ranks`."""
        num_items = {"text_to_image": len(self.image_ids), "image_to_text": len(self.texts)}
        ranks = self.ranks(image_embeds, text_embeds)
        return {direction: _scores(found, num_items[direction]) for direction, found in ranks.items()}


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


def _scores(ranks: npt.NDArray[np.int64], num_items: int) -> RetrievalScores:
    r1, r5, r10 = recalls_of_ranks(ranks, num_items, RECALL_KS)
    return RetrievalScores(r1, r5, r10, num_queries=len(ranks))
