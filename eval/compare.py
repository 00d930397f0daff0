"""Two engines, the same pairs: are they the same model to those who ask? The acceptance test of a deployment.

tuwen eval compare torch:samples/emoji_tiny triton:localhost:8001 --data samples/emoji_cn
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.retrieval import DIRECTIONS, Direction, EmbeddedPairs, Embeddings, RetrievalResult
from tuwen.errors import InvalidInput, TuwenError

MIN_COSINE = 0.999  # what int8 towers are held to as well, see builders/quantize.py
MAX_RECALL_DIFFERENCE = 0.005
TOP_K = 10
# Similarities held at a time. Finding a top-k set takes some 20 bytes of each.
_BLOCK_SCORES = 1 << 22
_METRICS = ("r1", "r5", "r10", "mean_recall", "median_rank", "mean_rank")


class EnginesDiffer(TuwenError):
    """Two engines are further apart than allowed; the sentence says in what."""


@dataclass(frozen=True)
class CosineSpread:
    """Cosines between the two embeddings of each item: the worst, percentiles from below, and the mean."""

    min: float
    p1: float
    p5: float
    median: float
    mean: float

    @classmethod
    def of(cls, one: Embeddings, other: Embeddings) -> CosineSpread:
        """Of (N, D) and (N, D), row by row.

        Raises:
            InvalidInput: the shapes differ, so the two are not one model.
        """
        if one.shape != other.shape:
            raise InvalidInput(f"embeddings are {one.shape} and {other.shape}: these are two different models")
        a, b = one.astype(np.float64), other.astype(np.float64)
        with np.errstate(invalid="ignore"):  # an embedding of length 0 has no direction: NaN, which agrees with nothing
            cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        least, p1, p5, median = map(float, np.percentile(cosines, (0, 1, 5, 50)))
        return cls(least, p1, p5, median, float(cosines.mean()))


@dataclass(frozen=True)
class DirectionDifference:
    """How differently the two answer, in one direction.

    Attributes:
        same_top_1, same_top_10: share of queries with the same best item, and with the same ten best in any order.
        same_rank: share of queries whose best right answer stands at the same place.
        differences: metric -> the second engine's figure less the first's.
    """

    same_top_1: float
    same_top_10: float
    same_rank: float
    differences: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Everything that was measured of two engines on the same pairs."""

    one: RetrievalResult
    other: RetrievalResult
    image_cosine: CosineSpread
    text_cosine: CosineSpread
    text_to_image: DirectionDifference
    image_to_text: DirectionDifference

    @property
    def is_same_model(self) -> bool:
        return self.one.fingerprint == self.other.fingerprint

    @property
    def min_cosine(self) -> float:
        # Not min(), which passes over a NaN.
        return float(np.min([self.image_cosine.min, self.text_cosine.min]))

    @property
    def max_recall_difference(self) -> float:
        """The largest change of a recall@k, up or down."""
        ways = (self.text_to_image, self.image_to_text)
        return float(np.max([abs(way.differences[metric]) for way in ways for metric in ("r1", "r5", "r10")]))

    def of(self, direction: Direction) -> DirectionDifference:
        return self.text_to_image if direction == "text_to_image" else self.image_to_text

    def to_json(self) -> dict[str, Any]:
        """As `tuwen eval compare --json` prints it."""
        return asdict(self) | {
            "is_same_model": self.is_same_model,
            "min_cosine": self.min_cosine,
            "max_recall_difference": self.max_recall_difference,
        }


def compare(one: tuple[RetrievalResult, EmbeddedPairs], other: tuple[RetrievalResult, EmbeddedPairs]) -> Comparison:
    """Two engines' results and embeddings of the same pairs, as `evaluate_retrieval` gives them.

    Raises:
        InvalidInput: the pairs differ, or the embeddings have different lengths.
    """
    (result, embedded), (other_result, other_embedded) = one, other
    if embedded.chosen != other_embedded.chosen:
        raise InvalidInput("the two engines embedded different pairs, so they cannot be compared")
    return Comparison(
        result,
        other_result,
        CosineSpread.of(embedded.image_embeds, other_embedded.image_embeds),
        CosineSpread.of(embedded.text_embeds, other_embedded.text_embeds),
        *(_direction_difference(direction, one, other) for direction in DIRECTIONS),
    )


def check_agreement(
    comparison: Comparison, min_cosine: float = MIN_COSINE, max_recall_difference: float = MAX_RECALL_DIFFERENCE
) -> None:
    """Whether the second may stand in for the first.

    Raises:
        EnginesDiffer: a cosine is below `min_cosine`, or a recall differs by more than `max_recall_difference`.
    """
    found = []
    # Written so that a NaN fails.
    if not comparison.min_cosine >= min_cosine:
        found.append(f"the worst cosine is {comparison.min_cosine:.6f}, expected at least {min_cosine:g}")
    if not comparison.max_recall_difference <= max_recall_difference:
        found.append(
            f"a recall differs by {comparison.max_recall_difference:.4f}, expected at most {max_recall_difference:g}"
        )
    if found:
        raise EnginesDiffer(f"the two engines differ: {'; '.join(found)}")


def _direction_difference(
    direction: Direction,
    one: tuple[RetrievalResult, EmbeddedPairs],
    other: tuple[RetrievalResult, EmbeddedPairs],
) -> DirectionDifference:
    (result, embedded), (other_result, other_embedded) = one, other
    before, after = result.of(direction), other_result.of(direction)
    top_1, top_10 = same_top(
        (embedded.queries(direction), embedded.items(direction)),
        (other_embedded.queries(direction), other_embedded.items(direction)),
    )
    return DirectionDifference(
        top_1,
        top_10,
        same_rank=float((embedded.ranks[direction] == other_embedded.ranks[direction]).mean()),
        differences={metric: getattr(after, metric) - getattr(before, metric) for metric in _METRICS},
    )


def same_top(
    one: tuple[Embeddings, Embeddings], other: tuple[Embeddings, Embeddings], k: int = TOP_K
) -> tuple[float, float]:
    """Shares of queries with the same best item, and with the same set of `k` best; of equals the first counts.

    Args:
        one, other: queries (Q, D) and items (N, D) of each.
    """
    (queries, items), (other_queries, other_items) = one, other
    rows = max(1, _BLOCK_SCORES // len(items))
    same_first = same_set = 0
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        scores, other_scores = queries[block] @ items.T, other_queries[block] @ other_items.T
        same_first += int((scores.argmax(axis=1) == other_scores.argmax(axis=1)).sum())
        same_set += int((_is_top(scores, k) == _is_top(other_scores, k)).all(axis=1).sum())
    return same_first / len(queries), same_set / len(queries)


def _is_top(scores: Embeddings, k: int) -> npt.NDArray[np.bool_]:
    """bool (Q, N): the k best of each row; of equal scores the lower index, as ranks have it."""
    k = min(k, scores.shape[1])
    least = np.partition(scores, -k, axis=1)[:, -k, None]
    above, equal = scores > least, scores == least
    room = k - above.sum(axis=1, keepdims=True)
    top: npt.NDArray[np.bool_] = above | (equal & (equal.cumsum(axis=1) <= room))
    return top
