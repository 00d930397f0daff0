"""Retrieval metrics: similarities (or embeddings) and relevance in, ranks and recall@k out. NumPy only.

A query counts as answered at k when any relevant item is among its k best, as in Chinese-CLIP's evaluation.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tuwen.search import BLOCK_SCORES, best_scores_of, count_better

FloatArray = npt.NDArray[np.floating]
BoolArray = npt.NDArray[np.bool_]


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
    """`first_relevant_rank` by dot products, in blocks of queries and items: memory does not grow with Q * N.

    Exact as `tuwen.search` is: equal vectors tie.

    Args:
        query_embeds: (Q, D).
        item_embeds: (N, D), a memory map too.
        relevant: for each query the indices of its relevant items.
        max_scores: of a block.
    Raises:
        InvalidInput: an embedding is not finite.
    """
    lengths = [len(items) for items in relevant]
    query_rows = np.repeat(np.arange(len(relevant)), lengths)
    item_rows = np.fromiter((item for items in relevant for item in items), np.int64, sum(lengths))
    scores, best = best_scores_of(query_embeds, item_embeds, query_rows, item_rows)
    ranks = count_better(query_embeds, item_embeds, scores, best, max_scores)
    return np.where(best < 0, len(item_embeds), ranks)


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
