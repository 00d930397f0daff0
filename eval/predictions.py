"""Feature files -> top-k predictions -> recall: Chinese-CLIP's make_topk_predictions and evaluation, both directions.

    tuwen eval predict --image-features valid_imgs.img_feat.jsonl --text-features valid_texts.txt_feat.jsonl \\
        --out valid_predictions.jsonl
    tuwen eval score --annotations valid_texts.jsonl --predictions valid_predictions.jsonl

The queries are held in memory, the gallery is read a block at a time: its size is bound by patience alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.chinese_clip_files import (
    Answers,
    Direction,
    direction_of,
    read_annotations,
    read_predictions,
    write_answers,
)
from eval.faiss_search import FaissIndex
from eval.read_features import demand_one_model, iter_stored, read_stored
from tuwen.errors import InvalidInput
from tuwen.files import write_text
from tuwen.search import top_k

# What the published evaluation takes: exactly ten predictions, scored at these.
PUBLISHED_TOP_K = 10
RECALL_KS = (1, 5, 10)


@dataclass(frozen=True)
class Recalls:
    """recall@1, @5 and @10 as fractions of the queries, in one direction."""

    r1: float
    r5: float
    r10: float
    num_queries: int

    @property
    def mean_recall(self) -> float:
        return (self.r1 + self.r5 + self.r10) / 3

    def to_published_json(self) -> dict[str, Any]:
        """The object that the published evaluation writes, in percent."""
        score = self.mean_recall * 100
        figures = {
            "score": score,
            "mean_recall": score,
            "r1": self.r1 * 100,
            "r5": self.r5 * 100,
            "r10": self.r10 * 100,
        }
        return {"success": True, "score": score, "scoreJson": figures}


def predict(
    image_features: Path,
    text_features: Path,
    direction: Direction,
    out: Path,
    k: int = PUBLISHED_TOP_K,
    index: FaissIndex | None = None,
    on_items: Callable[[int], None] = lambda done: None,
) -> int:
    """Write the k best of each query, in the order of its feature file; returns the number of queries.

    Args:
        image_features, text_features: see `iter_stored`.
        index: of FAISS, for galleries that exact search takes too long on; None searches exactly.
        on_items: hears how many of the gallery have been searched.
    Raises:
        InvalidInput: a file is malformed, they are not of one model, or the gallery has fewer than k items.
    """
    demand_one_model(image_features, text_features)
    paths = {"image": image_features, "text": text_features}
    queries = read_stored(paths[direction.query], direction.query)
    item_ids: list[npt.NDArray[np.int64]] = []

    def gallery() -> Iterator[npt.NDArray[np.float32]]:
        for block in iter_stored(paths[direction.item], direction.item):
            item_ids.append(block.ids)
            yield block.embeds

    try:
        if index is None:
            _, found = top_k(queries.embeds, gallery(), k, on_items)
        else:
            _, found = index.top_k(queries.embeds, gallery(), k)
    except InvalidInput:
        raise
    except ValueError as error:
        raise InvalidInput(f"{paths[direction.item]}: {error}") from None
    answers = np.concatenate(item_ids)[found].tolist()
    write_answers(out, direction, zip(queries.ids.tolist(), answers, strict=True))
    return len(answers)


def score(annotations: Path, predictions: Path) -> Recalls:
    """Recall of a prediction file, in the direction it is of, as the published evaluation has it.

    A query without relevant items counts as not answered; predictions of queries that are not annotated do not count.

    Args:
        annotations: `{split}_texts.jsonl`, or its transform for image to text; the other direction's is turned round.
    Raises:
        InvalidInput: a file is malformed, or the predictions are not ten different items for every query.
    """
    direction = direction_of(predictions)
    relevant = read_annotations(annotations, direction)
    found = read_predictions(predictions, direction, PUBLISHED_TOP_K)
    _demand_all(relevant, found, direction, predictions)
    if not any(relevant.values()):
        raise InvalidInput(f"{annotations}: no query has an answer, as in a test split; there is nothing to score")
    r1, r5, r10 = (_recall(relevant, found, k) for k in RECALL_KS)
    return Recalls(r1, r5, r10, len(relevant))


def check_submission(queries: Path, predictions: Path) -> int:
    """Whether a leaderboard will take a prediction file: ten different items for each query, of the queries alone.

    MUGE takes the prediction file itself, of its test split, whose annotations hold queries without answers.

    Args:
        queries: the split's annotations; their answers may be empty.
    Returns:
        the number of queries.
    Raises:
        InvalidInput: it will not; the sentence says why.
    """
    direction = direction_of(predictions)
    if direction_of(queries) != direction:
        raise InvalidInput(f"{queries}: its queries are not those of {predictions}, which has {direction.query_field}")
    asked = read_annotations(queries, direction)
    found = read_predictions(predictions, direction, PUBLISHED_TOP_K)
    _demand_all(asked, found, direction, predictions)
    if unasked := next((query_id for query_id in found if query_id not in asked), None):
        raise InvalidInput(f"{predictions}: {direction.query_field} {unasked} is not among the queries of {queries}")
    return len(found)


def write_published_json(path: Path, recalls: Recalls) -> None:
    """Write the file that the published evaluation writes, atomically."""
    write_text(path, json.dumps(recalls.to_published_json()))


def write_published_failure(path: Path, error: InvalidInput) -> None:
    """What the published evaluation writes where it cannot score: no figures of an earlier run are left to be read."""
    failure = {"errorDetail": str(error), "errorMsg": str(error), "score": 0, "scoreJson": {}, "success": False}
    write_text(path, json.dumps(failure))


def _demand_all(asked: Answers, found: Answers, direction: Direction, predictions: Path) -> None:
    missing = [query_id for query_id in asked if query_id not in found]
    if missing:
        raise InvalidInput(
            f"{predictions}: {len(missing)} of {len(asked)} queries have no prediction, "
            f"{direction.query_field} {missing[0]} the first"
        )


def _recall(relevant: Answers, found: Answers, k: int) -> float:
    return sum(_is_found(items, found[query_id][:k]) for query_id, items in relevant.items()) / len(relevant)


def _is_found(relevant: Sequence[int], found: Sequence[int]) -> bool:
    return not set(relevant).isdisjoint(found)
