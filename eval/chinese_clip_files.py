"""Chinese-CLIP's evaluation files, in and out: features, top-k predictions, annotations of both directions.

    {split}_imgs.img_feat.jsonl    {"image_id": 1000002, "feature": [0.0198, ...]}
    {split}_texts.txt_feat.jsonl   {"text_id": 248816, "feature": [0.1314, ...]}
    predictions, text to image     {"text_id": 153915, "image_ids": [5791244, ...]}
    predictions, image to text     {"image_id": 977856234, "text_ids": [156914, ...]}
    annotations                    {split}_texts.jsonl, and {split}_texts.tr.jsonl of the other direction

What its scripts write is read, what is written its scripts read. A malformed line is one sentence with file and line.
"""

from __future__ import annotations

import array
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson

from tuwen.errors import InvalidInput
from tuwen.files import atomic_file

Matrix = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Kind = Literal["image", "text"]
# Query id -> ids of the other kind: answers, best first, or what is relevant.
Answers = Mapping[int, Sequence[int]]

_BLOCK_ROWS = 4096
_LARGEST_ID = 1 << 63


@dataclass(frozen=True)
class Direction:
    """What asks and what is asked for."""

    query: Kind
    item: Kind

    @property
    def query_field(self) -> str:
        return f"{self.query}_id"

    @property
    def items_field(self) -> str:
        return f"{self.item}_ids"


TEXT_TO_IMAGE = Direction("text", "image")
IMAGE_TO_TEXT = Direction("image", "text")


@dataclass(frozen=True)
class Features:
    """Ids int64 (N,), each once, and embeds float32 (N, D), in the order of the file."""

    ids: Ids
    embeds: Matrix


# --- features -----------------------------------------------------------------------------------------------


def read_features(path: Path, kind: Kind) -> Features:
    """All of a feature file: 4 * D bytes a line in memory.

    Raises:
        InvalidInput: as `iter_features`.
    """
    ids: list[Ids] = []
    embeds = np.empty((0, 0), np.float32)
    done = 0
    for block in iter_features(path, kind):
        if not done:
            embeds = np.empty(block.embeds.shape, np.float32)
        if done + len(block.ids) > len(embeds):
            # In place where the system can move pages: two copies of a large gallery are never held.
            embeds.resize((max(done + len(block.ids), done * 5 // 4), block.embeds.shape[1]), refcheck=False)
        embeds[done : done + len(block.ids)] = block.embeds
        ids.append(block.ids)
        done += len(block.ids)
    embeds.resize((done, embeds.shape[1]), refcheck=False)
    return Features(np.concatenate(ids), embeds)


def iter_features(path: Path, kind: Kind, block_rows: int = _BLOCK_ROWS) -> Iterator[Features]:
    """A feature file in blocks, in order.

    Raises:
        InvalidInput: the file is missing, empty or malformed; an id is there twice; a vector has another length than
            the first, or a value that is not a finite number.
    """
    field = f"{kind}_id"
    seen: set[int] = set()
    ids: list[int] = []
    vectors: list[Matrix] = []
    width = 0
    for where, record in _records(path):
        item_id = _id(record, field, where)
        if item_id in seen:
            raise InvalidInput(f"{where}: {field} {item_id} is there twice")
        seen.add(item_id)
        vector = _vector(record, where)
        width = width or len(vector)
        if len(vector) != width:
            raise InvalidInput(f"{where}: {len(vector)} values, the lines before have {width}")
        ids.append(item_id)
        vectors.append(vector)
        if len(ids) == block_rows:
            yield Features(np.array(ids, np.int64), np.stack(vectors))
            ids, vectors = [], []
    if ids:
        yield Features(np.array(ids, np.int64), np.stack(vectors))


def write_features(path: Path, kind: Kind, blocks: Iterable[Features]) -> None:
    """Write a feature file, atomically; each value as the shortest decimal that reads back as the same float32."""
    with atomic_file(path) as file:
        for block in blocks:
            for item_id, embed in zip(block.ids, block.embeds, strict=True):
                file.write(feature_line(kind, int(item_id), embed))


def feature_line(kind: Kind, item_id: int | str, embed: Matrix) -> bytes:
    """One line of a feature file, float32 (D,), with its newline."""
    values = orjson.dumps(np.ascontiguousarray(embed, np.float32), option=orjson.OPT_SERIALIZE_NUMPY)
    return b'{"%s_id": %s, "feature": %s}\n' % (kind.encode(), orjson.dumps(item_id), values)


def _vector(record: dict[str, Any], where: str) -> Matrix:
    values = record.get("feature")
    if not isinstance(values, list) or not values:
        raise InvalidInput(f"{where}: field 'feature' is missing or not a list of numbers")
    try:
        # array.array refuses texts and nested lists, which numpy would convert.
        vector = np.frombuffer(array.array("f", values), np.float32)
    except (TypeError, OverflowError):
        raise InvalidInput(f"{where}: feature holds something other than float32 numbers") from None
    if not np.isfinite(vector).all():
        raise InvalidInput(f"{where}: feature holds a number outside float32")
    return vector


# --- predictions and annotations ----------------------------------------------------------------------------


def direction_of(path: Path) -> Direction:
    """Which direction a file of predictions or annotations is of, by its first line.

    Raises:
        InvalidInput: it is of neither, or cannot be read.
    """
    where, record = next(_records(path))
    for direction in (TEXT_TO_IMAGE, IMAGE_TO_TEXT):
        if direction.query_field in record and direction.items_field in record:
            return direction
    raise InvalidInput(f"{where}: expected text_id and image_ids, or image_id and text_ids")


def read_answers(path: Path, direction: Direction) -> dict[int, list[int]]:
    """Predictions or annotations: query id -> item ids, in the order of the file.

    Raises:
        InvalidInput: the file is missing, empty or malformed, or a query is there twice.
    """
    answers: dict[int, list[int]] = {}
    for where, record in _records(path):
        query_id = _id(record, direction.query_field, where)
        if query_id in answers:
            raise InvalidInput(f"{where}: {direction.query_field} {query_id} is there twice")
        answers[query_id] = _ids(record, direction.items_field, where)
    return answers


def read_predictions(path: Path, direction: Direction, k: int) -> dict[int, list[int]]:
    """As `read_answers`, where each query has exactly k different items, as the published evaluation demands.

    Raises:
        InvalidInput: as `read_answers`; or a query has other than k items, or one twice.
    """
    predictions = read_answers(path, direction)
    for query_id, item_ids in predictions.items():
        query = f"{path}: {direction.query_field} {query_id}"
        if len(item_ids) != k:
            raise InvalidInput(f"{query} has {len(item_ids)} {direction.items_field}, expected {k}")
        if len(set(item_ids)) != k:
            raise InvalidInput(f"{query} has one of its {direction.items_field} twice")
    return predictions


def read_annotations(path: Path, direction: Direction) -> dict[int, list[int]]:
    """What is relevant to each query; a file of the other direction is turned round.

    Raises:
        InvalidInput: as `read_answers`.
    """
    found = direction_of(path)
    answers = read_answers(path, found)
    return answers if found == direction else reverse(answers)


def reverse(answers: Answers) -> dict[int, list[int]]:
    """Annotations of the other direction: item id -> its queries, both in order of appearance.

    Queries without items leave no trace, as in the published transform.
    """
    reversed_answers: dict[int, list[int]] = {}
    for query_id, item_ids in answers.items():
        for item_id in item_ids:
            reversed_answers.setdefault(item_id, []).append(query_id)
    return reversed_answers


def write_answers(path: Path, direction: Direction, answers: Iterable[tuple[int, Sequence[int]]]) -> None:
    """Write predictions or annotations, atomically, byte for byte as the published scripts do."""
    with atomic_file(path) as file:
        for query_id, item_ids in answers:
            line = json.dumps({direction.query_field: int(query_id), direction.items_field: [int(i) for i in item_ids]})
            file.write(line.encode() + b"\n")


# --- lines --------------------------------------------------------------------------------------------------


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(FILE:LINE, object) of every line that is not blank; orjson, five times faster than json on vectors."""
    found = False
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                found = True
                where = f"{path}:{number}"
                try:
                    record = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise InvalidInput(f"{where}: not valid JSON: {error}") from None
                if not isinstance(record, dict):
                    raise InvalidInput(f"{where}: a JSON {type(record).__name__}, expected an object")
                yield where, record
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    if not found:
        raise InvalidInput(f"{path}: empty, expected a record a line")


def _id(record: dict[str, Any], field: str, where: str) -> int:
    if field not in record:
        raise InvalidInput(f"{where}: field {field!r} is missing")
    value = record[field]
    if type(value) is not int or not -_LARGEST_ID <= value < _LARGEST_ID:  # isinstance would take true for 1
        raise InvalidInput(f"{where}: {field} is {str(value)[:20]!r}, expected an integer of 64 bits")
    return value


def _ids(record: dict[str, Any], field: str, where: str) -> list[int]:
    values = record.get(field)
    if not isinstance(values, list):
        raise InvalidInput(f"{where}: field {field!r} is missing or not a list")
    if not all(type(value) is int for value in values):
        raise InvalidInput(f"{where}: {field} holds something other than integers")
    return values
