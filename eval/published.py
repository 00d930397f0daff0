"""The published figures of Chinese-CLIP, to hold ours beside: published_results.json, typed.

    published_zero_shot("ViT-B-16", "CIFAR10")   # 0.92

The file has them in per cent, as printed; what is returned is a fraction, as our own figures are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tuwen.specs import slugify

RESULTS_PATH = Path(__file__).with_name("published_results.json")

Setup = Literal["zero_shot", "fine_tuned"]
Direction = Literal["text_to_image", "image_to_text"]
Tower = Literal["image", "text"]
Runtime = Literal["pytorch", "onnx", "tensorrt"]


@dataclass(frozen=True)
class PublishedRecall:
    """Retrieval of one model on one set in one direction, as fractions."""

    model: str
    data: str
    split: str
    setup: Setup
    direction: Direction
    r1: float
    r5: float
    r10: float

    @property
    def mean_recall(self) -> float:
        return (self.r1 + self.r5 + self.r10) / 3


@dataclass(frozen=True)
class PublishedScore:
    """Zero-shot classification of one model on one task, a fraction by the task's own metric."""

    model: str
    task: str
    score: float


@dataclass(frozen=True)
class PublishedLatency:
    """One tower of one model on a T4, batch 1, fp16."""

    model: str
    tower: Tower
    engine: Runtime
    latency_ms: float


@dataclass(frozen=True)
class PublishedConversion:
    """MUGE's mean recall after conversion, a fraction."""

    model: str
    engine: Runtime
    mean_recall: float


@dataclass(frozen=True)
class PublishedResults:
    """All of the file."""

    source: str
    retrieval: tuple[PublishedRecall, ...]
    zero_shot: tuple[PublishedScore, ...]
    speed: tuple[PublishedLatency, ...]
    conversion: tuple[PublishedConversion, ...]


@cache
def load_published() -> PublishedResults:
    """Read the file that lies beside this one."""
    parsed: dict[str, Any] = json.loads(RESULTS_PATH.read_text(encoding="utf-8"))
    entries = {name: parsed[name]["entries"] for name in ("retrieval", "zero_shot", "speed", "conversion")}
    return PublishedResults(
        source=f"{parsed['source']['repository']}, {parsed['source']['paper']}",
        retrieval=tuple(PublishedRecall(**_as_fractions(entry)) for entry in entries["retrieval"]),
        zero_shot=tuple(PublishedScore(**_as_fractions(entry)) for entry in entries["zero_shot"]),
        speed=tuple(PublishedLatency(**entry) for entry in entries["speed"]),
        conversion=tuple(PublishedConversion(**_as_fractions(entry)) for entry in entries["conversion"]),
    )


def _as_fractions(entry: dict[str, Any]) -> dict[str, Any]:
    # Rounded, so that 57.0 per cent is the 0.57 that a reader types.
    return {key: round(value / 100, 6) if isinstance(value, float) else value for key, value in entry.items()}


def published_model(model_name: str) -> str | None:
    """The published model of this architecture, given its name or the name it is served under; None for others."""
    published = dict.fromkeys(one.model for one in load_published().zero_shot)
    return next((name for name in published if model_name in (name, slugify(name))), None)


def published_zero_shot(model_name: str, column: str) -> float | None:
    """The published score of a model in a column of the table, as a fraction."""
    model = published_model(model_name)
    found = (one.score for one in load_published().zero_shot if (one.model, one.task) == (model, column))
    return next(found, None)


def published_recall(
    model_name: str, data: str, direction: Direction, setup: Setup = "zero_shot"
) -> PublishedRecall | None:
    """The published retrieval figures of a model on a set; `data` as MUGE, Flickr30K-CN or COCO-CN."""
    model = published_model(model_name)
    wanted = (model, data, direction, setup)
    found = (one for one in load_published().retrieval if (one.model, one.data, one.direction, one.setup) == wanted)
    return next(found, None)
