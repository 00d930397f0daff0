"""Texts as bytes, most of them UTF-8: every Unicode plane, marks, controls, long words, and what is not UTF-8."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from perf.fuzz.mutations import flip_bits, truncate
from tuwen.tokenizer import MAX_TEXT_CHARS

NUM_PLANES = 17
_CHINESE = "一只黑色的猫坐在红沙发上看电视戴墨镜笑脸生日蛋糕城市夜景高清壁纸连衣裙"
_MARKS = [chr(code) for start, end in ((0x300, 0x370), (0x591, 0x5C8), (0x1AB0, 0x1AF0)) for code in range(start, end)]
_CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), 0xAD, *range(0x200B, 0x2010))]
_BIDI = [chr(code) for code in (0x61C, *range(0x202A, 0x202F), *range(0x2066, 0x206A))]
_EMOJI = ("😎", "👨", "👩", "👧", "❤️", "🇨", "🇳", "👍🏽", "🏴", "\U000e0067", "\ufe0f", "\u20e3")
_SPACES = [chr(code) for code in (9, 10, 13, 32, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x3000, 0xFEFF)]
_TRICKS = (
    "[CLS]",
    "[SEP]",
    "[PAD]",
    "[UNK]",
    "[MASK]",
    "##的",
    "“",
    "”",
    "İ",
    "ẞ",
    "ﬁ",
    "ǅ",
    "ﷺ",
    "\ufffd",
    "\ufffe",
    "\0",
)
_NOT_UTF8 = (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xe7\x8c", b"\x80")


def make_text(rng: Random, index: int) -> bytes:
    """The text of this input; `index` walks through the planes, `rng` decides the rest."""
    return rng.choice(_KINDS)(rng, index % NUM_PLANES)


def _of_plane(rng: Random, plane: int) -> bytes:
    """Code points of one plane, surrogates among them, which UTF-8 forbids."""
    codes = (plane * 0x10000 + rng.randrange(0x10000) for _ in range(rng.randint(1, 40)))
    return "".join(map(chr, codes)).encode("utf-8", "surrogatepass")


def _of_plane_in_chinese(rng: Random, plane: int) -> bytes:
    """As people would paste it: Chinese with strangers in between, no surrogates."""
    strangers = [chr(plane * 0x10000 + rng.randrange(0xD800)) for _ in range(5)]
    return "".join(rng.choices([*_CHINESE, *strangers], k=rng.randint(1, 60))).encode()


def _of_parts(rng: Random, plane: int) -> bytes:
    parts = [*_CHINESE, *_EMOJI, *_TRICKS, *rng.sample(_MARKS, 5), *rng.sample(_CONTROLS, 5), *_BIDI, *_SPACES]
    return "".join(rng.choices(parts, k=rng.randint(1, 80))).encode()


def _of_marks(rng: Random, plane: int) -> bytes:
    """One letter under a tower of combining marks, which normalisation has to sort."""
    return ("a" + "".join(rng.choices(_MARKS, k=rng.choice((3, 100, MAX_TEXT_CHARS - 1))))).encode()


def _of_joined_emoji(rng: Random, plane: int) -> bytes:
    return "\u200d".join(rng.choices(_EMOJI, k=rng.randint(1, 200))).encode()


def _of_space(rng: Random, plane: int) -> bytes:
    return "".join(rng.choices([*_SPACES, *_CONTROLS], k=rng.randrange(30))).encode()


def _long(rng: Random, plane: int) -> bytes:
    """Around the limit of characters, as one word and as many."""
    length = MAX_TEXT_CHARS + rng.choice((-1, 0, 1, 5000))
    parts = rng.choice((["a"], ["猫"], ["a", " "], ["é"], ["\U0002a6d6"], ["ﷺ"], ["１"], [".", "a"], list(_CHINESE)))
    return "".join(rng.choices(parts, k=length)).encode()


def _word(rng: Random, plane: int) -> bytes:
    """Words about as long as the vocabulary looks at."""
    return "".join(rng.choices("abcdefgé", k=rng.choice((99, 100, 101, 199, 200, 201, 2000)))).encode()


def _noise(rng: Random, plane: int) -> bytes:
    return rng.randbytes(rng.randrange(200))


def _damaged(rng: Random, plane: int) -> bytes:
    valid = _of_plane_in_chinese(rng, plane)
    broken = rng.choice((flip_bits, truncate))(rng, valid)
    at = rng.randrange(len(broken) + 1)
    return broken[:at] + rng.choice((b"", *_NOT_UTF8)) + broken[at:]


_KINDS: tuple[Callable[[Random, int], bytes], ...] = (
    _of_plane, _of_plane, _of_plane_in_chinese, _of_plane_in_chinese, _of_parts, _of_parts, _of_marks,
    _of_joined_emoji, _of_space, _long, _word, _noise, _damaged,
)  # fmt: skip
