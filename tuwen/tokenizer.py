"""Chinese text -> input_ids int64 (N, L), with the ids of Chinese-CLIP's BERT vocabulary. No torch.

    Tokenizer().encode(["一只猫"])  ->  [[101, 671, 1372, 4344, 102, 0, ...]]

Splitting into words follows BERT's published rules with Python's own Unicode tables, so that every id equals
cn_clip's; the word pieces themselves come from the `tokenizers` library.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as WordPieceTokenizer
from tokenizers.models import WordPiece

from tuwen.errors import InvalidInput
from tuwen.specs import CLS_ID, CONTEXT_LENGTH, PAD_ID, SEP_ID

VOCAB_PATH = Path(__file__).parent / "vocab.txt"

# A caption is cut to 52 tokens; nobody's query is longer than this, and the bound keeps one request cheap.
MAX_TEXT_CHARS = 4096

# The vocabulary knows 8,012 characters.
MAX_TABLE_ENTRIES = 2**15

# The ideograph blocks BERT separates by spaces; source: google-research/bert tokenization.py.
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def normalize_text(text: str) -> str:
    """The published normalisation of training, evaluation and serving: lower case, curly quotes to straight ones.

    Without it “ and ” become [UNK]. Source: Chinese-CLIP cn_clip/training/data.py.
    """
    return text.lower().replace("“", '"').replace("”", '"')


def check_text(encoded: bytes) -> str:
    """The text of a request, from its UTF-8 bytes.

    Raises:
        InvalidInput: not UTF-8, blank, or above MAX_TEXT_CHARS.
    """
    try:
        text = encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"text is not valid UTF-8 (byte {error.start} of {len(encoded)})") from None
    if not text.strip():
        raise InvalidInput("text is empty, expected at least one character")
    if len(text) > MAX_TEXT_CHARS:
        raise InvalidInput(f"text has {len(text)} characters, the limit is {MAX_TEXT_CHARS}")
    return text


class _Table(dict[int, str | None]):
    """str.translate table that fills itself, and forgets all when it holds more than any language writes.

    Without that bound a stream of odd characters would fill a server's memory: 1.1 million entries a table.
    """

    def __missing__(self, codepoint: int) -> str | None:
        if len(self) >= MAX_TABLE_ENTRIES:
            self.clear()
        self[codepoint] = replacement = self._replacement(codepoint)
        return replacement

    def _replacement(self, codepoint: int) -> str | None:
        raise NotImplementedError


class _CleanTable(_Table):
    """Control characters vanish, white space becomes a space, ideographs stand alone."""

    def _replacement(self, codepoint: int) -> str | None:
        char = chr(codepoint)
        category = unicodedata.category(char)
        if char in "\t\n\r" or category == "Zs":
            return " "
        if codepoint in (0, 0xFFFD) or category in ("Cc", "Cf"):
            return None
        return f" {char} " if any(low <= codepoint <= high for low, high in _IDEOGRAPHS) else char


class _SplitTable(_Table):
    """Accents vanish, punctuation stands alone."""

    def _replacement(self, codepoint: int) -> str | None:
        char = chr(codepoint)
        category = unicodedata.category(char)
        # Every ASCII character that is neither letter nor digit counts as punctuation, "$" and "^" too.
        is_punctuation = category.startswith("P") or (33 <= codepoint <= 126 and not char.isalnum())
        return None if category == "Mn" else f" {char} " if is_punctuation else char


_CLEAN, _SPLIT = _CleanTable(), _SplitTable()


def split_words(text: str) -> list[str]:
    """BERT's basic tokenisation, lower-casing: words, single ideographs and single punctuation marks."""
    words = (unicodedata.normalize("NFD", word.lower()).translate(_SPLIT) for word in text.translate(_CLEAN).split())
    return " ".join(words).split()


class Tokenizer:
    """Word pieces over vocab.txt; one instance is safe to share between threads."""

    def __init__(self, vocab_path: Path = VOCAB_PATH) -> None:
        # Not splitlines(): the vocabulary holds line separators other than \n as tokens.
        with open(vocab_path, encoding="utf-8", newline="\n") as lines:
            vocab = {line.strip(): index for index, line in enumerate(lines)}
        self._pieces = WordPieceTokenizer(WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=200))

    def encode_ids(self, text: str, context_length: int = CONTEXT_LENGTH) -> list[int]:
        """[CLS] + at most context_length - 2 word pieces + [SEP], unpadded."""
        return self.encode_checked(text, context_length)[0]

    def encode_checked(self, text: str, context_length: int = CONTEXT_LENGTH) -> tuple[list[int], bool]:
        """What `encode_ids` gives, and whether the text had to be cut."""
        words, room = split_words(text), context_length - 2
        # More words than fit are cut before the word pieces, which costs nothing: a word is at least one piece.
        fitting = words[:room]
        ids = self._pieces.encode(fitting, is_pretokenized=True, add_special_tokens=False).ids if fitting else []
        return [CLS_ID, *ids[:room], SEP_ID], len(words) > room or len(ids) > room

    def encode(
        self, texts: Sequence[str], context_length: int = CONTEXT_LENGTH, length: int | None = None
    ) -> npt.NDArray[np.int64]:
        """input_ids int64 (N, L), padded with 0 to `length`, by default to `context_length`.

        Raises:
            InvalidInput: context_length is below 3, or a text is not a string.
        """
        if context_length < 3:
            raise InvalidInput(f"context_length {context_length}: expected at least 3, for [CLS], one token and [SEP]")
        rows = []
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise InvalidInput(f"texts[{index}] is a {type(text).__name__}, expected a string")
            rows.append(self.encode_ids(text, context_length))
        return pad_rows(rows, length or context_length)


def pad_rows(rows: Sequence[Sequence[int]], length: int) -> npt.NDArray[np.int64]:
    """int64 (N, length) of `rows`, each filled up with [PAD]."""
    input_ids = np.full((len(rows), length), PAD_ID, dtype=np.int64)
    for row, ids in zip(input_ids, rows, strict=True):
        row[: len(ids)] = ids
    return input_ids


def pack_rows(rows: Sequence[Sequence[int]]) -> dict[str, npt.NDArray[Any]]:
    """`rows` end to end without padding, under the names of the served text tower's inputs.

    Returns:
        input_ids int64 (T,); text_offsets int32 (B + 1,), where each text begins, and T; longest_text int32 (L,), zeros
        of which only the shape counts. On the server Triton's ragged batching makes the last two.
    """
    lengths = [len(row) for row in rows]
    return {
        "input_ids": np.fromiter((id for row in rows for id in row), np.int64, sum(lengths)),
        "text_offsets": np.cumsum([0, *lengths], dtype=np.int32),
        "longest_text": np.zeros(max(lengths), np.int32),
    }


@lru_cache(maxsize=1)
def default_tokenizer() -> Tokenizer:
    """The one tokenizer over the vocabulary that ships with the library."""
    return Tokenizer()
