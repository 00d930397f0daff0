"""Chinese-CLIP's files: read, written, and what is said of malformed ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from eval.chinese_clip_files import (
    IMAGE_TO_TEXT,
    TEXT_TO_IMAGE,
    Features,
    direction_of,
    iter_features,
    read_annotations,
    read_answers,
    read_features,
    read_predictions,
    reverse,
    write_answers,
    write_features,
)
from tuwen.errors import InvalidInput


def features(count: int, width: int = 7, seed: int = 0) -> Features:
    random = np.random.default_rng(seed)
    return Features(random.permutation(10 * count)[:count], random.standard_normal((count, width)).astype(np.float32))


@pytest.mark.parametrize("block_rows", [1, 4, 10, 100])
def test_features_come_back_bit_for_bit(tmp_path: Path, block_rows: int) -> None:
    path, written = tmp_path / "valid_imgs.img_feat.jsonl", features(20)
    values = written.embeds
    values[0, :5] = [1e-45, 3.4e38, -0.0, 1 / 3, 16777217]
    write_features(path, "image", [Features(written.ids[:3], values[:3]), Features(written.ids[3:], values[3:])])
    blocks = list(iter_features(path, "image", block_rows))
    assert [len(block.ids) for block in blocks[:-1]] == [block_rows] * (len(blocks) - 1)
    for found in (
        read_features(path, "image"),
        Features(*map(np.concatenate, zip(*map(astuple, blocks), strict=True))),
    ):
        assert np.array_equal(found.ids, written.ids)
        assert found.embeds.tobytes() == values.tobytes()
        assert found.embeds.dtype == np.float32


def astuple(block: Features) -> tuple[np.ndarray, np.ndarray]:
    return block.ids, block.embeds


def test_more_lines_than_a_block_are_read_whole(tmp_path: Path) -> None:
    """Across the growth of the array they are read into."""
    path, written = tmp_path / "texts.jsonl", features(20_000, width=2)
    write_features(path, "text", [written])
    found = read_features(path, "text")
    assert np.array_equal(found.ids, written.ids)
    assert np.array_equal(found.embeds, written.embeds)


def test_what_the_published_code_writes_is_read(tmp_path: Path) -> None:
    """json.dumps of doubles, 17 digits each; and what we write has its fields, in its order."""
    path, written = tmp_path / "features.jsonl", features(5)
    lines = [
        json.dumps({"text_id": int(one), "feature": row.tolist()})
        for one, row in zip(written.ids, written.embeds, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
    assert np.array_equal(read_features(path, "text").embeds, written.embeds)
    write_features(path, "text", [written])
    for line, expected in zip(path.read_text().splitlines(), lines, strict=True):
        assert list(json.loads(line)) == list(json.loads(expected))
        assert line.startswith('{"text_id": ')


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"image_id": 2, "feature": [0.1, 0.2]', ":2: not valid JSON"),
        ("[1, 2]", ":2: a JSON list, expected an object"),
        ('{"text_id": 2, "feature": [0.1, 0.2]}', ":2: field 'image_id' is missing"),
        ('{"image_id": "2", "feature": [0.1, 0.2]}', ":2: image_id is '2', expected an integer"),
        ('{"image_id": true, "feature": [0.1, 0.2]}', ":2: image_id is 'True', expected an integer"),
        ('{"image_id": 9223372036854775808, "feature": [0.1, 0.2]}', ":2: image_id is '9223372036854775808', expected"),
        ('{"image_id": 1, "feature": [0.1, 0.2]}', ":2: image_id 1 is there twice"),
        ('{"image_id": 2}', ":2: field 'feature' is missing or not a list"),
        ('{"image_id": 2, "feature": []}', ":2: field 'feature' is missing or not a list"),
        ('{"image_id": 2, "feature": "0.1"}', ":2: field 'feature' is missing or not a list"),
        ('{"image_id": 2, "feature": [0.1]}', ":2: 1 values, the lines before have 2"),
        ('{"image_id": 2, "feature": [0.1, "0.2"]}', ":2: feature holds something other than float32 numbers"),
        ('{"image_id": 2, "feature": [0.1, [0.2]]}', ":2: feature holds something other than float32 numbers"),
        ('{"image_id": 2, "feature": [0.1, null]}', ":2: feature holds something other than float32 numbers"),
        ('{"image_id": 2, "feature": [0.1, NaN]}', ":2: not valid JSON"),
        ('{"image_id": 2, "feature": [0.1, 1e39]}', ":2: feature holds"),
    ],
)
def test_a_malformed_feature_is_one_sentence(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "features.jsonl"
    path.write_text('{"image_id": 1, "feature": [0.1, 0.2]}\n' + line + "\n")
    with pytest.raises(InvalidInput) as error:
        read_features(path, "image")
    assert str(error.value).startswith(f"{path}{sentence}")
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none.jsonl: cannot be read: No such file"):
        read_features(tmp_path / "none.jsonl", "image")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(InvalidInput, match=r"blank.jsonl: empty"):
        read_answers(tmp_path / "blank.jsonl", TEXT_TO_IMAGE)


def test_answers_come_back_and_tell_their_direction(tmp_path: Path) -> None:
    for direction in (TEXT_TO_IMAGE, IMAGE_TO_TEXT):
        answers = {5: [3, 1, 2], 4: [], 1 << 62: [7]}
        write_answers(tmp_path / "some.jsonl", direction, answers.items())
        assert read_answers(tmp_path / "some.jsonl", direction) == answers
        assert direction_of(tmp_path / "some.jsonl") == direction
    (tmp_path / "some.jsonl").write_text('{"text_id": 1, "text": "猫"}\n')
    with pytest.raises(InvalidInput, match=r"some.jsonl:1: expected text_id and image_ids, or image_id and text_ids"):
        direction_of(tmp_path / "some.jsonl")


def test_annotations_are_turned_round_where_needed(tmp_path: Path) -> None:
    """A picture of two texts, a text of two pictures, a text of none; ids in order of appearance."""
    answers = {8: [30, 10], 5: [10], 7: []}
    assert reverse(answers) == {30: [8], 10: [8, 5]}
    path = tmp_path / "valid_texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text_id": t, "text": "猫", "image_ids": i}) + "\n" for t, i in answers.items())
    )
    assert read_annotations(path, TEXT_TO_IMAGE) == answers
    assert read_annotations(path, IMAGE_TO_TEXT) == reverse(answers)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text_id": 1, "image_ids": [1, 2]}', ":2: text_id 1 is there twice"),
        ('{"text_id": 2, "image_ids": 3}', ":2: field 'image_ids' is missing or not a list"),
        ('{"text_id": 2, "image_ids": [1, "2"]}', ":2: image_ids holds something other than integers"),
        ('{"text_id": 2, "image_ids": [1, 2.0]}', ":2: image_ids holds something other than integers"),
        ('{"text_id": 2, "image_ids": [1]}', ": text_id 2 has 1 image_ids, expected 2"),
        ('{"text_id": 2, "image_ids": [4, 4]}', ": text_id 2 has one of its image_ids twice"),
    ],
)
def test_malformed_predictions_are_one_sentence(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"text_id": 1, "image_ids": [1, 2]}\n' + line + "\n")
    with pytest.raises(InvalidInput) as error:
        read_predictions(path, TEXT_TO_IMAGE, 2)
    assert str(error.value) == f"{path}{sentence}"


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "features.jsonl"
    write_features(path, "image", [features(3)])
    before = path.read_bytes()

    def broken() -> object:
        yield features(2)
        raise InvalidInput("broken")

    with pytest.raises(InvalidInput, match="broken"):
        write_features(path, "image", broken())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
