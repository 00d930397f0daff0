"""Embedding a set: order, batches and progress, and the scores that come of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.shapes import MemoryPairs, draw_shape, shape_pairs
from tuwen.data.pairs import TextRecord
from tuwen.embed import RetrievalScores, embed_images, embed_texts, score_retrieval
from tuwen.errors import InvalidInput
from tuwen.image_transform import preprocess_image
from tuwen.model import ChineseCLIP
from tuwen.tokenizer import default_tokenizer

# Lengths out of order, so that batching by length has something to undo.
TEXTS = ["一只黑色的猫坐在红色的沙发上", "猫", "绿色的三角形", "", "下雨", "A dog, 一条狗!", "蓝" * 80, "红圆"]


def test_each_picture_has_its_own_row(small_model: ChineseCLIP) -> None:
    """A batch of one equals its row of a batch of N; float32 sums of other shapes differ by some 1e-7."""
    encoded = list(shape_pairs().images.values())[:4]
    together = embed_images(small_model, iter(encoded), batch_size=4)
    for row, picture in zip(together, encoded, strict=True):
        assert np.abs(embed_images(small_model, iter([picture]))[0] - row).max() <= 1e-5
    assert len({tuple(row.round(4)) for row in together}) == 4


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_pictures_keep_their_order_in_any_batches(small_model: ChineseCLIP, batch_size: int) -> None:
    """Equal to the tower called by hand, with a last batch that is not full; the hook hears the count."""
    encoded, heard = list(shape_pairs().images.values())[:8], []
    embeds = embed_images(small_model, iter(encoded), batch_size, heard.append)
    resolution = small_model.spec.vision.resolution
    pixel_values = torch.from_numpy(np.stack([preprocess_image(one, resolution) for one in encoded]))
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(small_model.encode_image(pixel_values), dim=-1).numpy()
    assert np.abs(embeds - expected).max() <= 1e-5
    assert heard == [min(8, done) for done in range(batch_size, 8 + batch_size, batch_size)]


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_texts_keep_their_order_in_any_batches(small_model: ChineseCLIP, batch_size: int) -> None:
    """Equal to the tower called by hand on one padded batch, though they are sorted by length inside."""
    embeds = embed_texts(small_model, TEXTS, batch_size)
    with torch.inference_mode():
        features = small_model.encode_text(torch.from_numpy(default_tokenizer().encode(TEXTS)))
    expected = torch.nn.functional.normalize(features, dim=-1).numpy()
    assert np.abs(embeds - expected).max() <= 1e-5
    assert len({tuple(row.round(4)) for row in embeds}) == len(TEXTS)


def test_rows_are_float32_of_unit_length(small_model: ChineseCLIP) -> None:
    """Whatever the towers' features are."""
    for embeds in (embed_images(small_model, iter(shape_pairs().images.values())), embed_texts(small_model, TEXTS)):
        assert embeds.dtype == np.float32
        assert np.abs(np.linalg.norm(embeds, axis=1) - 1).max() <= 1e-6


def test_nothing_gives_no_rows(small_model: ChineseCLIP) -> None:
    """Of the right width."""
    assert embed_images(small_model, iter([])).shape == (0, 32)
    assert embed_texts(small_model, []).shape == (0, 32)


# --- scores -------------------------------------------------------------------------------------------------------


def scores_by_hand(model: ChineseCLIP, pairs: MemoryPairs) -> dict[str, list[float]]:
    """recall@1, 5, 10 by sorting, one query at a time: {"text_to_image": [r1, r5, r10], "image_to_text": ...}."""
    records = [record for record in pairs.texts if record.image_ids]
    images = dict(zip(pairs.images, embed_images(model, iter(pairs.images.values())), strict=True))
    text_embeds = embed_texts(model, [record.text for record in records])
    texts = dict(zip((record.text_id for record in records), text_embeds, strict=True))
    belongs = {(record.text_id, image_id) for record in pairs.texts for image_id in record.image_ids}
    ranks: dict[str, list[int]] = {"text_to_image": [], "image_to_text": []}
    for text_id, text in texts.items():
        best = sorted(images, key=lambda image_id: -float(text @ images[image_id]))
        ranks["text_to_image"].append(min(best.index(one) for one in best if (text_id, one) in belongs))
    for image_id, image in images.items():
        order = sorted(texts, key=lambda text_id: -float(image @ texts[text_id]))
        found = [order.index(one) for one in order if (one, image_id) in belongs]
        ranks["image_to_text"] += [min(found)] if found else []
    return {way: [sum(rank < k for rank in found) / len(found) for k in (1, 5, 10)] for way, found in ranks.items()}


def test_scores_are_recalls_of_the_embeddings(small_model: ChineseCLIP) -> None:
    """With shared captions, a picture without one (in the gallery) and a text without a picture (no part)."""
    pairs = shape_pairs()
    pairs.images[5] = draw_shape("黑", "横条")
    pairs.texts.append(TextRecord(900, "没有图", ()))
    scores = score_retrieval(small_model, pairs)
    for way, (r1, r5, r10) in scores_by_hand(small_model, pairs).items():
        # One near tie may be decided otherwise by float32.
        assert [scores[way].r1, scores[way].r5, scores[way].r10] == pytest.approx([r1, r5, r10], abs=0.05)
        assert scores[way].mean_recall == pytest.approx((scores[way].r1 + scores[way].r5 + scores[way].r10) / 3)
    assert (scores["text_to_image"].num_queries, scores["image_to_text"].num_queries) == (25, 20)


def test_a_perfect_model_scores_one(small_model: ChineseCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts whose vectors are their pictures' own; a shifted order scores less."""
    pairs = shape_pairs()
    pairs.texts[:] = [record for record in pairs.texts if len(record.image_ids) == 1]
    vectors = np.eye(20, 32, dtype=np.float32)
    monkeypatch.setattr(ChineseCLIP, "encode_image", lambda *args, **kwargs: torch.from_numpy(vectors))
    monkeypatch.setattr("tuwen.embed.embed_texts", lambda model, texts: vectors)
    assert set(score_retrieval(small_model, pairs).values()) == {RetrievalScores(1.0, 1.0, 1.0, 20)}
    monkeypatch.setattr("tuwen.embed.embed_texts", lambda model, texts: np.roll(vectors, 1, axis=0))
    assert {scores.r1 for scores in score_retrieval(small_model, pairs).values()} == {0.0}


@pytest.mark.parametrize(
    ("images", "texts", "reason"),
    [
        (9, 25, "9 pictures and 11 texts, expected at least 10 of each"),
        (20, 9, "20 pictures and 9 texts, expected at least 10 of each"),
        (20, 0, "20 pictures and 0 texts, expected at least 10 of each"),
    ],
)
def test_too_small_a_set_is_refused(small_model: ChineseCLIP, images: int, texts: int, reason: str) -> None:
    """Recall@10 among fewer than 10 says nothing; texts that describe no picture do not count."""
    pairs = shape_pairs()
    kept = {image_id: pairs.images[image_id] for image_id in pairs.image_ids[:images]}
    chosen = [record for record in pairs.texts[:texts] if set(record.image_ids) <= kept.keys()]
    few = MemoryPairs(kept, [*chosen, *(TextRecord(900 + number, "无", ()) for number in range(10))])
    with pytest.raises(InvalidInput, match=f"^retrieval: {reason}$"):
        score_retrieval(small_model, few)


def test_a_broken_picture_is_named(small_model: ChineseCLIP) -> None:
    """One of thousands could not be found without its id."""
    pairs = shape_pairs()
    pairs.images[107] = b"GIF89a, cut off"
    with pytest.raises(InvalidInput, match=r"^picture 107: image "):
        score_retrieval(small_model, pairs)


def test_a_missing_picture_is_named(small_model: ChineseCLIP) -> None:
    """An LMDB's pairs may name a picture that its imgs lacks."""
    pairs = shape_pairs()
    del pairs.images[107]
    with pytest.raises(InvalidInput, match=r"^text 7: names picture 107, which is not in the set$"):
        score_retrieval(small_model, pairs)
