"""Training batches: which captions belong to which pictures, and in what order they come."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.shapes import MemoryPairs, draw_shape, shape_pairs
from training.dataset import Batch, ImageBatches
from training.recipe import DataSection
from tuwen.data.pairs import TextRecord
from tuwen.errors import InvalidInput
from tuwen.image_transform import decode_image, resize_image
from tuwen.tokenizer import default_tokenizer

RESOLUTION = 32


def batches_of(pairs: MemoryPairs, batch_size: int, **settings: object) -> ImageBatches:
    data = DataSection.model_validate({"path": "unused"} | settings)
    return ImageBatches(pairs, data, RESOLUTION, batch_size)


def pictures(pairs: MemoryPairs) -> dict[bytes, int]:
    """What a picture's row of pixels looks like -> its id."""
    return {
        (resize_image(decode_image(encoded), RESOLUTION).transpose(2, 0, 1)).tobytes(): image_id
        for image_id, encoded in pairs.images.items()
    }


def image_ids(batch: Batch, pairs: MemoryPairs) -> list[int]:
    """Told from the pixels, so that a row that belongs to another picture is noticed."""
    known = pictures(pairs)
    return [known[row.mul(255).round().to(torch.uint8).numpy().tobytes()] for row in batch.pixels]


def captions(batch: Batch, pairs: MemoryPairs) -> list[TextRecord]:
    """Told from the input_ids."""
    tokenizer = default_tokenizer()
    known = {tuple(tokenizer.encode_ids(record.text)): record for record in pairs.texts}
    return [known[tuple(value for value in row if value)] for row in batch.input_ids.tolist()]


@pytest.mark.parametrize("captions_per_image", [1, 2, 5])
def test_positives_are_what_the_captions_say(captions_per_image: int) -> None:
    """A shared caption is a positive of every picture it describes, whichever it was drawn for."""
    pairs = shape_pairs()
    shared = 0
    for batch in batches_of(pairs, 10, captions_per_image=captions_per_image).epoch(0, 0):
        rows, columns = image_ids(batch, pairs), captions(batch, pairs)
        expected = [[image_id in record.image_ids for record in columns] for image_id in rows]
        assert batch.positives.dtype == torch.bool
        assert batch.positives.tolist() == expected
        assert batch.positives.any(dim=0).all()
        assert batch.positives.any(dim=1).all()
        shared += int((batch.positives.sum(dim=0) > 1).sum())
    assert shared > 0


def test_each_caption_comes_once_in_a_batch() -> None:
    """20 pictures with both their captions: 20 of their own and five colours, not 20 and 20."""
    pairs = shape_pairs()
    (batch,) = batches_of(pairs, 20, captions_per_image=2).epoch(0, 0)
    records = captions(batch, pairs)
    assert sorted(record.text_id for record in records) == sorted(record.text_id for record in pairs.texts)


def test_captions_per_image_is_a_limit() -> None:
    """With one each there are at most as many captions as pictures, and which one varies."""
    pairs = shape_pairs()
    batches = batches_of(pairs, 20, captions_per_image=1)
    drawn = [next(batches.epoch(0, epoch)) for epoch in range(5)]
    assert all(len(batch.input_ids) <= 20 for batch in drawn)
    assert len({record.text_id for batch in drawn for record in captions(batch, pairs)}) > 20


def test_each_picture_comes_once_an_epoch() -> None:
    """And the remainder of a batch is left out, another one each epoch."""
    pairs = shape_pairs()
    batches = batches_of(pairs, 6)
    assert len(batches) == 3
    left_out = set()
    for epoch in range(6):
        seen = [image_id for batch in batches.epoch(0, epoch) for image_id in image_ids(batch, pairs)]
        assert len(seen) == len(set(seen)) == 18
        left_out.add(frozenset(pairs.image_ids) - frozenset(seen))
    assert len(left_out) > 1


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    """Not of what was read before: an epoch can be resumed. Pictures and captions both."""
    pairs = shape_pairs()

    def order(seed: int, epoch: int) -> list[tuple[list[int], list[int]]]:
        batches = batches_of(pairs, 5).epoch(seed, epoch)
        return [(image_ids(one, pairs), [record.text_id for record in captions(one, pairs)]) for one in batches]

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(3, 2)
    assert order(3, 1) != order(4, 1)
    assert order(3, 1) != order(2, 2)  # runs of neighbouring seeds share no epoch
    once = batches_of(pairs, 5)
    list(once.epoch(3, 0))
    second = next(once.epoch(3, 1))
    assert image_ids(second, pairs) == order(3, 1)[0][0]


@pytest.mark.parametrize("cache_decoded", [False, True])
def test_pixels_are_the_transforms_before_normalising(cache_decoded: bool) -> None:
    """float32 in [0, 1], also the second time, from the cache."""
    pairs = shape_pairs()
    batches = batches_of(pairs, 20, cache_decoded=cache_decoded)
    for epoch in range(2):
        (batch,) = batches.epoch(0, epoch)
        expected = [resize_image(decode_image(pairs.images[one]), RESOLUTION) for one in image_ids(batch, pairs)]
        assert batch.pixels.dtype == torch.float32
        assert np.array_equal(batch.pixels.permute(0, 2, 3, 1).numpy(), np.stack(expected).astype(np.float32) / 255)


def test_the_cache_saves_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture is decoded once, not once an epoch; without the cache, every time."""
    decoded: list[bytes] = []

    def counting(encoded: bytes) -> object:
        decoded.append(encoded)
        return decode_image(encoded)

    monkeypatch.setattr("training.dataset.decode_image", counting)
    for cache_decoded, expected in ((True, 20), (False, 40)):
        decoded.clear()
        batches = batches_of(shape_pairs(), 20, cache_decoded=cache_decoded)
        for epoch in range(2):
            list(batches.epoch(0, epoch))
        assert len(decoded) == expected


def test_a_joined_caption_describes_what_both_its_parts_describe() -> None:
    pairs = shape_pairs()
    body = {record: tuple(default_tokenizer().encode_ids(record.text)[1:-1]) for record in pairs.texts}
    glues = [tuple(default_tokenizer().encode_ids(glue)[1:-1]) for glue in ("", "的", "，")]
    splits: dict[tuple[int, ...], set[int]] = {}
    for one, words in body.items():
        for other, more in body.items():
            for glue in glues:
                both = set(one.image_ids) & set(other.image_ids)
                splits.setdefault(words + glue + more, set()).update(both)
    for batch in batches_of(pairs, 10, captions_per_image=2, join_captions=1.0).epoch(0, 0):
        rows = image_ids(batch, pairs)
        assert batch.input_ids.shape[0] == batch.positives.shape[1]
        for ids, column in zip(batch.input_ids.tolist(), batch.positives.T.tolist(), strict=True):
            joined = tuple(value for value in ids if value)[1:-1]
            assert column == [image_id in splits[joined] for image_id in rows]
            assert any(column)


def test_tokens_are_dropped_from_longer_captions_alone() -> None:
    pairs = shape_pairs()
    whole = {tuple(default_tokenizer().encode_ids(record.text)) for record in pairs.texts}
    batches = batches_of(pairs, 10, captions_per_image=5, join_captions=0.5, drop_tokens=0.5)
    shown = [
        tuple(value for value in row if value) for batch in batches.epoch(0, 0) for row in batch.input_ids.tolist()
    ]
    assert any(row not in whole for row in shown)
    assert all(len(row) >= 3 and row[0] == 101 and row[-1] == 102 for row in shown)
    plain = batches_of(pairs, 10, captions_per_image=5)
    assert all(
        tuple(value for value in row if value) in whole
        for batch in plain.epoch(0, 0)
        for row in batch.input_ids.tolist()
    )


def test_captions_are_cut_to_the_context_length() -> None:
    """[CLS], two pieces and [SEP]; and a batch is no longer than its longest caption."""
    pairs = MemoryPairs(
        {1: draw_shape("红", "圆"), 2: draw_shape("绿", "圆")},
        [TextRecord(1, "一个很大的红色的圆", (1,)), TextRecord(2, "绿圆", (2,))],
    )
    (batch,) = batches_of(pairs, 2, context_length=4).epoch(0, 0)
    assert batch.input_ids.shape == (2, 4)
    (batch,) = batches_of(pairs, 2).epoch(0, 0)
    assert batch.input_ids.shape == (2, 11)


def test_pictures_without_a_caption_are_left_out() -> None:
    """And so are captions without a picture."""
    pairs = shape_pairs()
    lonely = MemoryPairs(pairs.images | {999: draw_shape("黑", "圆")}, [*pairs.texts, TextRecord(900, "没有图", ())])
    (batch,) = batches_of(lonely, 20, captions_per_image=5).epoch(0, 0)
    assert sorted(image_ids(batch, pairs)) == pairs.image_ids
    assert len(batch.input_ids) == len(pairs.texts)


def test_too_few_pictures_are_refused() -> None:
    """One sentence with both numbers."""
    with pytest.raises(InvalidInput, match=r"^training split: 20 pictures with captions, fewer than one batch of 21$"):
        batches_of(shape_pairs(), 21)


def test_a_broken_picture_is_named() -> None:
    """By its id, with the decoder's reason."""
    pairs = shape_pairs()
    pairs.images[107] = pairs.images[107][:60]
    with pytest.raises(InvalidInput, match=r"^training picture 107: image .*$"):
        list(batches_of(pairs, 20).epoch(0, 0))
