"""Two engines beside each other: what is measured, and what is let through."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from eval.compare import EnginesDiffer, check_agreement, compare, same_top
from eval.retrieval import EmbeddedPairs, Embeddings, RetrievalResult
from tuwen.embed import RetrievalSet
from tuwen.errors import InvalidInput

NUM_IMAGES, NUM_TEXTS, DIM = 40, 60, 16


def unit(rows: np.ndarray) -> Embeddings:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def evaluated(images: np.ndarray, texts: np.ndarray, fingerprint: int = 1) -> tuple[RetrievalResult, EmbeddedPairs]:
    chosen = RetrievalSet(
        tuple(range(NUM_IMAGES)), tuple(map(str, range(NUM_TEXTS))),
        tuple((text % NUM_IMAGES,) for text in range(NUM_TEXTS)),
    )  # fmt: skip
    embedded = EmbeddedPairs(chosen, unit(images), unit(texts))
    scores = (embedded.scores("text_to_image"), embedded.scores("image_to_text"))
    return RetrievalResult("torch", "m", fingerprint, "d", "valid", NUM_IMAGES, NUM_TEXTS, *scores), embedded


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    images = random.normal(size=(NUM_IMAGES, DIM))
    return images, images[np.arange(NUM_TEXTS) % NUM_IMAGES] + random.normal(size=(NUM_TEXTS, DIM))


def test_one_model_twice_is_the_same_model(rows: tuple[np.ndarray, np.ndarray]) -> None:
    found = compare(evaluated(*rows), evaluated(*rows))
    check_agreement(found, min_cosine=1 - 1e-6, max_recall_difference=0)
    assert found.min_cosine == pytest.approx(1)
    for way in (found.text_to_image, found.image_to_text):
        assert (way.same_top_1, way.same_top_10, way.same_rank) == (1, 1, 1)
        assert set(way.differences.values()) == {0.0}
    assert found.is_same_model


def test_one_bad_row_is_seen(rows: tuple[np.ndarray, np.ndarray]) -> None:
    """One picture of forty turned round: the mean is fine, the worst is not."""
    images, texts = rows
    turned = images.copy()
    turned[7] = -turned[7]
    found = compare(evaluated(*rows), evaluated(turned, texts))
    assert found.image_cosine.min == pytest.approx(-1)
    assert found.image_cosine.median == pytest.approx(1)
    assert found.image_cosine.mean == pytest.approx(38 / 40)
    assert found.text_cosine.min == pytest.approx(1)
    with pytest.raises(EnginesDiffer, match=r"the worst cosine is -1\.000000, expected at least 0\.999"):
        check_agreement(found, max_recall_difference=1)
    check_agreement(found, min_cosine=-1.1, max_recall_difference=1)


def test_a_space_turned_as_a_whole_finds_the_same(rows: tuple[np.ndarray, np.ndarray]) -> None:
    """Recall cannot tell; only the cosines can, which is why both are held."""
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(DIM, DIM)))
    found = compare(evaluated(*rows), evaluated(rows[0] @ turn, rows[1] @ turn, fingerprint=2))
    assert found.max_recall_difference == 0
    assert found.text_to_image.same_top_10 == 1
    assert not found.is_same_model
    with pytest.raises(EnginesDiffer, match="the worst cosine"):
        check_agreement(found)


def test_a_change_of_recall_is_a_difference_either_way(rows: tuple[np.ndarray, np.ndarray]) -> None:
    images, texts = rows
    better = images[np.arange(NUM_TEXTS) % NUM_IMAGES]
    for one, other in ((texts, better), (better, texts)):
        found = compare(evaluated(images, one), evaluated(images, other))
        change = found.text_to_image.differences["r1"]
        assert change == found.other.text_to_image.r1 - found.one.text_to_image.r1 != 0
        assert 0 < found.text_to_image.same_rank < 1
        with pytest.raises(EnginesDiffer, match="a recall differs by 0"):
            check_agreement(found, min_cosine=-1)


@pytest.mark.parametrize("side", [0, 1])
def test_an_embedding_of_length_0_is_no_agreement(rows: tuple[np.ndarray, np.ndarray], side: int) -> None:
    """Its cosine is NaN, which min() may pass over."""
    result, embedded = evaluated(*rows)
    empty = [embedded.image_embeds.copy(), embedded.text_embeds.copy()]
    empty[side][5] = 0
    found = compare((result, embedded), (result, EmbeddedPairs(embedded.chosen, *empty)))
    with pytest.raises(EnginesDiffer, match="the worst cosine is nan"):
        check_agreement(found)


def test_what_cannot_be_compared_is_refused(rows: tuple[np.ndarray, np.ndarray]) -> None:
    images, texts = rows
    with pytest.raises(InvalidInput, match=r"\(40, 16\) and \(40, 8\): these are two different models"):
        compare(evaluated(*rows), evaluated(images[:, :8], texts[:, :8]))
    result, embedded = evaluated(*rows)
    other = replace(embedded.chosen, texts=tuple(reversed(embedded.chosen.texts)))
    with pytest.raises(InvalidInput, match="different pairs"):
        compare((result, embedded), (result, replace(embedded, chosen=other)))


def test_everything_goes_through_json(rows: tuple[np.ndarray, np.ndarray]) -> None:
    found = compare(evaluated(*rows), evaluated(*rows)).to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["is_same_model"] is True
    assert found["max_recall_difference"] == 0


@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_tops_are_those_of_sorting(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole numbers with many ties, in blocks of any size; of equals the lower index is in."""
    monkeypatch.setattr("eval.compare._BLOCK_SCORES", block)
    random = np.random.default_rng(2)
    sides = [tuple(random.integers(-1, 2, (number, 3)).astype(np.float32) for number in (50, 23)) for _ in range(2)]
    best = [np.argsort(-(queries @ items.T), axis=1, kind="stable") for queries, items in sides]
    for k in (1, 4, 23, 99):
        tops = [[set(row[:k].tolist()) for row in order] for order in best]
        expected = np.mean([one == other for one, other in zip(*tops, strict=True)])
        first = float((best[0][:, 0] == best[1][:, 0]).mean())
        assert same_top(sides[0], sides[1], k) == (first, expected)  # type: ignore[arg-type]
