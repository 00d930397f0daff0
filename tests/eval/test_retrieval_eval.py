"""Evaluation of a checkpoint on files: the recalls are those of its embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from eval.retrieval import evaluate_checkpoint
from tests.conftest import SMALL_SPECS, random_model
from tests.shapes import shape_pairs, write_pairs
from tuwen.checkpoint import load_checkpoint, save_checkpoint
from tuwen.data.lmdb import write_lmdb
from tuwen.embed import embed_images, embed_texts
from tuwen.errors import InvalidInput


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(random_model(SMALL_SPECS["vit"]), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "data", "valid", shape_pairs())
    return tmp_path / "data"


def test_the_recalls_are_those_of_the_embeddings(checkpoint: Path, data: Path) -> None:
    """By counting, for every query, the items that beat its best right one."""
    pairs, model = shape_pairs(), load_checkpoint(checkpoint)
    images = embed_images(model, iter(pairs.images.values()))
    texts = embed_texts(model, [record.text for record in pairs.texts])
    relevant = np.array([[image_id in record.image_ids for image_id in pairs.images] for record in pairs.texts])
    result = evaluate_checkpoint(checkpoint, data)
    for direction, scores, truth in (
        ("text_to_image", texts @ images.T, relevant),
        ("image_to_text", images @ texts.T, relevant.T),
    ):
        beaten_by = [(row > row[right].max()).sum() for row, right in zip(scores, truth, strict=True)]
        expected = {f"r{k}": float(np.mean([count < k for count in beaten_by])) for k in (1, 5, 10)}
        assert result[direction] == expected | {
            "num_queries": len(scores),
            "mean_recall": pytest.approx(sum(expected.values()) / 3),
        }
    assert 0 < result["text_to_image"]["r10"] < 1  # neither nothing nor all, so that the figures can be wrong


def test_the_result_says_what_was_measured(checkpoint: Path, data: Path) -> None:
    """And goes through JSON as it is."""
    write_pairs(data, "test", shape_pairs())
    result = evaluate_checkpoint(checkpoint, data, split="test")
    assert (result["architecture"], result["split"], result["num_images"]) == ("Small-ViT", "test", 20)
    assert json.loads(json.dumps(result)) == result


def test_an_lmdb_scores_as_its_tsv(checkpoint: Path, data: Path) -> None:
    """The same pairs in the other form."""
    expected = evaluate_checkpoint(checkpoint, data)
    write_lmdb(data, "valid")
    for path in data.glob("valid_*"):
        path.unlink()
    assert evaluate_checkpoint(checkpoint, data) == expected


def test_progress_ends_at_all(checkpoint: Path, data: Path) -> None:
    """(done, total) as embedding goes on."""
    heard: list[tuple[int, int]] = []
    evaluate_checkpoint(checkpoint, data, on_progress=lambda done, total: heard.append((done, total)))
    assert heard == [(20, 20)]


def test_what_is_missing_is_named(checkpoint: Path, data: Path) -> None:
    """Checkpoint, data and split."""
    with pytest.raises(InvalidInput, match="nowhere: there is no such checkpoint"):
        evaluate_checkpoint(data / "nowhere", data)
    with pytest.raises(InvalidInput, match="nowhere: there is no such folder of pairs"):
        evaluate_checkpoint(checkpoint, data / "nowhere")
    with pytest.raises(InvalidInput, match=r"no split 'dev' .*: valid$"):
        evaluate_checkpoint(checkpoint, data, split="dev")
