"""Retrieval figures: of an engine, of stored embeddings; and the published ones beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval.engines import open_engine
from eval.retrieval import (
    DirectionScores,
    EmbeddedPairs,
    RetrievalResult,
    evaluate_retrieval,
    published_beside,
    score_stored,
)
from eval.torch_engine import TorchEngine
from tests.conftest import SMALL_SPECS, random_model
from tests.shapes import MemoryPairs, shape_pairs, write_pairs
from tuwen.checkpoint import save_checkpoint
from tuwen.data.lmdb import write_lmdb
from tuwen.data.pairs import PairSet, TextRecord, open_pairs
from tuwen.embed import RetrievalSet
from tuwen.errors import InvalidInput


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    with TorchEngine(random_model(SMALL_SPECS["vit"])) as opened:
        yield opened


def evaluate(engine: TorchEngine, pairs: PairSet) -> tuple[RetrievalResult, EmbeddedPairs]:
    return evaluate_retrieval(engine, pairs, "shapes", "valid")


def random_pairs(num_images: int = 30, num_texts: int = 50, seed: int = 0) -> EmbeddedPairs:
    """Embeddings with ties, several right answers, and two pictures that no text describes."""
    random = np.random.default_rng(seed)
    of_text = [tuple(sorted(set(random.integers(0, num_images - 2, 3).tolist()))) for _ in range(num_texts)]
    chosen = RetrievalSet(tuple(range(100, 100 + num_images)), tuple(map(str, range(num_texts))), tuple(of_text))
    # Small whole numbers: many cosines are equal, and exact.
    return EmbeddedPairs(
        chosen,
        random.integers(-1, 2, (num_images, 4)).astype(np.float32),
        random.integers(-1, 2, (num_texts, 4)).astype(np.float32),
    )


def test_figures_are_those_of_sorting() -> None:
    """Ranks from 1, of the best right answer, by sorting each query's items with the lower index first of equals."""
    embedded = random_pairs()
    chosen = embedded.chosen
    scores = embedded.text_embeds @ embedded.image_embeds.T
    pairs_of = {
        "text_to_image": [(scores[row], set(images)) for row, images in enumerate(chosen.images_of_text)],
        "image_to_text": [
            (scores[:, image], {text for text, images in enumerate(chosen.images_of_text) if image in images})
            for image in range(30)
        ],
    }
    for direction, queries in pairs_of.items():
        places = []
        for row, right in queries:
            if right:
                order = sorted(range(len(row)), key=lambda item, row=row: (-row[item], item))  # type: ignore[misc]
                places.append(1 + min(order.index(item) for item in right))
        found = embedded.scores(direction)  # type: ignore[arg-type]
        recalls = [sum(place <= k for place in places) / len(places) for k in (1, 5, 10)]
        assert [found.r1, found.r5, found.r10] == pytest.approx(recalls)
        assert found.mean_recall == pytest.approx(sum(recalls) / 3)
        assert found.mean_rank == pytest.approx(sum(places) / len(places))
        assert found.median_rank == np.median(places)
        assert (found.num_queries, found.num_items) == (len(places), len(queries[0][0]))
    assert embedded.scores("image_to_text").num_queries <= 28 < embedded.scores("text_to_image").num_items


def test_ranks_begin_at_one() -> None:
    scores = DirectionScores.of(np.array([0, 0, 9, 2]), 20)
    assert (scores.median_rank, scores.mean_rank) == (2.0, 3.75)
    assert (scores.r1, scores.r5, scores.r10) == (0.5, 0.75, 1.0)


def test_the_result_says_what_was_measured(engine: TorchEngine) -> None:
    """And goes through JSON as it is."""
    result, _ = evaluate(engine, shape_pairs())
    assert (result.engine, result.architecture, result.fingerprint) == ("torch", "Small-ViT", engine.fingerprint)
    assert (result.data, result.split, result.num_images, result.num_texts) == ("shapes", "valid", 20, 25)
    values = json.loads(json.dumps(result.to_json()))
    assert values["text_to_image"]["num_queries"] == 25
    assert values == result.to_json()
    assert 0 < result.text_to_image.r10 < 1  # neither nothing nor all, so that the figures can be wrong


def test_an_lmdb_scores_as_its_tsv(engine: TorchEngine, tmp_path: Path) -> None:
    """The same pairs in the other form."""
    write_pairs(tmp_path, "valid", shape_pairs())
    expected, _ = evaluate(engine, open_pairs(tmp_path, "valid"))
    write_lmdb(tmp_path, "valid")
    for path in tmp_path.glob("valid_*"):
        path.unlink()
    assert evaluate(engine, open_pairs(tmp_path, "valid"))[0] == expected


def test_progress_ends_at_all(engine: TorchEngine) -> None:
    """(done, total, what) as embedding goes on."""
    heard: list[tuple[int, int, str]] = []
    evaluate_retrieval(
        engine, shape_pairs(), "", "", on_progress=lambda done, total, what: heard.append((done, total, what))
    )
    assert heard[0] == (1, 20, "pictures")
    assert heard[19:21] == [(20, 20, "pictures"), (1, 25, "texts")]
    assert heard[-1] == (25, 25, "texts")


def test_an_item_that_cannot_be_embedded_is_named(engine: TorchEngine) -> None:
    """Figures over the rest would be of another set."""
    pairs = shape_pairs()
    pairs.images[107] = b"no picture"
    with pytest.raises(InvalidInput, match=r"^picture 107: image is not a readable picture file"):
        evaluate(engine, pairs)
    pairs = shape_pairs()
    pairs.texts[3] = TextRecord(3, "　", (103,))
    with pytest.raises(InvalidInput, match=r"^text '.*': text is empty"):
        evaluate(engine, pairs)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """A checkpoint."""
    with pytest.raises(InvalidInput, match="nowhere: there is no such checkpoint"):
        open_engine("torch", checkpoint=tmp_path / "nowhere")
    save_checkpoint(random_model(SMALL_SPECS["vit"]), tmp_path / "model")
    with pytest.raises(InvalidInput, match="device 'warp' cannot be used here"):
        open_engine("torch", checkpoint=tmp_path / "model", device="warp")


# --- stored embeddings ----------------------------------------------------------------------------------------------


def stored(pairs: MemoryPairs, embedded: EmbeddedPairs) -> tuple[RetrievalResult, EmbeddedPairs]:
    """The same rows, shuffled, with their ids; and one of a picture that the set does not hold."""
    random = np.random.default_rng(1)
    images, texts = random.permutation(len(pairs.images)), random.permutation(len(pairs.texts))
    image_ids = [*(pairs.image_ids[index] for index in images), 999]
    return score_stored(
        pairs,
        (image_ids, np.concatenate([embedded.image_embeds[images], embedded.image_embeds[:1]])),
        ([pairs.texts[index].text_id for index in texts], embedded.text_embeds[texts]),
        model="mine", data="shapes", split="valid",
    )  # fmt: skip


def test_stored_embeddings_score_as_fresh_ones(engine: TorchEngine) -> None:
    """In whatever order they lie."""
    fresh, embedded = evaluate(engine, shape_pairs())
    result, again = stored(shape_pairs(), embedded)
    assert result == replace(fresh, engine="features", architecture="mine", fingerprint=None)
    assert np.array_equal(again.image_embeds, embedded.image_embeds)


def test_an_item_without_an_embedding_is_named(engine: TorchEngine) -> None:
    _, embedded = evaluate(engine, shape_pairs())
    pairs = shape_pairs()
    ids = [record.text_id for record in pairs.texts]
    images, texts = (pairs.image_ids, embedded.image_embeds), (ids, embedded.text_embeds)
    with pytest.raises(InvalidInput, match=r"^picture 119 has no embedding$"):
        score_stored(pairs, (images[0][:-1], images[1][:-1]), texts, "", "", "")
    with pytest.raises(InvalidInput, match=r"^text 54 has no embedding$"):
        score_stored(pairs, images, (ids[:-1], texts[1][:-1]), "", "", "")
    with pytest.raises(InvalidInput, match=r"^texts: 24 different ids for 25 embeddings$"):
        score_stored(pairs, images, ([*ids[:-1], ids[0]], texts[1]), "", "", "")


def test_embeddings_that_cannot_be_ranked_are_refused() -> None:
    """A NaN is beaten by nothing, so that a broken model would be a perfect one."""
    embedded = random_pairs()
    broken = embedded.text_embeds.copy()
    broken[3, 2] = np.nan
    for images, texts, reason in (
        (embedded.image_embeds, broken, "embeddings of texts hold something that is no finite number"),
        (embedded.image_embeds[1:], embedded.text_embeds, r"pictures are \(29, 4\), expected one row for each of 30"),
        (embedded.image_embeds[:, 1:], embedded.text_embeds, "pictures have 3 dimensions, texts 4: they are not of"),
    ):
        with pytest.raises(InvalidInput, match=reason):
            EmbeddedPairs(embedded.chosen, images, texts)


# --- published ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["ViT-B-16", "vit_b_16"])
def test_published_figures_stand_beside_ours(architecture: str, tmp_path: Path) -> None:
    """Of the same set, split and architecture, under the name it is served by too."""
    scores = DirectionScores.of(np.arange(20), 20)
    ours = RetrievalResult(
        "torch", architecture, 1, str(tmp_path / "Flickr30k-CN"), "test", 20, 20, text_to_image=scores,
        image_to_text=scores,
    )  # fmt: skip
    beside = published_beside(ours)
    assert list(beside) == ["published, zero-shot", "published, fine-tuned"]
    assert beside["published, zero-shot"]["text_to_image"].r1 == 0.627
    assert beside["published, fine-tuned"]["image_to_text"].r10 == 0.995
    for other in (
        replace(ours, architecture="Tiny-RN"),
        replace(ours, data="samples/emoji_cn"),
        replace(ours, split="valid"),
    ):
        assert published_beside(other) == {}
