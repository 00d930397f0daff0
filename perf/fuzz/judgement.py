"""What counts as a good answer: an embedding's input as the contract says, or one clean sentence from our own list."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tuwen.specs import CLS_ID, CONTEXT_LENGTH, SEP_ID

# The sentences of tuwen/tokenizer.py and tuwen/image_transform.py, and the outcome table's words. The first match
# counts.
_REFUSALS = {
    "text is not valid UTF-8": "not UTF-8",
    "text is empty": "empty text",
    "text has": "text too long",
    "image is empty": "empty image",
    "image is not a readable picture file": "no picture file",
    "image cannot be decoded": "cannot be decoded",
    "the limit of a side": "side too long",
    "pixels, the limit": "too many pixels",
    "expected at least 1 x 1": "no pixels",
    "too many parts": "too many parts",
    "plain-text PPM": "plain-text PPM too large",
    "frames, the limit": "too many frames",
    "JPEG scans": "too many scans",
}
_MAX_SENTENCE_CHARS = 400
# A path, a traceback, an object's address: nothing that tells of the server's inside.
_INSIDE = re.compile(r"Traceback|\.py\b|\bFile \"|/\w+/|\b0x[0-9a-f]{4,}|<[\w.]+ object|object at ")
# Two pages of allocators differ from run to run; 200,000 inputs that each lose 200 bytes lose 19 MiB a worker.
MAX_GROWTH_MIB = 16.0


class BadAnswer(Exception):
    """An answer that breaks the contract; the message says how."""


def refusal_class(sentence: str) -> str:
    """The outcome table's name for a refusal.

    Raises:
        BadAnswer: it is none of ours, or says what it should not.
    """
    if found := _INSIDE.search(sentence):
        raise BadAnswer(f"sentence shows {found.group()!r}: {sentence[:_MAX_SENTENCE_CHARS]}")
    if not sentence.isprintable() or len(sentence) > _MAX_SENTENCE_CHARS or sentence.rstrip().endswith(":"):
        raise BadAnswer(f"no clean sentence: {sentence[:_MAX_SENTENCE_CHARS]!r}")
    for phrase, name in _REFUSALS.items():
        if phrase in sentence:
            return name
    raise BadAnswer(f"unknown sentence: {sentence}")


def check_pixels(outputs: dict[str, npt.NDArray[Any]], resolution: int) -> None:
    pixels = outputs["pixel_values"]
    _expect(pixels.dtype == np.float32 and pixels.shape == (1, 3, resolution, resolution), "pixel_values' form")
    _expect(bool(np.isfinite(pixels).all()) and float(np.abs(pixels).max()) < 3, "pixel_values' range")


def check_ids(outputs: dict[str, npt.NDArray[Any]], vocab_size: int) -> None:
    ids = outputs["input_ids"]
    _expect(ids.dtype == np.int64 and ids.shape[0] == 1 and 2 <= ids.shape[1] <= CONTEXT_LENGTH, "input_ids' form")
    _expect(ids[0, 0] == CLS_ID and ids[0, -1] == SEP_ID, "input_ids begin with [CLS] and end with [SEP]")
    _expect(bool(((ids > 0) & (ids < vocab_size)).all()), "input_ids are in the vocabulary")
    _expect(outputs["num_tokens"].tolist() == [[ids.shape[1]]], "num_tokens")
    _expect(outputs["truncated"].dtype == np.bool_, "truncated")


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise BadAnswer(f"answer breaks the contract: {what}")


@dataclass(frozen=True)
class MemoryUse:
    """Resident memory of one process over a run, after warm-up."""

    name: str
    start_mib: float
    median_mib: float
    end_mib: float

    @property
    def is_flat(self) -> bool:
        return self.end_mib - self.start_mib <= MAX_GROWTH_MIB

    def __str__(self) -> str:
        verdict = "flat" if self.is_flat else f"GROWS by more than {MAX_GROWTH_MIB:g} MiB"
        return f"{self.name}: {self.start_mib:.0f} / {self.median_mib:.0f} / {self.end_mib:.0f} MiB, {verdict}"


def judge_memory(name: str, samples_mib: Sequence[float]) -> MemoryUse | None:
    """Start, median and end after the first fifth, in which caches fill; each end is a median of a tenth.

    None where there are too few samples to say anything.
    """
    warm = samples_mib[len(samples_mib) // 5 :]
    tenth = len(warm) // 10
    if tenth == 0:
        return None
    median = statistics.median
    return MemoryUse(name, median(warm[:tenth]), median(warm), median(warm[-tenth:]))
