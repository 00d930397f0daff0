"""Retrieval metrics: similarities (or embeddings) and relevance in, ranks and recall@k out. NumPy only.

A query counts as answered at k when any relevant item is among its k best, as in Chinese-CLIP's evaluation.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
BoolArray = npt.NDArray[np.bool_]
# Similarities held at a time, whatever the sets' sizes: with what ranking them needs, about 13 bytes each.
BLOCK_SCORES = 1 << 24


def first_relevant_rank(scores: FloatArray, relevant: BoolArray) -> npt.NDArray[np.int64]:
    """Rank of each query's best relevant item: int64 (Q,), 0 is the top; N where nothing is relevant.

    Of equal scores the item with the lower index comes first.

    Args:
        scores: (Q, N) similarities, higher is closer.
        relevant: (Q, N) bool.
    Raises:
        ValueError: the shapes differ.
    """
    if scores.shape != relevant.shape:
        raise ValueError(f"scores {scores.shape} and relevant {relevant.shape} differ in shape")
    masked = np.where(relevant, scores, -np.inf)
    best = masked.argmax(axis=1)  # the first of equal scores
    best_score = masked[np.arange(len(masked)), best][:, None]
    earlier = np.arange(scores.shape[1])[None, :] < best[:, None]
    ranks = ((scores > best_score) | ((scores == best_score) & earlier)).sum(axis=1)
    return np.where(relevant.any(axis=1), ranks, scores.shape[1]).astype(np.int64)


def first_relevant_ranks(
    query_embeds: FloatArray, item_embeds: FloatArray, relevant: Sequence[Sequence[int]], max_scores: int = BLOCK_SCORES
) -> npt.NDArray[np.int64]:
    """`first_relevant_rank` by dot products, a block of queries at a time: memory does not grow with Q * N.

    Args:
        query_embeds: (Q, D).
        item_embeds: (N, D).
        relevant: for each query the indices of its relevant items.
        max_scores: of a block.
    """
    num_items = len(item_embeds)
    rows = max(1, max_scores // max(1, num_items))
    ranks = np.full(len(query_embeds), num_items, np.int64)
    for start in range(0, len(query_embeds), rows):
        scores = query_embeds[start : start + rows] @ item_embeds.T
        of_block = np.zeros(scores.shape, np.bool_)
        for row, items in enumerate(relevant[start : start + rows]):
            of_block[row, list(items)] = True
        ranks[start : start + rows] = first_relevant_rank(scores, of_block)
    return ranks


def recall_at_k(scores: FloatArray, relevant: BoolArray, k: int) -> float:
    """Fraction of queries with a relevant item among the k best.

    Args:
        scores: (Q, N) similarities, higher is closer.
        relevant: (Q, N) bool.
    Raises:
        ValueError: k is outside 1..N, or the shapes differ.
    """
    return recalls(scores, relevant, (k,))[0]


def recalls(scores: FloatArray, relevant: BoolArray, ks: Sequence[int] = (1, 5, 10)) -> list[float]:
    """recall@k for several k at the cost of one ranking; see `recall_at_k`."""
    return recalls_of_ranks(first_relevant_rank(scores, relevant), scores.shape[1], ks)


def recalls_of_ranks(ranks: npt.NDArray[np.int64], num_items: int, ks: Sequence[int] = (1, 5, 10)) -> list[float]:
    """recall@k for several k of ranks (Q,) among `num_items` items.

    Raises:
        ValueError: a k is outside 1..num_items.
    """
    for k in ks:
        if not 1 <= k <= num_items:
            raise ValueError(f"k is {k}, expected 1..{num_items}, the number of items")
    return [float((ranks < k).mean()) for k in ks]
