"""Palettes for weights in half precision: float16 weights -> 2^n values, and an index for each weight.

Lloyd's algorithm in one dimension. Half precision has 65,536 values, so that a tensor is its histogram, however large
it is. coremltools' own search is exact and takes 2 s a tensor, ten minutes for a large tower; this takes a hundredth of
that, for a squared error at most a seventh above (a test holds it to that).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# It has settled by then, on normal and on heavy-tailed weights.
_ITERATIONS = 60
_NUM_VALUES = 2**16

Half = npt.NDArray[np.float16]


def fit_palette(weights: Half, size: int) -> tuple[Half, npt.NDArray[np.uint8]]:
    """A palette (size,), ascending, and indices into it (N,) of the flattened weights; the squared error is small.

    Args:
        size: at most 256.
    """
    patterns = np.ascontiguousarray(weights, np.float16).reshape(-1).view(np.uint16)
    counts = np.bincount(patterns, minlength=_NUM_VALUES)
    present = np.flatnonzero(counts).astype(np.uint16)
    values = present.view(np.float16).astype(np.float64)
    order = np.argsort(values, kind="stable")
    present, values, counts = present[order], values[order], counts[present[order]]
    palette = np.sort(_centres(values, counts, size).astype(np.float16))
    middles = (palette[1:].astype(np.float64) + palette[:-1]) / 2
    index_of = np.zeros(_NUM_VALUES, np.uint8)
    index_of[present] = np.searchsorted(middles, values)
    return palette, index_of[patterns]


def _centres(values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.float64]:
    """(size,) of values (V,), ascending, that occur so often."""
    if len(values) <= size:
        return np.pad(values, (0, size - len(values)), mode="edge")
    # The best density of centres goes with the third root of the values' own (Panter and Dite, 1951): counts^1/3 over a
    # gap of its width. From there Lloyd's steps have not far to go.
    mass = np.cumsum(np.cbrt(counts * np.gradient(values) ** 2))
    centres = np.interp((np.arange(size) + 0.5) / size * mass[-1], mass, values)
    before = np.concatenate([np.zeros((1, 3)), np.cumsum(counts[:, None] * values[:, None] ** [0, 1, 2], axis=0)])
    for _ in range(_ITERATIONS):
        ends = np.concatenate([[0], np.searchsorted(values, (centres[1:] + centres[:-1]) / 2), [len(values)]])
        total, sum, squares = np.diff(before[ends], axis=0).T
        share = np.maximum(total, 1)
        centres = np.where(total > 0, sum / share, centres)
        # A centre in a gap of the tails has no values. It halves the cell with the largest error instead.
        error = squares - sum**2 / share
        if num_idle := int((total == 0).sum()):
            worst = np.argsort(error)[-num_idle:]
            spread = np.sqrt(error[worst] / share[worst])
            centres[total == 0] = centres[worst] + spread
            centres[worst] -= spread
            centres.sort()
    return centres
