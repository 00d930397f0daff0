"""Retrieval over a set of pairs, text to image and image to text: an engine, or stored embeddings -> figures.

tuwen eval retrieval --checkpoint samples/emoji_tiny --data samples/emoji_cn
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eval.engine import Engine, EngineKind, Row, Unusable
from eval.published import PublishedRecall, load_published, published_model
from tuwen.data.pairs import PairSet
from tuwen.embed import RECALL_KS, RetrievalSet
from tuwen.errors import InvalidInput
from tuwen.retrieval import recalls_of_ranks

Direction = Literal["text_to_image", "image_to_text"]
DIRECTIONS: tuple[Direction, ...] = ("text_to_image", "image_to_text")
Embeddings = npt.NDArray[np.float32]
Ranks = npt.NDArray[np.int64]
Progress = Callable[[int, int, str], None]

_SHOWN_CHARACTERS = 20  # of a text in an error: enough to find it


@dataclass(frozen=True)
class DirectionScores:
    """One direction: recall@1, @5 and @10 as fractions, and where the best right answer of a query stands.

    Attributes:
        median_rank, mean_rank: 1 is the top.
        num_items: what each query is asked of.
    """

    r1: float
    r5: float
    r10: float
    mean_recall: float
    median_rank: float
    mean_rank: float
    num_queries: int
    num_items: int

    @classmethod
    def of(cls, ranks: Ranks, num_items: int) -> DirectionScores:
        """Of ranks (Q,) from 0."""
        r1, r5, r10 = recalls_of_ranks(ranks, num_items, RECALL_KS)
        places = ranks + 1
        median, mean = float(np.median(places)), float(places.mean())
        return cls(r1, r5, r10, (r1 + r5 + r10) / 3, median, mean, len(ranks), num_items)


@dataclass(frozen=True)
class RetrievalResult:
    """The figures of one engine on one split.

    Attributes:
        architecture: of the model, or the name it is served under.
        fingerprint: None for stored embeddings that do not say whose they are.
    """

    engine: EngineKind | Literal["features"]
    architecture: str
    fingerprint: int | None
    data: str
    split: str
    num_images: int
    num_texts: int
    text_to_image: DirectionScores
    image_to_text: DirectionScores

    def to_json(self) -> dict[str, Any]:
        """As `tuwen eval retrieval --json` prints it."""
        return asdict(self)

    def of(self, direction: Direction) -> DirectionScores:
        return self.text_to_image if direction == "text_to_image" else self.image_to_text


@dataclass(frozen=True, eq=False)
class EmbeddedPairs:
    """A set of pairs, and what one model makes of it.

    Attributes:
        image_embeds: (N, D), in the order of `chosen.image_ids`.
        text_embeds: (T, D), in the order of `chosen.texts`.
    """

    chosen: RetrievalSet
    image_embeds: Embeddings
    text_embeds: Embeddings

    def __post_init__(self) -> None:
        """Raises InvalidInput where the arrays do not fit: a NaN beats nothing, and would count as found."""
        for what, embeds, number in (
            ("pictures", self.image_embeds, len(self.chosen.image_ids)),
            ("texts", self.text_embeds, len(self.chosen.texts)),
        ):
            if embeds.ndim != 2 or len(embeds) != number:
                raise InvalidInput(f"embeddings of {what} are {embeds.shape}, expected one row for each of {number}")
            if not np.isfinite(embeds).all():
                raise InvalidInput(f"embeddings of {what} hold something that is no finite number")
        if self.image_embeds.shape[1] != self.text_embeds.shape[1]:
            raise InvalidInput(
                f"pictures have {self.image_embeds.shape[1]} dimensions, texts {self.text_embeds.shape[1]}: they are "
                "not of one model"
            )

    @cached_property
    def ranks(self) -> dict[Direction, Ranks]:
        """Rank from 0 of each query's best right answer; see `RetrievalSet.ranks`."""
        found = self.chosen.ranks(self.image_embeds, self.text_embeds)
        return {direction: found[direction] for direction in DIRECTIONS}

    def queries(self, direction: Direction) -> Embeddings:
        """(Q, D), in the order of `ranks`."""
        if direction == "text_to_image":
            return self.text_embeds
        return self.image_embeds[list(self.chosen.asking_images)]

    def items(self, direction: Direction) -> Embeddings:
        """(N, D) of what is asked for."""
        return self.image_embeds if direction == "text_to_image" else self.text_embeds

    def scores(self, direction: Direction) -> DirectionScores:
        return DirectionScores.of(self.ranks[direction], len(self.items(direction)))


def embed_pairs(
    engine: Engine, pairs: PairSet, on_progress: Progress = lambda done, total, what: None
) -> EmbeddedPairs:
    """Embed a whole set.

    Args:
        on_progress: hears (done, total, "pictures" or "texts").
    Raises:
        InvalidInput: as `RetrievalSet.of`; or an item cannot be embedded, which the sentence names: a figure over the
            rest would be one over another set.
    """
    chosen = RetrievalSet.of(pairs)
    encoded = (pairs.image_bytes(one) for one in chosen.image_ids)
    pictures = _usable_rows(
        engine.embed_images(encoded), lambda index: f"picture {chosen.image_ids[index]}",
        lambda done: on_progress(done, len(chosen.image_ids), "pictures"),
    )  # fmt: skip
    image_embeds = _matrix(pictures, len(chosen.image_ids), engine.embed_dim)
    texts = _usable_rows(
        engine.embed_texts(chosen.texts), lambda index: f"text {chosen.texts[index][:_SHOWN_CHARACTERS]!r}",
        lambda done: on_progress(done, len(chosen.texts), "texts"),
    )  # fmt: skip
    return EmbeddedPairs(chosen, image_embeds, _matrix(texts, len(chosen.texts), engine.embed_dim))


def evaluate_retrieval(
    engine: Engine,
    pairs: PairSet,
    data: str,
    split: str,
    on_progress: Progress = lambda done, total, what: None,
) -> tuple[RetrievalResult, EmbeddedPairs]:
    """Both directions over a set of pairs, and the embeddings they were found by.

    Args:
        data, split: names, for the result.
    Raises:
        InvalidInput: as `embed_pairs`.
    """
    embedded = embed_pairs(engine, pairs, on_progress)
    return _result(embedded, engine.kind, engine.model_name, engine.fingerprint, data, split), embedded


def score_stored(
    pairs: PairSet,
    images: tuple[Iterable[int], Embeddings],
    texts: tuple[Iterable[int], Embeddings],
    model: str,
    data: str,
    split: str,
    fingerprint: int | None = None,
) -> tuple[RetrievalResult, EmbeddedPairs]:
    """The same figures of embeddings that were stored, in whatever order.

    Args:
        images: image ids, and rows (N, D) in their order; ids that the set does not hold take no part.
        texts: text ids, and rows (T, D) in their order.
        model: a name for the result.
    Raises:
        InvalidInput: as `RetrievalSet.of`; an item of the set has no row; or the rows do not fit each other.
    """
    chosen = RetrievalSet.of(pairs)
    text_ids = [record.text_id for record in pairs.texts if record.image_ids]  # as RetrievalSet chooses them
    embedded = EmbeddedPairs(chosen, _picked("picture", chosen.image_ids, *images), _picked("text", text_ids, *texts))
    return _result(embedded, "features", model, fingerprint, data, split), embedded


def published_beside(result: RetrievalResult) -> dict[str, dict[Direction, PublishedRecall]]:
    """Published rows that ours may be held beside: name of the row -> direction -> figures.

    Empty unless the model has a published architecture and the data folder is named for a published set, such as MUGE,
    Flickr30k-CN or COCO-CN, and the split is the one they used.
    """
    found: dict[str, dict[Direction, PublishedRecall]] = {}
    for one in load_published().retrieval:
        is_this_set = _plain(one.data) == _plain(Path(result.data).resolve().name) and one.split == result.split
        if is_this_set and one.model == published_model(result.architecture):
            found.setdefault(f"published, {one.setup.replace('_', '-')}", {})[one.direction] = one
    return found


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _result(
    embedded: EmbeddedPairs,
    engine: EngineKind | Literal["features"],
    model: str,
    fingerprint: int | None,
    data: str,
    split: str,
) -> RetrievalResult:
    chosen = embedded.chosen
    scores = (embedded.scores(direction) for direction in DIRECTIONS)
    return RetrievalResult(engine, model, fingerprint, data, split, len(chosen.image_ids), len(chosen.texts), *scores)


def _picked(what: str, wanted: Iterable[int], ids: Iterable[int], embeds: Embeddings) -> Embeddings:
    """Rows of the ids wanted, in their order."""
    row_of = {one: row for row, one in enumerate(ids)}
    if len(row_of) != len(embeds):
        raise InvalidInput(f"{what}s: {len(row_of)} different ids for {len(embeds)} embeddings")
    try:
        return embeds[[row_of[one] for one in wanted]]
    except KeyError as error:
        raise InvalidInput(f"{what} {error.args[0]} has no embedding") from None


def _usable_rows(
    rows: Iterable[Row | Unusable], name: Callable[[int], str], on_row: Callable[[int], None]
) -> Iterator[Row]:
    for index, row in enumerate(rows):
        if isinstance(row, Unusable):
            raise InvalidInput(f"{name(index)}: {row}")
        yield row
        on_row(index + 1)


def _matrix(rows: Iterable[Row], number: int, embed_dim: int) -> Embeddings:
    """(N, D), filled as the rows come, so that they are held once."""
    matrix = np.empty((number, embed_dim), np.float32)
    for target, row in zip(matrix, rows, strict=True):
        target[:] = row
    return matrix
