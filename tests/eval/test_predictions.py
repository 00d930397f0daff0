"""Predictions from feature files: exact and through FAISS, submissions, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from eval.chinese_clip_files import (
    IMAGE_TO_TEXT,
    TEXT_TO_IMAGE,
    Features,
    read_answers,
    read_features,
    write_answers,
    write_features,
)
from tuwen.cli import app
from tuwen.errors import InvalidInput, MissingDependency


def unit(seed: int, count: int, width: int = 16) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """5,000 pictures, more than a block of lines, and 50 texts."""
    write_features(tmp_path / "images.jsonl", "image", [Features(np.arange(5000) * 3 + 1, unit(0, 5000))])
    write_features(tmp_path / "texts.jsonl", "text", [Features(np.arange(50) + 100, unit(1, 50))])
    return tmp_path


def predict(folder: Path, *options: str) -> Path:
    files = ("--image-features", "images.jsonl", "--text-features", "texts.jsonl", "--out", "out.jsonl")
    words = [str(folder / word) if word.endswith(".jsonl") else word for word in files]
    app(["eval", "predict", *words, *options], standalone_mode=False)
    return folder / "out.jsonl"


def test_predictions_are_the_nearest(folder: Path) -> None:
    for options, direction, queries, items, step, offset in (
        ((), TEXT_TO_IMAGE, unit(1, 50), unit(0, 5000), 3, 1),
        (("--direction", "image-to-text", "--top-k", "3"), IMAGE_TO_TEXT, unit(0, 5000), unit(1, 50), 1, 100),
    ):
        found = read_answers(predict(folder, *options), direction)
        k = 10 if not options else 3
        nearest = np.argsort(-(queries.astype(np.float64) @ items.T.astype(np.float64)), axis=1)[:, :k]
        assert list(found.values()) == (nearest * step + offset).tolist()


@pytest.mark.parametrize(
    ("index", "probes", "share"),
    [("faiss", 1, 1.0), ("faiss-ivf", 1000, 1.0), ("faiss-hnsw", 64, 0.9)],  # an approximate index may miss some
)
def test_an_index_of_faiss_finds_them_too(folder: Path, index: str, probes: int, share: float) -> None:
    pytest.importorskip("faiss")
    exact = read_answers(predict(folder), TEXT_TO_IMAGE)
    found = read_answers(predict(folder, "--index", index, "--probes", str(probes)), TEXT_TO_IMAGE)
    common = [len(set(found[query]) & set(items)) for query, items in exact.items()]
    assert np.mean(common) >= 10 * share
    assert list(found) == list(exact)


def test_too_few_probes_are_said(folder: Path) -> None:
    pytest.importorskip("faiss")
    with pytest.raises(InvalidInput, match=r"images.jsonl: faiss-ivf found fewer than 200 .*raise --probes above 1"):
        predict(folder, "--index", "faiss-ivf", "--probes", "1", "--top-k", "200")


def test_without_faiss_the_sentence_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependency, match=r"pip install 'tuwen\[faiss\]'"):
        predict(folder, "--index", "faiss")


@pytest.mark.parametrize("index", ["exact", "faiss"])
def test_a_gallery_that_does_not_fit_is_named(folder: Path, index: str) -> None:
    pytest.importorskip("faiss")
    with pytest.raises(InvalidInput, match=r"images.jsonl: k is 5001, expected 1..5000"):
        predict(folder, "--index", index, "--top-k", "5001")
    write_features(folder / "texts.jsonl", "text", [Features(np.arange(3), unit(1, 3, width=8))])
    with pytest.raises(InvalidInput, match=r"images.jsonl: queries have D = 8, items D = 16"):
        predict(folder, "--index", index)
    assert not (folder / "out.jsonl").exists()


def test_a_malformed_line_of_the_gallery_is_named(folder: Path) -> None:
    with open(folder / "images.jsonl", "a") as file:
        file.write('{"image_id": 1, "feature": [1]}\n')
    with pytest.raises(InvalidInput, match=r"images.jsonl:5001: image_id 1 is there twice"):
        predict(folder)
    assert not (folder / "out.jsonl").exists()


def submit(folder: Path) -> None:
    queries, predictions = folder / "test_texts.jsonl", folder / "out.jsonl"
    app(["eval", "submission", "--queries", str(queries), "--predictions", str(predictions)], standalone_mode=False)


def test_a_submission_is_checked_before_it_is_sent(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As MUGE's test split has it: queries without answers."""
    predictions = read_answers(predict(folder), TEXT_TO_IMAGE)
    texts = read_features(folder / "texts.jsonl", "text").ids
    write_answers(folder / "test_texts.jsonl", TEXT_TO_IMAGE, ((int(text), ()) for text in texts))
    submit(folder)
    assert "50 queries; upload it as it is" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(InvalidInput, match="no query has an answer"):
        app(
            [
                "eval",
                "score",
                "--annotations",
                str(folder / "test_texts.jsonl"),
                "--predictions",
                str(folder / "out.jsonl"),
            ],
            standalone_mode=False,
        )
    for change, sentence in (
        ({100: [1] * 10}, "text_id 100 has one of its image_ids twice"),
        ({100: list(range(9))}, "text_id 100 has 9 image_ids, expected 10"),
        ({99: list(range(10))}, r"text_id 99 is not among the queries of .*test_texts.jsonl"),
    ):
        write_answers(folder / "out.jsonl", TEXT_TO_IMAGE, (predictions | change).items())
        with pytest.raises(InvalidInput, match=sentence):
            submit(folder)
    write_answers(folder / "out.jsonl", TEXT_TO_IMAGE, list(predictions.items())[1:])
    with pytest.raises(InvalidInput, match="1 of 50 queries have no prediction, text_id 100 the first"):
        submit(folder)
    write_answers(folder / "out.jsonl", IMAGE_TO_TEXT, predictions.items())
    with pytest.raises(InvalidInput, match=r"its queries are not those of .*, which has image_id"):
        submit(folder)
