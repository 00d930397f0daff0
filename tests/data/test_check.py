"""`tuwen data check`: every kind of dirt is counted and named, and a clean set has nothing said about it."""

from __future__ import annotations

import base64
import io
import json
import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import tuwen.data.check as check
from tests.shapes import MemoryPairs, draw_shape, shape_pairs, write_pairs
from tuwen.cli.data import data_app
from tuwen.data.check import Finding, RepeatedCaption, Report, check_pairs
from tuwen.data.lmdb import write_lmdb
from tuwen.data.pairs import TextRecord
from tuwen.errors import InvalidInput, TuwenError


def other_file_of(encoded: bytes) -> bytes:
    """The same pixels in another file."""
    file = io.BytesIO()
    Image.open(io.BytesIO(encoded)).save(file, "BMP")
    return file.getvalue()


RED, GREEN = draw_shape("红", "圆"), draw_shape("绿", "圆")
DIRTY = MemoryPairs(
    {
        1: RED,
        2: GREEN,
        3: RED,
        4: other_file_of(RED),
        5: b"no picture",
        6: draw_shape("蓝", "圆")[:60],
        7: draw_shape("黄", "圆"),
    },
    [
        TextRecord(10, "红圆", (1, 3)),
        TextRecord(11, " 红圆 ", (4,)),
        TextRecord(12, "绿圆", (2,)),
        TextRecord(13, " \t", (5,)),
        TextRecord(14, "长" * 60, (6,)),
        TextRecord(15, "没有图", ()),
    ],
)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_that_is_off_is_found(num_workers: int, tmp_path: Path) -> None:
    """In this process or in others, where what they find comes back in order."""
    write_pairs(tmp_path, "train", DIRTY)
    report = check_pairs(tmp_path, "train", num_workers=num_workers)
    assert (report.num_pictures, report.num_captions, report.num_pairs) == (7, 6, 6)
    assert report.unreadable.count == 2
    assert [one.image_id for one in report.unreadable.examples] == [5, 6]
    assert "not a readable picture" in report.unreadable.examples[0].reason
    assert "truncated" in report.unreadable.examples[1].reason
    assert report.same_file == Finding(1, ((1, 3),))
    assert report.same_pixels == Finding(2, ((1, 3, 4),))
    assert report.empty == Finding(1, (13,))
    assert report.repeated == Finding(1, (RepeatedCaption("红圆", 3),))
    assert report.repeated_share == 3 / 5  # of the pairs that have a caption
    assert report.truncated == Finding(1, (14,))
    assert report.without_caption == Finding(1, (7,))
    assert report.without_picture == Finding(1, (15,))
    assert report.tokens == {2: 1, 4: 3, 5: 1, 62: 1}
    assert len(report.advice) == 7
    assert "data.max_corrupt = 2" in report.advice[0]


def test_one_picture_with_a_caption_twice_is_no_repetition(tmp_path: Path) -> None:
    texts = [TextRecord(1, "红圆", (1,)), TextRecord(2, "红圆", (1,)), TextRecord(3, "绿圆", (2,))]
    write_pairs(tmp_path, "train", MemoryPairs({1: RED, 2: GREEN}, texts))
    report = check_pairs(tmp_path, "train", num_workers=0)
    assert (report.repeated, report.repeated_share, report.advice) == (Finding(0), 0.0, [])


def test_the_worst_repetitions_come_first(tmp_path: Path) -> None:
    """Two pictures are several."""
    texts = [TextRecord(1, "圆", (1, 2)), TextRecord(2, "图", (1, 2, 3)), TextRecord(3, "红圆", (1,))]
    write_pairs(tmp_path, "train", MemoryPairs({1: RED, 2: GREEN, 3: draw_shape("黑", "圆")}, texts))
    report = check_pairs(tmp_path, "train", num_workers=0)
    assert report.repeated == Finding(2, (RepeatedCaption("图", 3), RepeatedCaption("圆", 2)))
    assert report.repeated_share == 5 / 6


def test_the_context_length_decides_what_is_cut(tmp_path: Path) -> None:
    """A caption that just fits is whole."""
    write_pairs(tmp_path, "train", DIRTY)
    assert check_pairs(tmp_path, "train", 62, num_workers=0).truncated == Finding(0)
    assert check_pairs(tmp_path, "train", 61, num_workers=0).truncated == Finding(1, (14,))


def test_examples_are_few_and_counts_are_all(tmp_path: Path) -> None:
    images = {number: b"no picture %d" % number for number in range(100)}
    write_pairs(tmp_path, "train", MemoryPairs(images, [TextRecord(0, "图", tuple(images))]))
    told: list[tuple[int, int, str]] = []
    report = check_pairs(tmp_path, "train", num_workers=1, on_progress=lambda *news: told.append(news))
    assert (report.unreadable.count, len(report.unreadable.examples)) == (100, check.MAX_EXAMPLES)
    assert (100, 100, "decoding pictures") in told


def test_an_lmdb_is_checked_too(tmp_path: Path) -> None:
    """It has no captions without a picture; all else is the same."""
    write_pairs(tmp_path, "train", DIRTY)
    plain = check_pairs(tmp_path, "train", num_workers=0)
    write_lmdb(tmp_path, "train", tmp_path / "packed")
    packed = check_pairs(tmp_path / "packed", "train", num_workers=2)
    assert packed.num_captions == plain.num_captions - 1
    for name in ("unreadable", "same_file", "same_pixels", "empty", "repeated", "repeated_share", "without_caption"):
        assert getattr(packed, name) == getattr(plain, name), name


def die(image_ids: list[int]) -> None:
    os._exit(1)


def test_a_process_that_dies_over_a_picture_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a fault in a decoder would end it; nothing hangs."""
    write_pairs(tmp_path, "train", shape_pairs())
    monkeypatch.setattr(check, "_look_at", die)
    with pytest.raises(TuwenError, match=r"^a process died while it decoded pictures, around id 100: ") as told:
        check_pairs(tmp_path, "train", num_workers=1)
    assert not isinstance(told.value, BrokenProcessPool)


def test_what_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no split 'train'"):
        check_pairs(tmp_path, "train")


# --- the command ----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str]:
    ended = CliRunner().invoke(data_app, list(arguments), env={"COLUMNS": "200"})
    return ended.exit_code, ended.stdout


def test_the_command_exits_0_whatever_it_finds(tmp_path: Path) -> None:
    """With a row a kind, bars of lengths, and a sentence for each thing that is off."""
    write_pairs(tmp_path, "train", DIRTY)
    status, out = run("check", "--data", str(tmp_path), "--workers", "0")
    assert status == 0
    assert "7 pictures, 6 captions, 6 pairs" in out
    (row,) = [line for line in out.splitlines() if "pictures that cannot be read " in line and "28.6%" in line]
    assert "5: image is not" in row
    assert "红圆 (3)" in out
    assert out.count("█") > 40
    assert "data.distinct_captions" in out


def test_a_clean_set_has_nothing_off(tmp_path: Path) -> None:
    texts = [TextRecord(1, "红圆", (1,)), TextRecord(2, "[red]绿圆[/x]", (2,))]
    write_pairs(tmp_path, "train", MemoryPairs({1: RED, 2: GREEN}, texts))
    status, out = run("check", "--data", str(tmp_path), "--workers", "0")
    assert (status, out.splitlines()[-1]) == (0, "Nothing is off.")


def test_json_is_all_of_the_report(tmp_path: Path) -> None:
    write_pairs(tmp_path, "train", DIRTY)
    status, out = run("check", "--data", str(tmp_path), "--workers", "0", "--json")
    result = json.loads(out)
    assert status == 0
    assert set(result) == {*Report.__dataclass_fields__, "advice"}
    assert result["repeated"] == {"count": 1, "examples": [["红圆", 3]]}


def test_shards_are_written_by_the_command(tmp_path: Path) -> None:
    write_pairs(tmp_path, "train", shape_pairs())
    status, out = run("shards", "--data", str(tmp_path), "--out", str(tmp_path / "s"), "--shards", "2")
    assert status == 0
    assert f'data.shards = "{tmp_path}/s/train/*.tsv"' in out
    lines = [line for path in sorted((tmp_path / "s" / "train").glob("*.tsv")) for line in path.open("rb")]
    assert len(lines) == 40
    assert base64.b64decode(lines[0].split(b"\t")[1]).startswith(b"\x89PNG")
