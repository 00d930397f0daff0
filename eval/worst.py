"""The queries a model answers worst, and what it found instead: what a person should look at first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eval.retrieval import Direction, EmbeddedPairs


@dataclass(frozen=True)
class Found:
    """One item of an answer, as an index, and its cosine with the query."""

    item: int
    cosine: float


@dataclass(frozen=True)
class Miss:
    """A query whose right answer came late.

    Attributes:
        query: index into the texts, or into the pictures.
        rank: of the best right answer, 1 is the top.
        right: that answer.
        found: the best of all, best first.
    """

    query: int
    rank: int
    right: Found
    found: tuple[Found, ...]


def worst_misses(embedded: EmbeddedPairs, direction: Direction, count: int, top: int = 3) -> list[Miss]:
    """At most `count` queries whose best item is not a right one, the worst rank first, with the `top` items found."""
    ranks = embedded.ranks[direction]
    order = np.argsort(-ranks, kind="stable")[:count]
    return [_miss(embedded, direction, int(row), top) for row in order if ranks[row] > 0]


def _miss(embedded: EmbeddedPairs, direction: Direction, row: int, top: int) -> Miss:
    chosen = embedded.chosen
    if direction == "text_to_image":
        query, relevant, embeds = row, chosen.images_of_text[row], embedded.text_embeds[row]
    else:
        query = chosen.asking_images[row]
        relevant, embeds = chosen.texts_of_image[query], embedded.image_embeds[query]
    cosines = embedded.items(direction) @ embeds
    right = max(relevant, key=lambda item: (cosines[item], -item))
    best = np.argsort(-cosines, kind="stable")[:top]
    return Miss(
        query,
        int(embedded.ranks[direction][row]) + 1,
        Found(right, float(cosines[right])),
        tuple(Found(int(item), float(cosines[item])) for item in best),
    )
