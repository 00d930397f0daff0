"""Ids equal cn_clip's; bounds and normalisation."""

from __future__ import annotations

import random
import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tuwen
from tuwen.errors import InvalidInput
from tuwen.tokenizer import MAX_TEXT_CHARS, check_text, default_tokenizer, normalize_text

_CHINESE = "一只黑色的猫坐在红沙发上看电视戴墨镜笑脸生日蛋糕城市夜景高清壁纸连衣裙手机壳新款包邮"
_TRADITIONAL = "臺灣繁體貓鳥龜齒憂鬱龍書畫學習開關門"
_LATIN = ("iPhone 15 Pro", "naïve café", "Ünïcödé", "unaffable", "1080P/60fps", "İstanbul", "ΑΣ ΟΔΟΣ", "ﬁne", "x" * 250)
_EMOJI = ("😎", "👨‍👩‍👧‍👦", "🇨🇳", "👍🏽", "❤️")
_PUNCTUATION = "，。！？、；：“”‘’（）《》【】—…·～￥%@#$^&*_+=`|\\<>[]{}"
_SPACES = "  \t\n\r\u3000\u00a0\u2009\u200b\ufeff\u2028\u0085\x00\x1f\ufffd\u00ad\u202e"
_RARE = "\U00020000\U0002b820\U0002ceaf㐀鿿豈\U0002f800가힣かなカナ\ue000\U000e0001\u0378\u0301\u20dd"


def varied_lines(count: int) -> list[str]:
    """Deterministic mixtures of everything a search box sees, and much that it does not."""
    rng = random.Random(0)
    parts = [
        *_CHINESE,
        *_TRADITIONAL,
        *_LATIN,
        *_EMOJI,
        *_PUNCTUATION,
        *_SPACES,
        *_RARE,
        "ＡＢＣ１２３",
        "ｶﾞ",
        "[CLS]",
        "##的",
    ]
    lines = ["", " ", "[PAD][UNK][SEP][MASK]", "猫" * 500, "a" * 200, "a" * 201, "“引号”"]
    for _ in range(count // 2):
        lines.append("".join(rng.choices(parts, k=rng.randint(1, 30))))
    while len(lines) < count:
        codepoints = (rng.randrange(1, sys.maxunicode) for _ in range(rng.randint(1, 20)))
        lines.append("".join(chr(code) for code in codepoints if not 0xD800 <= code < 0xE000))
    return lines


def test_ids_equal_cn_clip_on_20000_varied_lines(cn_clip: ModuleType) -> None:
    lines = varied_lines(20_000)
    ours, theirs = tuwen.tokenize(lines), cn_clip.tokenize(lines)
    assert ours.dtype == theirs.dtype
    differing = [line for line, mine, published in zip(lines, ours, theirs, strict=True) if not mine.equal(published)]
    assert not differing, differing[:3]


@pytest.mark.parametrize("context_length", [3, 10, 77])
def test_truncation_equals_cn_clip(cn_clip: ModuleType, context_length: int) -> None:
    lines = varied_lines(500)
    assert tuwen.tokenize(lines, context_length).equal(cn_clip.tokenize(lines, context_length))


def test_a_single_string_is_one_row() -> None:
    assert tuwen.tokenize("一只猫").shape == (1, 52)
    assert tuwen.tokenize("一只猫")[0, :6].tolist() == [101, 671, 1372, 4344, 102, 0]


def test_published_normalisation_saves_curly_quotes_from_unk() -> None:
    unknown = 100
    encode = default_tokenizer().encode_ids
    assert unknown in encode("“猫”")
    assert unknown not in encode(normalize_text("“猫”"))
    assert normalize_text("“ABC”") == '"abc"'


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300))
def test_any_text_gives_a_bounded_well_formed_row(text: str) -> None:
    ids = default_tokenizer().encode_ids(text)
    assert ids[0] == 101
    assert ids[-1] == 102
    assert 2 <= len(ids) <= 52
    assert 0 not in ids


def test_rows_are_padded_to_the_length_asked_for() -> None:
    rows = default_tokenizer().encode(["猫", "一只猫"], length=8)
    assert rows.dtype == np.int64
    assert rows.shape == (2, 8)
    assert (rows[0, 3:] == 0).all()


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "empty"),
        (" \u3000".encode(), "empty"),
        (b"\xff\xfe", "UTF-8"),
        (b"a" * (MAX_TEXT_CHARS + 1), "characters"),
    ],
)
def test_a_request_text_that_cannot_be_used_says_why(encoded: bytes, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        check_text(encoded)


def test_a_text_that_is_no_string_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"texts\[1\] is a int"):
        tuwen.tokenize(["猫", 3])  # type: ignore[list-item]


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(InvalidInput, match="context_length 2"):
        tuwen.tokenize("猫", context_length=2)
