"""Training batches: which captions belong to which pictures, their order, and that processes share them."""

from __future__ import annotations

import io
import logging
import multiprocessing
import pickle
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.shapes import MemoryPairs, draw_shape, shape_pairs, write_pairs
from training.batch import Batch, InputIds, Positives
from training.dataset import IndexedBatches
from training.order import deal_distinct, shuffled
from training.pixels import Augmentation
from training.recipe import DataSection
from training.sources import PairTable, WeightedPairs, open_sources
from training.towers import normalize
from tuwen.data.lmdb import write_lmdb
from tuwen.data.pairs import PairSet, TextRecord
from tuwen.errors import InvalidInput
from tuwen.image_transform import decode_image, preprocess_image, resize_image
from tuwen.tokenizer import default_tokenizer

RESOLUTION = 32
pytestmark = pytest.mark.usefixtures("one_thread")


def batches_of(
    pairs: PairSet,
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    num_processes: int = 1,
    augmentation: Augmentation | None = None,
    **settings: object,
) -> IndexedBatches:
    data = DataSection.model_validate({"path": "unused"} | settings)
    sources = [WeightedPairs(pairs)]
    return IndexedBatches(sources, data, RESOLUTION, batch_size, seed, rank, num_processes, augmentation)


def epoch_of(batches: IndexedBatches, epoch: int = 0) -> list[Batch]:
    return [batches.batch(epoch, number) for number in range(len(batches))]


def pictures(pairs: MemoryPairs) -> dict[bytes, int]:
    """What a picture's row of pixels looks like -> its id."""
    return {
        (resize_image(decode_image(encoded), RESOLUTION).transpose(2, 0, 1)).tobytes(): image_id
        for image_id, encoded in pairs.images.items()
    }


def image_ids(batch: Batch, pairs: MemoryPairs) -> list[int]:
    """Told from the pixels, so that a row that belongs to another picture is noticed."""
    known = pictures(pairs)
    told = [known[row.numpy().tobytes()] for row in batch.pixels]
    assert batch.image_ids == tuple(told)
    return told


def captions(batch: Batch, pairs: MemoryPairs) -> list[TextRecord]:
    """Told from the input_ids."""
    tokenizer = default_tokenizer()
    known = {tuple(tokenizer.encode_ids(record.text)): record for record in pairs.texts}
    return [known[ids] for ids in batch.texts]


def positives(batch: Batch) -> list[list[bool]]:
    """Rows of pictures, columns of captions; of one process, so that both views say the same."""
    assert isinstance(batch.positives, Positives)
    assert batch.positives.image_rows.dtype == batch.positives.text_rows.dtype == torch.bool
    assert torch.equal(batch.positives.image_rows, batch.positives.text_rows.T)
    return batch.positives.image_rows.tolist()


# --- positives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"captions_per_image": 1}, {"captions_per_image": 2}, {"captions_per_image": 5}, {"unit": "pair"}]
)
def test_positives_are_what_the_captions_say(settings: dict[str, object]) -> None:
    """A shared caption is a positive of every picture it describes, whichever it was drawn for."""
    pairs = shape_pairs()
    shared = 0
    for batch in epoch_of(batches_of(pairs, 10, **settings)):
        rows, columns = image_ids(batch, pairs), captions(batch, pairs)
        assert positives(batch) == [[image_id in record.image_ids for record in columns] for image_id in rows]
        found = torch.tensor(positives(batch))
        assert found.any(dim=0).all()
        assert found.any(dim=1).all()
        shared += int((found.sum(dim=0) > 1).sum())
    assert shared > 0


def test_each_caption_comes_once_in_a_batch() -> None:
    """20 pictures with both their captions: 20 of their own and five colours, not 20 and 20."""
    pairs = shape_pairs()
    (batch,) = epoch_of(batches_of(pairs, 20, captions_per_image=2))
    records = captions(batch, pairs)
    assert sorted(record.text_id for record in records) == sorted(record.text_id for record in pairs.texts)


@pytest.mark.parametrize("unit", ["image", "pair"])
def test_captions_that_say_the_same_are_one(unit: str) -> None:
    """Whatever their ids, case and outer white space; each describes the pictures of both."""
    pairs = MemoryPairs(
        {1: draw_shape("红", "圆"), 2: draw_shape("绿", "圆")},
        [TextRecord(1, "A圆", (1,)), TextRecord(2, " a圆\n", (2,))],
    )
    batches = batches_of(pairs, 2, unit=unit)
    assert batches.table.captions_of(0) == batches.table.captions_of(1)
    (batch,) = epoch_of(batches)
    assert len(batch.texts) == 1
    assert positives(batch) == [[True], [True]]


def test_captions_that_are_cut_to_the_same_are_one() -> None:
    """A negative that reads like the positive cannot be learned."""
    pairs = MemoryPairs(
        {1: draw_shape("红", "圆"), 2: draw_shape("绿", "圆")},
        [TextRecord(1, "一个很大的红圆", (1,)), TextRecord(2, "一个很小的绿圆", (2,))],
    )
    (batch,) = epoch_of(batches_of(pairs, 2, context_length=5))
    assert positives(batch) == [[True], [True]]
    (batch,) = epoch_of(batches_of(pairs, 2, context_length=6))
    assert sum(map(sum, positives(batch))) == 2


def test_captions_per_image_is_a_limit() -> None:
    """With one each there are at most as many captions as pictures, and which one varies."""
    pairs = shape_pairs()
    batches = batches_of(pairs, 20, captions_per_image=1)
    drawn = [batches.batch(epoch, 0) for epoch in range(5)]
    assert all(len(batch.texts) <= 20 for batch in drawn)
    assert len({record.text_id for batch in drawn for record in captions(batch, pairs)}) > 20


def test_a_joined_caption_describes_what_both_its_parts_describe() -> None:
    pairs = shape_pairs()
    body = {record: tuple(default_tokenizer().encode_ids(record.text)[1:-1]) for record in pairs.texts}
    glues = [tuple(default_tokenizer().encode_ids(glue)[1:-1]) for glue in ("", "的", "，")]
    splits: dict[InputIds, set[int]] = {}
    for one, words in body.items():
        for other, more in body.items():
            if one is other:
                continue
            for glue in glues:
                both = set(one.image_ids) & set(other.image_ids)
                splits.setdefault(words + glue + more, set()).update(both)
    for batch in epoch_of(batches_of(pairs, 10, captions_per_image=2, join_captions=1.0)):
        rows = image_ids(batch, pairs)
        for ids, column in zip(batch.texts, zip(*positives(batch), strict=True), strict=True):
            assert list(column) == [image_id in splits[ids[1:-1]] for image_id in rows]
            assert any(column)


def test_tokens_are_dropped_from_longer_captions_alone() -> None:
    pairs = shape_pairs()
    whole = {tuple(default_tokenizer().encode_ids(record.text)) for record in pairs.texts}
    batches = batches_of(pairs, 10, captions_per_image=5, join_captions=0.5, drop_tokens=0.5)
    shown = [text for batch in epoch_of(batches) for text in batch.texts]
    assert any(text not in whole for text in shown)
    assert all(len(text) >= 3 and text[0] == 101 and text[-1] == 102 for text in shown)
    short = batches_of(pairs, 10, captions_per_image=5, drop_tokens=0.9)
    assert all(text in whole for batch in epoch_of(short) for text in batch.texts)


def test_captions_are_cut_to_the_context_length() -> None:
    """[CLS], two pieces and [SEP]; also where two are joined. And none is padded."""
    pairs = MemoryPairs(
        {1: draw_shape("红", "圆"), 2: draw_shape("绿", "圆")},
        [TextRecord(1, "一个很大的红色的圆", (1,)), TextRecord(2, "绿", (2,)), TextRecord(3, "圆", (2,))],
    )
    (batch,) = epoch_of(batches_of(pairs, 2, context_length=4, join_captions=1.0))
    assert sorted(map(len, batch.texts)) == [4, 4]
    (batch,) = epoch_of(batches_of(pairs, 2))
    assert sorted(map(len, batch.texts)) == [3, 11]


# --- the order ------------------------------------------------------------------------------------------------------


def test_each_picture_comes_once_an_epoch() -> None:
    """And the remainder of a batch is left out, another one each epoch."""
    pairs = shape_pairs()
    batches = batches_of(pairs, 6)
    assert len(batches) == 3
    left_out = set()
    for epoch in range(6):
        seen = [image_id for batch in epoch_of(batches, epoch) for image_id in image_ids(batch, pairs)]
        assert len(seen) == len(set(seen)) == 18
        left_out.add(frozenset(pairs.image_ids) - frozenset(seen))
    assert len(left_out) > 1


def test_each_pair_comes_once_an_epoch() -> None:
    """20 pictures with two captions each are 40 pairs: a picture comes once with each."""
    pairs = shape_pairs()
    batches = batches_of(pairs, 8, unit="pair")
    assert len(batches) == 5
    for epoch in range(2):
        seen = [image_id for batch in epoch_of(batches, epoch) for image_id in image_ids(batch, pairs)]
        assert Counter(seen) == dict.fromkeys(pairs.image_ids, 2)
    alone = batches_of(pairs, 2, unit="pair")  # which caption came is known where a batch has two of one picture's
    shown = Counter(record.text_id for batch in epoch_of(alone) for record in captions(batch, pairs))
    assert shown.keys() == {record.text_id for record in pairs.texts}


def fingerprint(batch: Batch) -> tuple[object, ...]:
    """All of a batch, to be compared."""
    assert isinstance(batch.positives, Positives)
    tensors = (batch.pixels, batch.is_readable, batch.positives.image_rows, batch.positives.text_rows)
    return (batch.image_ids, batch.texts, *(tensor.numpy().tobytes() for tensor in tensors))


@pytest.mark.parametrize("settings", [{"captions_per_image": 2, "join_captions": 0.5}, {"distinct_captions": True}])
def test_a_batch_is_a_function_of_seed_epoch_and_number(settings: dict[str, object]) -> None:
    """Not of what was asked for before, so that a run can be resumed anywhere."""
    pairs = shape_pairs()
    forwards = batches_of(pairs, 5, seed=3, augmentation=noise, **settings)
    places = [(epoch, number) for epoch in range(3) for number in range(len(forwards))]
    expected = {place: fingerprint(forwards.batch(*place)) for place in places}
    assert len(set(expected.values())) == len(places)
    backwards = batches_of(pairs, 5, seed=3, augmentation=noise, **settings)
    assert {place: fingerprint(backwards.batch(*place)) for place in reversed(places)} == expected
    other = batches_of(pairs, 5, seed=4, augmentation=noise, **settings)
    assert not {fingerprint(other.batch(*place)) for place in places} & set(expected.values())


def test_neighbouring_seeds_share_no_epoch() -> None:
    """Seed 3's second epoch is not seed 2's third."""
    pairs = shape_pairs()
    three, two = ([batches_of(pairs, 20, seed=seed).batch(epoch, 0).image_ids for epoch in range(4)] for seed in (3, 2))
    assert len({*three, *two}) == 8


def test_an_order_is_the_same_on_every_machine() -> None:
    """The bits of PCG64 and BLAKE2, which no version of NumPy or Python changes: an old run can be resumed."""
    assert shuffled(10, 0, 0, "order").tolist() == [5, 8, 9, 6, 7, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"captions_per_image": 3, "join_captions": 0.5, "drop_tokens": 0.2},
        {"unit": "pair"},
        {"distinct_captions": True},
    ],
)
def test_processes_share_the_batch_of_one(settings: dict[str, object], num_processes: int) -> None:
    pairs = shape_pairs()
    whole = batches_of(pairs, 4, **settings)
    parts = [batches_of(pairs, 4, rank=rank, num_processes=num_processes, **settings) for rank in range(num_processes)]
    assert {len(part) for part in parts} == {len(whole)}
    for number in range(len(whole)):
        expected, shares = whole.batch(1, number), [part.batch(1, number) for part in parts]
        assert [len(share.image_ids) for share in shares] == [4 // num_processes] * num_processes
        assert sum((share.image_ids for share in shares), ()) == expected.image_ids
        texts = torch.arange(len(expected.texts)).tensor_split(num_processes)
        assert [share.texts for share in shares] == [tuple(expected.texts[one] for one in part) for part in texts]
        assert torch.equal(torch.cat([share.pixels for share in shares]), expected.pixels)
        assert torch.equal(torch.cat([rows_of(share)[0] for share in shares]), rows_of(expected)[0])
        assert torch.equal(torch.cat([rows_of(share)[1] for share in shares]), rows_of(expected)[1])


def rows_of(batch: Batch) -> tuple[Tensor, Tensor]:
    assert isinstance(batch.positives, Positives)
    return batch.positives.image_rows, batch.positives.text_rows


def test_a_batch_must_divide_among_the_processes() -> None:
    with pytest.raises(InvalidInput, match=r"^optim\.batch_size 10 does not divide among 4 processes$"):
        batches_of(shape_pairs(), 10, num_processes=4)


@pytest.mark.parametrize("unit", ["image", "pair"])
def test_too_few_are_refused(unit: str) -> None:
    """One sentence with both numbers."""
    have = {"image": "20 pictures with captions", "pair": "40 pairs"}[unit]
    with pytest.raises(InvalidInput, match=rf"^training data: {have}, fewer than one batch of 41$"):
        batches_of(shape_pairs(), 41, unit=unit)


# --- distinct captions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "most"), [("image", 5), ("pair", 10)])
def test_distinct_captions_keeps_what_shares_one_apart(unit: str, most: int) -> None:
    """Four shapes share a colour: a batch of four has no colour twice, so that nothing has two positives."""
    for seed in range(5):
        batches = batches_of(shape_pairs(), 4, seed=seed, unit=unit, distinct_captions=True)
        assert most - 1 <= len(batches) <= most
        for epoch in range(10):
            for batch in epoch_of(batches, epoch):
                assert torch.tensor(positives(batch)).sum(dim=1).tolist() == [1] * 4


def test_an_unlucky_order_has_as_many_batches() -> None:
    """Seed 0 deals five full batches in the first epoch and four in the third, which borrows one."""
    batches = batches_of(shape_pairs(), 4, distinct_captions=True)
    assert len(batches) == 5
    first, third = epoch_of(batches, 0), epoch_of(batches, 2)
    assert third[4].image_ids == first[4].image_ids
    assert len({image_id for batch in third[:4] for image_id in batch.image_ids}) == 16


def test_dealing_waits_for_a_later_batch() -> None:
    """Items 0 to 3 share a caption: each opens a batch of its own, and the others fill them from the first on."""
    captions_of = {item: [9] if item < 4 else [100 + item] for item in range(10)}
    dealt = deal_distinct(np.arange(10), captions_of.__getitem__, 3)
    assert dealt.tolist() == [[0, 4, 5], [1, 6, 7], [2, 8, 9]]
    # Too many of one caption: what never fits is left out, and no batch is short.
    captions_of = {item: [9] if item < 8 else [100 + item] for item in range(10)}
    dealt = deal_distinct(np.arange(10), captions_of.__getitem__, 2)
    assert dealt.tolist() == [[0, 8], [1, 9]]


def test_dealing_is_cheap_where_one_caption_is_everywhere() -> None:
    """Each item is looked at once, so half a set under one caption does not make it quadratic."""
    looked_at: list[int] = []

    def captions_of(item: int) -> list[int]:
        looked_at.append(item)
        return [0] if item % 2 else [item]

    dealt = deal_distinct(np.arange(20_000), captions_of, 8)
    assert len(looked_at) == 20_000
    assert len(dealt) > 1000
    assert (np.count_nonzero(dealt % 2, axis=1) <= 1).all()


def test_no_two_that_share_no_caption_is_refused() -> None:
    same = MemoryPairs({1: draw_shape("红", "圆"), 2: draw_shape("绿", "圆")}, [TextRecord(1, "圆", (1, 2))])
    with pytest.raises(InvalidInput, match=r"^data\.distinct_captions: no 2 pictures"):
        batches_of(same, 2, distinct_captions=True)


# --- several sources ------------------------------------------------------------------------------------------------


def two_sources(first: float, second: float) -> IndexedBatches:
    """The reds and the greens, with the same ids."""
    sets = [
        MemoryPairs(
            {number: draw_shape(colour, shape) for number, shape in enumerate(("圆", "方块", "三角", "横条"))},
            [TextRecord(number, f"{colour}{number}", (number,)) for number in range(4)],
        )
        for colour in "红绿"
    ]
    sources = [WeightedPairs(sets[0], "reds", first), WeightedPairs(sets[1], "greens", second)]
    return IndexedBatches(sources, DataSection(path=Path("unused")), RESOLUTION, 2, seed=0)


def shown(batches: IndexedBatches, epoch: int) -> Counter[str]:
    """How often each caption was shown, which tells source and picture; picture and caption have the same colour."""
    counts: Counter[str] = Counter()
    tokenizer = default_tokenizer()
    names = {
        tuple(tokenizer.encode_ids(f"{colour}{number}")): f"{colour}{number}"
        for colour in "红绿"
        for number in range(4)
    }
    for batch in epoch_of(batches, epoch):
        for pixels, row in zip(batch.pixels, positives(batch), strict=True):
            (name,) = [names[text] for text, is_positive in zip(batch.texts, row, strict=True) if is_positive]
            middle = pixels[:, 16, 16]
            assert (middle[0] > middle[1]) == (name[0] == "红")
            counts[name] += 1
    return counts


def test_ids_of_two_sources_do_not_collide() -> None:
    """Both have pictures 0 to 3."""
    counts = shown(two_sources(1, 1), 0)
    assert counts == {f"{colour}{number}": 1 for colour in "红绿" for number in range(4)}


def test_weights_say_how_often_an_item_is_seen() -> None:
    """Half of the reds and each green twice; the next epoch has the other reds."""
    batches = two_sources(0.5, 2)
    epochs = [shown(batches, epoch) for epoch in range(4)]
    for counts in epochs:
        assert Counter(name[0] for name in counts.elements()) == {"红": 2, "绿": 8}
        assert all(count == 2 for name, count in counts.items() if name[0] == "绿")
    for first, second in zip(epochs[::2], epochs[1::2], strict=True):
        assert {name for name in first + second if name[0] == "红"} == {"红0", "红1", "红2", "红3"}
    assert shown(two_sources(0.5, 2), 3) == epochs[3]


def test_sources_are_opened_from_a_recipe(tmp_path: Path) -> None:
    write_pairs(tmp_path / "one", "train", shape_pairs())
    write_pairs(tmp_path / "two", "train", shape_pairs())
    data = DataSection.model_validate(
        {"sources": [{"path": tmp_path / "one"}, {"path": tmp_path / "two", "weight": 0.5}]}
    )
    batches = IndexedBatches(open_sources(data), data, RESOLUTION, 10, seed=0)
    assert len(batches) == 3
    with pytest.raises(InvalidInput, match="three: there is no such folder of pairs"):
        open_sources(DataSection(path=tmp_path / "three"))


@pytest.mark.parametrize("unit", ["image", "pair"])
def test_lmdb_and_tsv_give_the_same_batches(unit: str, tmp_path: Path) -> None:
    """Though one lists its pictures sorted and the other as they were written."""
    pairs = shape_pairs()
    mixed = MemoryPairs(dict(reversed(pairs.images.items())), pairs.texts[::-1])
    write_pairs(tmp_path / "tsv", "train", mixed)
    write_lmdb(tmp_path / "tsv", "train", tmp_path / "packed")
    opened = []
    for name in ("tsv", "packed"):
        data = DataSection.model_validate({"path": tmp_path / name, "unit": unit})
        opened.append(IndexedBatches(open_sources(data), data, RESOLUTION, 6, seed=0))
    assert type(opened[0].table.sources[0].pairs) is not type(opened[1].table.sources[0].pairs)
    for one, other in zip(epoch_of(opened[0], 1), epoch_of(opened[1], 1), strict=True):
        assert fingerprint(one) == fingerprint(other)


def test_what_has_no_partner_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Pictures without a caption, captions without a picture, blank ones, and those of pictures that are not there."""
    pairs = shape_pairs()
    odd = [TextRecord(900, "没有图", ()), TextRecord(901, " \n", (100, 101)), TextRecord(902, "丢了", (555,))]
    lonely = MemoryPairs(pairs.images | {999: draw_shape("黑", "圆")}, [*pairs.texts, *odd])
    with caplog.at_level(logging.WARNING):
        (batch,) = epoch_of(batches_of(lonely, 20, captions_per_image=5))
    assert sorted(image_ids(batch, pairs)) == pairs.image_ids
    assert len(batch.texts) == len(pairs.texts)
    (warning,) = caplog.messages
    assert "2 pairs with an empty caption and 1 with a picture that is not there" in warning


def test_a_table_takes_little_memory() -> None:
    """Under 100 bytes a pair where two pairs share a caption, and not three times that while it is read."""
    count = 20_000
    texts = [
        TextRecord(number, f"第{number}个标题，二十来个字的样子", (number, number + 1)) for number in range(count - 1)
    ]
    pairs = MemoryPairs(dict.fromkeys(range(count), b""), texts)
    tracemalloc.start()
    table = PairTable([WeightedPairs(pairs)])
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    num_pairs = len(table.captions)
    assert num_pairs == 2 * (count - 1)
    assert kept < 100 * num_pairs
    assert peak < 300 * num_pairs
    assert [table.text(caption) for caption in table.captions_of(0)] == ["第0个标题，二十来个字的样子"]


# --- pixels ---------------------------------------------------------------------------------------------------------


def noise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(pixels.shape, generator=generator)


@pytest.mark.parametrize("cache_decoded", [False, True])
def test_pixels_are_the_transforms_before_normalising(cache_decoded: bool) -> None:
    """Also the second time, from the cache."""
    pairs = shape_pairs()
    batches = batches_of(pairs, 20, cache_decoded=cache_decoded)
    for epoch in range(2):
        (batch,) = epoch_of(batches, epoch)
        expected = [resize_image(decode_image(pairs.images[one]), RESOLUTION) for one in image_ids(batch, pairs)]
        assert batch.pixels.dtype == torch.uint8
        assert np.array_equal(batch.pixels.permute(0, 2, 3, 1).numpy(), np.stack(expected))
        assert batch.is_readable.tolist() == [True] * 20


def test_a_large_jpeg_is_decoded_at_a_fraction() -> None:
    """As the server's fast path does it."""
    file = io.BytesIO()
    Image.effect_noise((500, 800), 90).convert("RGB").save(file, "JPEG")
    pairs = MemoryPairs(
        {1: file.getvalue(), 2: draw_shape("红", "圆")}, [TextRecord(1, "一", (1,)), TextRecord(2, "二", (2,))]
    )
    (batch,) = epoch_of(batches_of(pairs, 2))
    normalized = normalize(batch.pixels)
    drafted = preprocess_image(file.getvalue(), RESOLUTION, draft=True)
    np.testing.assert_allclose(normalized[batch.image_ids.index(1)].numpy(), drafted, atol=1e-6)  # float32 rounding
    assert np.abs(drafted - preprocess_image(file.getvalue(), RESOLUTION)).max() > 1e-3


def test_the_cache_saves_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture is decoded once, not once an epoch; without the cache, every time."""
    decoded: list[bytes] = []

    def counting(encoded: bytes, resolution: int) -> object:
        decoded.append(encoded)
        return resize_image(decode_image(encoded), resolution)

    monkeypatch.setattr("training.dataset.read_drafted", counting)
    for cache_decoded, expected in ((True, 20), (False, 40)):
        decoded.clear()
        batches = batches_of(shape_pairs(), 20, cache_decoded=cache_decoded)
        for epoch in range(2):
            epoch_of(batches, epoch)
        assert len(decoded) == expected


def test_the_cache_is_shared_with_forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker decoded, no other process decodes."""
    batches = batches_of(shape_pairs(), 20, cache_decoded=True)
    worker = multiprocessing.get_context("fork").Process(target=batches.batch, args=(0, 0))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    monkeypatch.setattr("training.dataset.read_drafted", lambda *_: pytest.fail("decoded again"))
    assert batches.batch(1, 0).is_readable.all()


def test_batches_can_be_sent_to_a_spawned_process() -> None:
    batches = batches_of(shape_pairs(), 10, cache_decoded=True)
    copy = pickle.loads(pickle.dumps(batches))  # noqa: S301
    assert fingerprint(copy.batch(1, 1)) == fingerprint(batches.batch(1, 1))


def test_a_cache_larger_than_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the run, not by the kernel in the middle of it."""
    monkeypatch.setattr("training.pixels._memory_bytes", lambda: 20 * RESOLUTION * RESOLUTION * 3 - 1)
    with pytest.raises(InvalidInput, match=r"^data\.cache_decoded: 20 pictures of 32 x 32 take 0\.0 GiB"):
        batches_of(shape_pairs(), 20, cache_decoded=True)
    assert batches_of(shape_pairs(), 20).batch(0, 0).is_readable.all()


def test_augmentation_is_drawn_from_the_place_and_the_rank() -> None:
    """And no other: the global generator is not touched."""
    before = torch.get_rng_state()
    pairs = shape_pairs()
    zero, one = (batches_of(pairs, 10, rank=rank, num_processes=2, augmentation=noise) for rank in (0, 1))
    drawn = zero.batch(0, 0).pixels
    assert torch.equal(zero.batch(0, 0).pixels, drawn)
    for batches, place in ((zero, (0, 1)), (zero, (1, 0)), (one, (0, 0))):
        assert not torch.equal(batches.batch(*place).pixels, drawn)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "broken", [b"no picture", draw_shape("红", "圆")[:60], b""], ids=["no picture", "cut off", "empty"]
)
def test_an_unreadable_picture_is_grey_and_named_once(broken: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of a batch whose other rows are as they were."""
    pairs = shape_pairs()
    whole = epoch_of(batches_of(pairs, 20))[0]
    pairs.images[107] = broken
    batches = batches_of(pairs, 20, augmentation=noise, cache_decoded=True)
    with caplog.at_level(logging.WARNING):
        batch = [*epoch_of(batches, 1), *epoch_of(batches, 0)][-1]
    (warning,) = caplog.messages
    assert warning.startswith("training split: picture 107 cannot be read: image ")
    row = batch.image_ids.index(107)
    assert batch.is_readable.tolist() == [index != row for index in range(20)]
    assert (batch.pixels[row] == 128).all()
    assert (batch.image_ids, batch.texts, positives(batch)) == (whole.image_ids, whole.texts, positives(whole))
    plain = batches_of(pairs, 20).batch(0, 0).pixels
    others = [index for index in range(20) if index != row]
    assert torch.equal(plain[others], whole.pixels[others])
