"""model.json beside the packages: what an app must know of the model, in one file it can decode."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from builders.coreml_towers import Precision
from tuwen import __version__
from tuwen.files import write_text
from tuwen.specs import CLS_ID, PAD_ID, SEP_ID, UNK_ID
from tuwen.tokenizer import VOCAB_PATH

CARD_NAME = "model.json"
FORMAT = "tuwen-coreml-1"
# Packages whose version shapes the program.
_TOOLS = ("torch", "coremltools")


@dataclass(frozen=True)
class TowerCard:
    """One package, and what the gate found of it."""

    package: str
    input: str
    output: str
    size_bytes: int
    min_cosine_with_pytorch: float
    max_abs_diff_from_pytorch: float


@dataclass(frozen=True)
class Tokens:
    """What the tokenizer of the app needs beside the vocabulary."""

    vocabulary_sha256: str
    vocabulary: str = VOCAB_PATH.name
    pad_id: int = PAD_ID
    unk_id: int = UNK_ID
    cls_id: int = CLS_ID
    sep_id: int = SEP_ID


@dataclass(frozen=True)
class Card:
    """The model of one folder.

    Attributes:
        fingerprint: in decimal; a text, because not every JSON reader keeps 63 bits.
        logit_scale: the learned log; its exp scales cosines to logits.
        text_buckets: the lengths that the text tower takes, ascending; the last is context_length.
    """

    name: str
    architecture: str
    checkpoint: str
    fingerprint: str
    logit_scale: float
    embed_dim: int
    resolution: int
    context_length: int
    text_buckets: tuple[int, ...]
    precision: Precision
    minimum_ios: int
    image: TowerCard
    text: TowerCard
    tokens: Tokens
    format: str = FORMAT
    tools: dict[str, str] = field(
        default_factory=lambda: {"tuwen": __version__} | {tool: version(tool) for tool in _TOOLS}
    )


def write_card(card: Card, path: Path) -> None:
    """As JSON."""
    write_text(path, json.dumps(asdict(card), ensure_ascii=False, indent=2) + "\n")
