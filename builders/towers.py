"""What every export has in common: the two towers, the refusal, and the real input that the gates run on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tuwen.data.pairs import open_pairs
from tuwen.errors import TuwenError
from tuwen.tokenizer import normalize_text

TowerKind = Literal["text", "image"]
TOWERS: tuple[TowerKind, ...] = ("text", "image")

# The sample pictures and captions that ship with the checkout, so that parity is measured on real input anywhere.
SAMPLES_DIR = Path(__file__).parent.parent / "samples" / "emoji_cn"


class ExportFailed(TuwenError):
    """A tower could not be exported, or the export does not compute what PyTorch computes."""


def sample_pictures(number: int, folder: Path = SAMPLES_DIR, split: str = "valid") -> list[bytes]:
    """That many picture files, spread over a set of pairs."""
    pairs = open_pairs(folder, split)
    step = max(len(pairs.image_ids) // number, 1)
    return [pairs.image_bytes(one) for one in list(pairs.image_ids)[::step][:number]]


def sample_captions(number: int, folder: Path = SAMPLES_DIR, split: str = "valid") -> list[str]:
    """That many captions, normalised as in training, spread over a set of pairs."""
    texts = open_pairs(folder, split).texts
    return [normalize_text(record.text) for record in texts[:: max(len(texts) // number, 1)]][:number]
