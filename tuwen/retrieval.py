"""Retrieval metrics: similarities and relevance in, ranks and recall@k out. NumPy only.

A query counts as answered at k when any relevant item is among its k best, as in Chinese-CLIP's evaluation.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

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
    for k in ks:
        if not 1 <= k <= scores.shape[1]:
            raise ValueError(f"k is {k}, expected 1..{scores.shape[1]}, the number of items")
    ranks = first_relevant_rank(scores, relevant)
    return [float((ranks < k).mean()) for k in ks]
