"""One split parted in two: no picture on both sides, none lost, captions with their pictures, the same every time."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from tuwen.data.lmdb import write_lmdb
from tuwen.data.pairs import ImageRecord, TextRecord, jsonl_path, open_pairs, tsv_path, write_images, write_texts
from tuwen.data.split import Part, split_pairs
from tuwen.errors import InvalidInput

NUM_PICTURES = 200
COPY, ORIGINAL = 900, 7
INTO = ("tune", "check")


def picture(image_id: int) -> bytes:
    return f"picture {image_id}".encode()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Each picture has a caption of its own, all have one in common; one is the copy of another, one text has none."""
    records = [ImageRecord(one, picture(one)) for one in range(NUM_PICTURES)]
    write_images(tsv_path(tmp_path, "valid"), [*records, ImageRecord(COPY, picture(ORIGINAL))])
    ids = (*range(NUM_PICTURES), COPY)
    own = [TextRecord(10 + one, f"第{one}张", (one,)) for one in ids]
    write_texts(jsonl_path(tmp_path, "valid"), [TextRecord(1, "图", ids), TextRecord(2, "没有图", ()), *own])
    return tmp_path


def test_every_picture_is_on_one_side_with_its_captions(data: Path) -> None:
    parts = split_pairs(data, "valid", INTO, 0.8)
    first, second = (open_pairs(data, name) for name in INTO)
    assert sorted([*first.image_ids, *second.image_ids]) == [*range(NUM_PICTURES), COPY]
    for part, pairs in zip(parts, (first, second), strict=True):
        ids = set(pairs.image_ids)
        assert {text.text_id: set(text.image_ids) for text in pairs.texts} == {1: ids} | {10 + one: {one} for one in ids}
        assert all(pairs.image_bytes(one) == picture(ORIGINAL if one == COPY else one) for one in ids)
        assert part == Part(part.name, len(ids), len(ids) + 1, num_shared=1)


def test_the_side_follows_from_the_file(data: Path) -> None:
    """Of its SHA-256 the first 64 bits, as a fraction: so that copies stay together, and a smaller share is a subset."""
    split_pairs(data, "valid", INTO, 0.8)
    expected = {one for one in range(NUM_PICTURES) if int(hashlib.sha256(picture(one)).hexdigest()[:16], 16) < 0.8 * 2**64}
    found = set(open_pairs(data, "tune").image_ids)
    assert found - {COPY} == expected
    assert (COPY in found) == (ORIGINAL in found)
    assert 0.7 < len(found) / NUM_PICTURES < 0.9
    split_pairs(data, "valid", INTO, 0.5)
    assert set(open_pairs(data, "tune").image_ids) < found


def test_an_lmdb_is_parted_like_its_tsv(data: Path) -> None:
    split_pairs(data, "valid", INTO, 0.8)
    before = {name: tsv_path(data, name).read_bytes() for name in INTO}
    write_lmdb(data, "valid")
    tsv_path(data, "valid").unlink()
    split_pairs(data, "valid", INTO, 0.8)
    for name in INTO:
        assert sorted(tsv_path(data, name).read_bytes().splitlines()) == sorted(before[name].splitlines())


@pytest.mark.parametrize(
    ("split", "into", "share", "reason"),
    [
        ("valid", ("tune", "valid"), 0.8, "'valid' cannot be parted into 'tune' and 'valid': expected three names"),
        ("valid", ("tune", "tune"), 0.8, "'valid' cannot be parted into 'tune' and 'tune': expected three names"),
        ("valid", ("../tune", "check"), 0.8, "'../tune' is no name for a split"),
        ("valid", ("", "check"), 0.8, "'' is no name for a split"),
        ("valid", ("tune", ".check"), 0.8, "'.check' is no name for a split"),
        ("valid", INTO, 0.0, "of 201 pictures none is left for 'tune'"),
        ("valid", INTO, 1.0, "of 201 pictures none is left for 'check'"),
        ("train", INTO, 0.8, "no split 'train'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    split: str, into: tuple[str, str], share: float, reason: str, data: Path
) -> None:
    before = sorted(data.iterdir())
    with pytest.raises(InvalidInput, match=re.escape(reason)):
        split_pairs(data, split, into, share)
    assert sorted(data.iterdir()) == before


def test_a_name_that_an_lmdb_has_is_refused(data: Path) -> None:
    """It would be read in place of the new TSV."""
    split_pairs(data, "valid", INTO, 0.8)
    write_lmdb(data, "tune")
    with pytest.raises(InvalidInput, match="'tune' is there as an LMDB"):
        split_pairs(data, "valid", INTO, 0.8)
