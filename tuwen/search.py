"""Exact search by dot products, in blocks: embeddings in, the k best items of each query out. NumPy only.

    scores, indices = top_k(text_embeds, numpy.load("image_embeds.npy", mmap_mode="r"), 10)

A score is the dot product in float64, rounded to float32: equal vectors tie, whatever block they lie in. What BLAS
computes in float32 differs from it in the last bits, by block and by machine; it only rules out what cannot be among
the best, by a bound on its error. What is left, some k items a query and doubling of the gallery, is scored exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tuwen.errors import InvalidInput

FloatArray = npt.NDArray[np.floating]
Matrix = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# Scores held at a time, 16 MiB: BLAS runs at full speed, and choosing among them finds them in the last level of cache.
BLOCK_SCORES = 1 << 22
_QUERY_ROWS = 1024
# The first block is small: the threshold found in it spares the later ones most of their candidates.
_FIRST_ITEM_ROWS = 256
# Pairs scored exactly at a time: 2 x 4 MiB in float64 at D = 512.
_EXACT_PAIRS = 1024
# Where more than this share of a block is in doubt, one float64 product of the whole is cheaper than pair by pair.
_DENSE_SHARE = 1 / 16


def top_k(
    query_embeds: FloatArray,
    item_embeds: FloatArray | Iterable[FloatArray],
    k: int,
    on_items: Callable[[int], None] = lambda done: None,
) -> tuple[Matrix, Indices]:
    """The k items of highest score for each query: scores float32 (Q, k), falling, and indices int64 (Q, k).

    Of equal scores the item with the lower index comes first. Items are read once, in order, a block at a time.

    Args:
        query_embeds: (Q, D).
        item_embeds: (N, D), a memory map too; or blocks of it in order, (n, D) each.
        on_items: hears how many items have been searched.
    Raises:
        ValueError: k is outside 1..N, or the widths differ.
        InvalidInput: an embedding is not finite.
    """
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    queries = list(_query_blocks(query_embeds, _QUERY_ROWS))
    best = [_Best.none_yet(len(block.embeds), k) for block in queries]
    room = np.empty(BLOCK_SCORES, np.float32)
    num_items = 0
    for items in _item_blocks(item_embeds, max(k, _FIRST_ITEM_ROWS), BLOCK_SCORES // _QUERY_ROWS):
        for block, found in zip(queries, best, strict=True):
            _search_block(block, items, found, room)
        num_items = items.start + len(items.embeds)
        on_items(num_items)
    if num_items < k:
        raise ValueError(f"k is {k}, expected 1..{num_items}, the number of items")
    return (
        np.concatenate([np.empty((0, k), np.float32), *(found.scores for found in best)]),
        np.concatenate([np.empty((0, k), np.int64), *(found.indices for found in best)]),
    )


def best_scores_of(
    query_embeds: FloatArray, item_embeds: FloatArray, query_rows: Indices, item_rows: Indices
) -> tuple[Matrix, Indices]:
    """Each query's best among given pairs: score float32 (Q,) and item int64 (Q,); -inf and -1 where it has no pair.

    Of equal scores the lower index counts.

    Args:
        query_rows: (P,), indices of queries.
        item_rows: (P,), indices of items.
    """
    scores = np.full(len(query_embeds), -np.inf, np.float32)
    best = np.full(len(query_embeds), -1, np.int64)
    of_pairs = _exact_scores(query_embeds, item_embeds, query_rows, item_rows)
    order = np.lexsort((item_rows, -of_pairs, query_rows))
    rows, firsts = np.unique(query_rows[order], return_index=True)
    scores[rows], best[rows] = of_pairs[order[firsts]], item_rows[order[firsts]]
    return scores, best


def count_better(
    query_embeds: FloatArray,
    item_embeds: FloatArray,
    scores: Matrix,
    indices: Indices,
    block_scores: int = BLOCK_SCORES,
) -> Indices:
    """How many items come before a given one of each query: int64 (Q,), 0 where it is the best.

    Args:
        scores: (Q,), the score of each query's given item; one of -inf is not ranked, its count means nothing.
        indices: (Q,), the index of that item, which decides among equal scores.
        block_scores: scores held at a time, at 5 bytes each, or up to 55 where most of them tie.
    Raises:
        InvalidInput: an embedding is not finite.
    """
    counts = np.zeros(len(query_embeds), np.int64)
    query_rows = max(1, min(_QUERY_ROWS, block_scores))
    room = np.empty(block_scores, np.float32)
    blocks = list(_query_blocks(query_embeds, query_rows))
    for items in _item_blocks(item_embeds, block_scores, max(1, block_scores // query_rows)):
        for block in blocks:
            rows = slice(block.start, block.start + len(block.embeds))
            counts[rows] += _count_block(block, items, scores[rows], indices[rows], room)
    return counts


# --- a block ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Consecutive embeddings float32 (n, D), the index of the first, and their lengths float32 (n,)."""

    start: int
    embeds: Matrix
    norms: Matrix

    @classmethod
    def of(cls, start: int, embeds: FloatArray) -> _Block:
        rows = np.ascontiguousarray(embeds, np.float32)
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        if not np.isfinite(norms).all():
            # A NaN is neither above nor below: it would count as found.
            first = start + int(np.argmin(np.isfinite(norms)))
            raise InvalidInput(f"embedding {first} holds a value that is not finite")
        return cls(start, rows, norms)


@dataclass(frozen=True)
class _Best:
    """The best so far of a block of queries, each row falling; -inf and -1 where there are fewer than k."""

    scores: Matrix
    indices: Indices

    @classmethod
    def none_yet(cls, num_queries: int, k: int) -> _Best:
        return cls(np.full((num_queries, k), -np.inf, np.float32), np.full((num_queries, k), -1, np.int64))

    def add(self, rows: Indices, scores: Matrix, indices: Indices) -> None:
        """Take in candidates (C,), in any order; indices decide among equal scores."""
        k = self.scores.shape[1]
        touched, new_rows = np.unique(rows, return_inverse=True)
        all_rows = np.concatenate([np.repeat(np.arange(len(touched)), k), new_rows])
        all_scores = np.concatenate([self.scores[touched].ravel(), scores])
        all_indices = np.concatenate([self.indices[touched].ravel(), indices])
        order = np.lexsort((all_indices, -all_scores, all_rows))
        sizes = np.bincount(all_rows, minlength=len(touched))  # k at least, each row's own
        kept = order[((np.cumsum(sizes) - sizes)[:, None] + np.arange(k)).ravel()]
        self.scores[touched] = all_scores[kept].reshape(-1, k)
        self.indices[touched] = all_indices[kept].reshape(-1, k)


def _query_blocks(embeds: FloatArray, size: int) -> Iterator[_Block]:
    for start in range(0, len(embeds), size):
        yield _Block.of(start, embeds[start : start + size])


def _item_blocks(embeds: FloatArray | Iterable[FloatArray], first: int, largest: int) -> Iterator[_Block]:
    """Blocks of `first` items and then ever twice as many, up to `largest`."""
    done = 0
    for part in (embeds,) if isinstance(embeds, np.ndarray) else embeds:
        start = 0
        while start < len(part):
            size = min(largest, max(first, done))
            yield (block := _Block.of(done, part[start : start + size]))
            start, done = start + size, done + len(block.embeds)


def _search_block(queries: _Block, items: _Block, best: _Best, room: Matrix) -> None:
    products, error = _products(queries, items, room)
    k = best.scores.shape[1]
    threshold = best.scores[:, -1]
    if items.start >= k:
        floor = threshold - error
    elif products.shape[1] > k:  # nothing to compare with yet: with the k-th of this block, in error itself
        floor = np.partition(products, -k, axis=1)[:, -k] - 2 * error
    else:
        floor = np.full(len(products), -np.inf, np.float32)
    rows, columns, scores = _exact_where(products >= floor[:, None], queries, items)
    # An equal score does not enter: what is there has the lower index.
    enters = scores > threshold[rows]
    if enters.any():
        best.add(rows[enters], scores[enters], columns[enters] + items.start)


def _count_block(queries: _Block, items: _Block, scores: Matrix, indices: Indices, room: Matrix) -> Indices:
    """Items of this block that come before each query's own, of the given score and index."""
    products, error = _products(queries, items, room)
    above = products > (scores + error)[:, None]
    counts = above.sum(axis=1)
    doubtful = products >= (scores - error)[:, None]
    doubtful &= ~above
    rows, columns, exact = _exact_where(doubtful, queries, items)
    before = (exact > scores[rows]) | ((exact == scores[rows]) & (columns + items.start < indices[rows]))
    result: Indices = counts + np.bincount(rows[before], minlength=len(counts))
    return result


def _products(queries: _Block, items: _Block, room: Matrix) -> tuple[Matrix, Matrix]:
    """Scores (q, n) as BLAS has them in float32, in `room`; and for each query, by how much one may be off."""
    shape = (len(queries.embeds), len(items.embeds))
    width = queries.embeds.shape[1]
    if items.embeds.shape[1] != width:
        raise ValueError(f"queries have D = {width}, items D = {items.embeds.shape[1]}")
    products = np.matmul(queries.embeds, items.embeds.T, out=room[: shape[0] * shape[1]].reshape(shape))
    # A sum of D rounded products is off by at most D * 2^-24 * sum |a b|, in any order (Higham, Accuracy and Stability
    # of Numerical Algorithms, 3.1), and sum |a b| <= |a| |b|. The rest is for rounding in lengths and scores.
    error = queries.norms * np.float32(items.norms.max(initial=0) * (width + 8) * 2.0**-24)
    return products, error


def _exact_where(mask: BoolArray, queries: _Block, items: _Block) -> tuple[Indices, Indices, Matrix]:
    """Rows, columns and exact scores (C,) of the pairs of a block that are marked, rows rising."""
    flat = np.flatnonzero(mask)  # several times faster than nonzero
    rows, columns = np.divmod(flat, mask.shape[1])
    if len(flat) > mask.size * _DENSE_SHARE:
        whole = queries.embeds.astype(np.float64) @ items.embeds.astype(np.float64).T
        return rows, columns, whole.ravel()[flat].astype(np.float32)
    return rows, columns, _exact_scores(queries.embeds, items.embeds, rows, columns)


def _exact_scores(queries: FloatArray, items: FloatArray, rows: Indices, columns: Indices) -> Matrix:
    """Dot products of pairs in float64, rounded to float32 (P,)."""
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _EXACT_PAIRS):
        chosen = slice(start, start + _EXACT_PAIRS)
        # float32 first, as the products saw them; a product of two float32 is exact in float64.
        pairs = (
            part.astype(np.float32, copy=False).astype(np.float64)
            for part in (queries[rows[chosen]], items[columns[chosen]])
        )
        scores[chosen] = np.einsum("nd,nd->n", *pairs)
    return scores
