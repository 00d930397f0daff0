"""Recall and ranks against a plain sort."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuwen.errors import InvalidInput
from tuwen.retrieval import first_relevant_rank, first_relevant_ranks, recall_at_k, recalls


def ranks_by_sorting(scores: np.ndarray, relevant: np.ndarray) -> list[int]:
    ranks = []
    for row, truth in zip(scores, relevant, strict=True):
        order = np.argsort(-row, kind="stable")
        hits = np.flatnonzero(truth[order])
        ranks.append(int(hits[0]) if len(hits) else scores.shape[1])
    return ranks


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**31))
def test_ranks_equal_a_stable_sort_with_ties(queries: int, items: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (queries, items)).astype(np.float32)  # many ties
    relevant = rng.random((queries, items)) < 0.3
    assert first_relevant_rank(scores, relevant).tolist() == ranks_by_sorting(scores, relevant)


def test_recall_counts_a_query_once_however_many_of_its_items_are_found() -> None:
    scores = np.array([[0.9, 0.8, 0.1], [0.1, 0.2, 0.9]])
    relevant = np.array([[True, True, False], [True, False, False]])
    assert recall_at_k(scores, relevant, 1) == 0.5
    assert recalls(scores, relevant, (1, 2, 3)) == [0.5, 0.5, 1.0]


def test_a_query_without_a_relevant_item_is_never_answered() -> None:
    assert recall_at_k(np.zeros((1, 4)), np.zeros((1, 4), bool), 4) == 0.0


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_gallery_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k is {k}, expected 1..3"):
        recall_at_k(np.zeros((2, 3)), np.zeros((2, 3), bool), k)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        first_relevant_rank(np.zeros((2, 3)), np.zeros((3, 2), bool))


@pytest.mark.parametrize("max_scores", [1, 12, 30, 1000])
def test_ranks_in_blocks_equal_those_of_the_whole_matrix(max_scores: int) -> None:
    """From one query at a time to all at once; integers, so that no rounding differs and many scores tie."""
    rng = np.random.default_rng(1)
    queries, items = (rng.integers(-2, 3, (count, 4)).astype(np.float32) for count in (23, 12))
    relevant = rng.random((23, 12)) < 0.1
    indices = [np.flatnonzero(row).tolist() for row in relevant]
    assert [] in indices
    ranks = first_relevant_ranks(queries, items, indices, max_scores)
    assert ranks.tolist() == ranks_by_sorting(queries @ items.T, relevant)


def test_large_sets_are_ranked_in_little_memory() -> None:
    """2,000 x 2,000 similarities are 16 MB at once, and 200 MB with what it takes to rank them where most tie."""
    embeds = np.eye(2000, 8, dtype=np.float32)
    tracemalloc.start()
    first_relevant_ranks(embeds, embeds, [(index,) for index in range(2000)], max_scores=25_000)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2 * 2**20


def test_a_query_that_is_not_finite_does_not_count_as_found() -> None:
    embeds = np.eye(4, dtype=np.float32)
    broken = embeds.copy()
    broken[2] = np.nan
    for queries, items in ((broken, embeds), (embeds, broken)):
        with pytest.raises(InvalidInput, match="embedding 2 holds a value that is not finite"):
            first_relevant_ranks(queries, items, [(index,) for index in range(4)])
