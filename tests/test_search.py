"""Exact search against a plain sort, however the sets are cut into blocks."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tuwen.search
from tuwen.retrieval import first_relevant_ranks
from tuwen.search import top_k


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 queries by 3 and then at most 8 items."""
    monkeypatch.setattr(tuwen.search, "BLOCK_SCORES", 40)
    monkeypatch.setattr(tuwen.search, "_QUERY_ROWS", 5)
    monkeypatch.setattr(tuwen.search, "_FIRST_ITEM_ROWS", 3)
    monkeypatch.setattr(tuwen.search, "_EXACT_PAIRS", 4)


def unit(random: np.random.Generator, count: int, width: int) -> np.ndarray:
    rows = random.standard_normal((count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def by_sorting(queries: np.ndarray, items: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = (queries.astype(np.float64) @ items.astype(np.float64).T).astype(np.float32)
    indices = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, indices, axis=1), indices


@settings(max_examples=60)
@given(st.integers(1, 30), st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**31), st.booleans())
def test_the_best_equal_a_stable_sort(num_queries: int, num_items: int, k: int, seed: int, ties: bool) -> None:
    """Integers make many ties and exact sums; unit vectors none."""
    random = np.random.default_rng(seed)
    if ties:
        queries, items = (random.integers(-2, 3, (n, 4)).astype(np.float32) for n in (num_queries, num_items))
    else:
        queries, items = unit(random, num_queries, 16), unit(random, num_items, 16)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("BLOCK_SCORES", 40), ("_QUERY_ROWS", 5), ("_FIRST_ITEM_ROWS", 3)):
            patch.setattr(tuwen.search, name, value)
        scores, indices = top_k(queries, items, min(k, num_items))
    expected_scores, expected = by_sorting(queries, items, min(k, num_items))
    assert indices.tolist() == expected.tolist()
    assert np.array_equal(scores, expected_scores)
    assert (scores.dtype, indices.dtype) == (np.float32, np.int64)


def test_blocks_of_full_size_find_the_same() -> None:
    random = np.random.default_rng(0)
    queries, items = unit(random, 1100, 24), unit(random, 5000, 24)
    scores, indices = top_k(queries, items, 10)
    expected_scores, expected = by_sorting(queries, items, 10)
    assert np.array_equal(indices, expected)
    assert np.array_equal(scores, expected_scores)


@pytest.mark.usefixtures("small_blocks")
def test_equal_items_tie_wherever_they_lie() -> None:
    """One picture under many ids: the lower index comes first, though BLAS gives other last bits at a block's edge."""
    random = np.random.default_rng(2)
    pictures = unit(random, 5, 512)
    items = pictures[np.arange(60) % 5]
    queries = unit(random, 11, 512)
    _, indices = top_k(queries, items, 24)
    nearest = indices[:, 0]
    assert set(nearest.tolist()) <= set(range(5))
    assert np.array_equal(indices[:, :12], nearest[:, None] + 5 * np.arange(12))
    ranks = first_relevant_ranks(queries, items, [(int(first) + 20,) for first in nearest], max_scores=40)
    assert ranks.tolist() == [4] * 11


@pytest.mark.usefixtures("small_blocks")
def test_scores_closer_than_float32_adds_up_are_told_apart() -> None:
    """Steps of 1e-6 between terms that cancel: sums in float32 lose them, the ranking must not."""
    random = np.random.default_rng(0)
    large = random.uniform(1, 8, (32, 199)).astype(np.float32)
    steps = np.float32(2.0**-20) * random.permutation(32).astype(np.float32)
    items = np.concatenate([large, np.full((32, 1), 0.25, np.float32), -large[:, ::-1], steps[:, None]], axis=1)
    queries = np.ones((2, items.shape[1]), np.float32)
    _, indices = top_k(queries, items, 32)
    expected = np.argsort(-steps, kind="stable")
    assert indices.tolist() == [expected.tolist()] * 2
    in_float32 = np.argsort(-(queries @ items.T)[0], kind="stable")
    assert in_float32.tolist() != expected.tolist()  # else nothing is tested
    ranks = first_relevant_ranks(queries, items, [(int(expected[7]),), (int(expected[20]), int(expected[30]))])
    assert ranks.tolist() == [7, 20]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("k", [1, 10, 100])
def test_a_collapsed_model_is_ranked_too(k: int) -> None:
    """All vectors nearly or quite the same, so that no bound rules anything out."""
    random = np.random.default_rng(3)
    base = unit(random, 1, 64)
    items = base + random.standard_normal((100, 64)).astype(np.float32) * np.float32(1e-6)
    queries = np.concatenate([base, items[:6]])
    assert np.array_equal(top_k(queries, items, k)[1], by_sorting(queries, items, k)[1])
    same = np.repeat(base, 100, axis=0)
    assert top_k(base, same, k)[1].tolist() == [list(range(k))]
    assert first_relevant_ranks(base, same, [(70, 40)]).tolist() == [40]


@pytest.mark.usefixtures("small_blocks")
def test_items_may_come_in_blocks_or_from_a_memory_map(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    queries, items = unit(random, 7, 8), unit(random, 50, 8).astype(np.float16)
    expected = by_sorting(queries, items.astype(np.float32), 6)[1]
    np.save(tmp_path / "items.npy", items)
    mapped = np.load(tmp_path / "items.npy", mmap_mode="r")
    for form in (items, mapped, iter([items[:1], items[1:1], items[1:30], items[30:]])):
        heard: list[int] = []
        assert np.array_equal(top_k(queries, form, 6, heard.append)[1], expected)
        assert heard == sorted(set(heard))
        assert heard[-1] == 50
    assert first_relevant_ranks(queries, mapped, expected[:, 3:4].tolist()).tolist() == [3] * 7


def test_no_query_has_no_answers() -> None:
    scores, indices = top_k(np.zeros((0, 4), np.float32), np.ones((3, 4), np.float32), 2)
    assert scores.shape == indices.shape == (0, 2)


def test_what_cannot_be_ranked_is_refused() -> None:
    """k, widths, and values that are not finite."""
    ones = np.ones((5, 4), np.float32)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k is {k}, expected"):
            top_k(ones, ones, k)
    with pytest.raises(ValueError, match="queries have D = 4, items D = 3"):
        top_k(ones, ones[:, :3], 1)
    broken = ones.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match="embedding 3 holds a value that is not finite"):
        top_k(ones, broken, 1)


def test_memory_does_not_grow_with_the_gallery() -> None:
    """1,000 x 60,000 scores are 240 MB at once."""
    queries = unit(np.random.default_rng(5), 1000, 8)
    part = unit(np.random.default_rng(6), 5000, 8)
    tracemalloc.start()
    top_k(queries, (part * (1 + step / 100) for step in range(12)), 10)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 64 * 2**20
