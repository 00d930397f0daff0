"""TSV and JSONL: what is accepted, and that every malformed line is named by file and number."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuwen.data.pairs import (
    ImageRecord,
    TextRecord,
    iter_images,
    iter_texts,
    jsonl_path,
    open_pairs,
    splits_in,
    tsv_path,
    write_images,
    write_texts,
)
from tuwen.errors import InvalidInput

# Its base64 differs between the alphabets: ++// or --__.
BOTH_ALPHABETS = bytes([0xFB, 0xEF, 0xBF, 0xFF])
IMAGES = [ImageRecord(7, b"seven"), ImageRecord(3, BOTH_ALPHABETS)]
TEXTS = [TextRecord(1, "红色的龙", (7, 3)), TextRecord(2, "没有图", ()), TextRecord(5, "猫", (3,))]


def write_split(folder: Path, split: str = "train") -> Path:
    write_images(tsv_path(folder, split), IMAGES)
    write_texts(jsonl_path(folder, split), TEXTS)
    return folder


def text_line(**changes: object) -> bytes:
    return json.dumps({"text_id": 1, "text": "猫", "image_ids": [7]} | changes).encode() + b"\n"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_split(tmp_path)
    assert list(iter_images(tsv_path(tmp_path, "train"))) == IMAGES
    assert list(iter_texts(jsonl_path(tmp_path, "train"))) == TEXTS
    assert "红色的龙" in jsonl_path(tmp_path, "train").read_text("utf-8")  # readable, not \\uXXXX


@given(
    st.lists(
        st.tuples(st.text(st.characters(codec="utf-8")), st.lists(st.integers(-(10**17), 10**17), max_size=3)),
        min_size=1,
        max_size=5,
    )
)
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, values: list[tuple[str, list[int]]]) -> None:
    records = [TextRecord(number, text, tuple(ids)) for number, (text, ids) in enumerate(values)]
    path = tmp_path_factory.mktemp("texts") / "any_texts.jsonl"
    write_texts(path, records)
    assert list(iter_texts(path)) == records


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_both_base64_alphabets_are_read(tmp_path: Path, encode: object) -> None:
    assert callable(encode)
    path = tmp_path / "train_imgs.tsv"
    path.write_bytes(b"4\t" + encode(BOTH_ALPHABETS) + b"\n")
    assert list(iter_images(path)) == [ImageRecord(4, BOTH_ALPHABETS)]


def test_reading_streams(tmp_path: Path) -> None:
    path = tmp_path / "train_imgs.tsv"
    path.write_bytes(b"1\tAAAA\nbroken\n")
    images = iter_images(path)
    assert next(images).image_id == 1
    with pytest.raises(InvalidInput, match=r"train_imgs\.tsv:2: "):
        next(images)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"2 AAAA\n", "no tab"),
        (b"2\t\n", "no tab"),
        (b"two\tAAAA\n", "image id is 'two'"),
        (b"1_0\tAAAA\n", "image id is '1_0'"),
        (b"9999999999999999999\tAAAA\n", "at most 18 digits"),
        (b"\xff\tAAAA\n", "image id"),
        (b"1\tAAAA\n", "image id 1 appears twice"),
        (b"2\tAAA\n", "bad base64"),
        (b"2\tAA*A\n", "bad base64"),
        (b"2\t\xe7\x8c\xab=\n", "bad base64"),
    ],
)
def test_malformed_image_lines_are_named(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "train_imgs.tsv"
    path.write_bytes(b"1\tAAAA\n" + line)
    with pytest.raises(InvalidInput, match=rf"train_imgs\.tsv:2: .*{said}"):
        list(iter_images(path))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{\n", "not valid JSON"),
        (b"[" * 100_000 + b"\n", "not valid JSON"),
        (b'{"text_id": ' + b"1" * 5000 + b"}\n", "not valid JSON"),
        (b'{"text_id": 1, "text": "\xff"}\n', "not UTF-8"),
        (text_line().decode().strip().encode("utf-16-le") + b"\n", "not valid JSON|not UTF-8"),
        (b"[1]\n", "expected an object"),
        (b'{"text_id": 1, "text": "x"}\n', "'image_ids' is missing"),
        (b'{"text_id": 1, "image_ids": []}\n', "'text' is missing"),
        (b'{"text": "x", "image_ids": []}\n', "'text_id' is missing"),
        (text_line(text_id="1"), "text_id is a str"),
        (text_line(text_id=True), "text_id is a bool"),
        (text_line(text_id=1.0), "text_id is a float"),
        (text_line(text=None), "text is a NoneType"),
        (text_line(text="\ud83d"), "surrogate"),
        (text_line(image_ids=7), "image_ids is a int"),
        (text_line(image_ids=["7"]), "other than integers"),
        (text_line(image_ids=[True]), "other than integers"),
        (text_line(image_ids=[7, 8]), "names 8, which is not in"),
        (text_line(text_id=0), "text_id 0 appears twice"),
    ],
)
def test_malformed_text_lines_are_named(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "train_texts.jsonl"
    path.write_bytes(text_line(text_id=0) + b"\n" + line)  # a blank line is skipped, and counted
    with pytest.raises(InvalidInput, match=rf"train_texts\.jsonl:3: .*({said})"):
        list(iter_texts(path, known_images=[7]))


@pytest.mark.parametrize("read", [iter_images, iter_texts])
def test_missing_empty_and_unreadable_files_are_named(tmp_path: Path, read: object) -> None:
    assert callable(read)
    (tmp_path / "empty").write_bytes(b"\n\n")
    with pytest.raises(InvalidInput, match="empty: empty, expected"):
        list(read(tmp_path / "empty"))
    with pytest.raises(InvalidInput, match="absent: there is no such file"):
        list(read(tmp_path / "absent"))
    with pytest.raises(InvalidInput, match="cannot be read"):
        list(read(tmp_path))


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "train_texts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + text_line())
    assert [record.text for record in iter_texts(path)] == ["猫"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "train_imgs.tsv"
    write_images(path, IMAGES)

    def failing() -> object:
        yield ImageRecord(1, b"new")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="fire"):
        write_images(path, failing())  # type: ignore[arg-type]
    assert list(iter_images(path)) == IMAGES
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_open_pairs_reads_tsv(tmp_path: Path) -> None:
    pairs = open_pairs(write_split(tmp_path), "train")
    assert (list(pairs.image_ids), list(pairs.texts)) == ([7, 3], TEXTS)
    assert pairs.image_bytes(3) == BOTH_ALPHABETS
    with pytest.raises(InvalidInput, match=r"train_imgs\.tsv: picture 4 is missing"):
        pairs.image_bytes(4)


def test_open_pairs_names_the_splits_there_are(tmp_path: Path) -> None:
    write_split(tmp_path, "train")
    for folder in ("lmdb/valid/pairs", "lmdb/.valid.killed/pairs"):  # the second is what a kill leaves
        (tmp_path / folder).mkdir(parents=True)
    assert splits_in(tmp_path) == {"train", "valid"}
    with pytest.raises(InvalidInput, match=r"no split 'test' .*splits there: train, valid$"):
        open_pairs(tmp_path, "test")
    with pytest.raises(InvalidInput, match="nowhere: there is no such folder of pairs"):
        open_pairs(tmp_path / "nowhere", "test")


def test_open_pairs_wants_both_files(tmp_path: Path) -> None:
    write_split(tmp_path)
    jsonl_path(tmp_path, "train").unlink()
    with pytest.raises(InvalidInput, match=r"train_texts\.jsonl: there is no such file"):
        open_pairs(tmp_path, "train")
