"""The pictures that are searched, as vectors, and what is nearest to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Gallery:
    """Vectors of one model.

    Attributes:
        model: the name it is served under.
        fingerprint: its identity.
        indices: int64 (M,), rising: which picture each vector is of. Pictures that were refused have none.
        image_embeds: float32 (M, D), unit length.
        tags: names that a picture can be given.
        tag_embeds: float32 (T, D), unit length.
    """

    model: str
    fingerprint: int
    indices: Indices
    image_embeds: Rows
    tags: Sequence[str]
    tag_embeds: Rows

    def nearest(self, vector: Rows, limit: int) -> list[tuple[int, float]]:
        """Picture and cosine of the best matches, best first."""
        return [(int(self.indices[row]), cosine) for row, cosine in best_rows(self.image_embeds @ vector, limit)]

    def nearest_tags(self, vector: Rows, limit: int) -> list[tuple[str, float]]:
        """The names that fit a vector best, with cosine."""
        return [(self.tags[row], cosine) for row, cosine in best_rows(self.tag_embeds @ vector, limit)]

    def vector_of(self, index: int) -> Rows | None:
        """float32 (D,) of a picture; None where it has none."""
        row = int(np.searchsorted(self.indices, index))
        is_there = row < len(self.indices) and self.indices[row] == index
        return self.image_embeds[row] if is_there else None


def best_rows(scores: Rows, limit: int) -> list[tuple[int, float]]:
    """Rows of the highest scores, falling; of equal ones the lower row first."""
    if limit < len(scores):
        threshold = np.partition(scores, -limit)[-limit]
        candidates = np.flatnonzero(scores >= threshold)  # rising, and ties at the threshold all in it
    else:
        candidates = np.arange(len(scores))
    order = candidates[np.argsort(-scores[candidates], kind="stable")[:limit]]
    return [(int(row), float(scores[row])) for row in order]
