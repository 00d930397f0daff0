"""Embed a whole set of pairs with PyTorch, and score it: what validation and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from tuwen.data.pairs import PairSet, TextRecord
from tuwen.errors import InvalidInput
from tuwen.image_transform import preprocess_image
from tuwen.model import ChineseCLIP
from tuwen.retrieval import recalls
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
    return _embed_pixels(model, (preprocess_image(one, resolution) for one in encoded), batch_size, on_batch)


@torch.inference_mode()
def _embed_pixels(
    model: ChineseCLIP, pixels: Iterator[Embeddings], batch_size: int, on_batch: Callable[[int], None] | None
) -> Embeddings:
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


def score_retrieval(
    model: ChineseCLIP, pairs: PairSet, on_batch: Callable[[int], None] | None = None
) -> dict[str, RetrievalScores]:
    """Both directions over a set of pairs: {"text_to_image": ..., "image_to_text": ...}.

    Pictures without a text are in the gallery but ask nothing; texts that describe no picture take no part, as an
    LMDB does not hold them.
    Raises:
        InvalidInput: the set has fewer than 10 pictures or texts, so recall@10 means nothing; or a picture is
            missing or broken, which the sentence names.
    """
    image_ids = pairs.image_ids
    texts = [record for record in pairs.texts if record.image_ids]
    if min(len(image_ids), len(texts)) < max(RECALL_KS):
        raise InvalidInput(f"retrieval: {len(image_ids)} pictures and {len(texts)} texts, expected at least 10 of each")
    relevant = _relevance(texts, image_ids)
    image_embeds = _embed_pixels(model, _pixels(pairs, model.spec.vision.resolution), IMAGE_BATCH_SIZE, on_batch)
    text_embeds = embed_texts(model, [record.text for record in texts])
    scores = text_embeds @ image_embeds.T
    return {
        "text_to_image": _score(scores, relevant),
        "image_to_text": _score(scores.T[relevant.any(axis=0)], relevant.T[relevant.any(axis=0)]),
    }


def _pixels(pairs: PairSet, resolution: int) -> Iterator[Embeddings]:
    """pixel_values (3, R, R) of every picture, in the set's order."""
    for image_id in pairs.image_ids:
        encoded = pairs.image_bytes(image_id)
        try:
            pixel_values = preprocess_image(encoded, resolution)
        except InvalidInput as error:
            raise InvalidInput(f"picture {image_id}: {error}") from error
        yield pixel_values


def _relevance(texts: Sequence[TextRecord], image_ids: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Bool (T, N): does the text describe the picture?"""
    column = {image_id: index for index, image_id in enumerate(image_ids)}
    relevant = np.zeros((len(texts), len(image_ids)), np.bool_)
    for row, record in enumerate(texts):
        for image_id in record.image_ids:
            if image_id not in column:  # an LMDB's pairs and pictures are two files
                raise InvalidInput(f"text {record.text_id}: names picture {image_id}, which is not in the set")
            relevant[row, column[image_id]] = True
    return relevant


def _score(scores: Embeddings, relevant: npt.NDArray[np.bool_]) -> RetrievalScores:
    r1, r5, r10 = recalls(scores, relevant, RECALL_KS)
    return RetrievalScores(r1, r5, r10, num_queries=len(scores))
