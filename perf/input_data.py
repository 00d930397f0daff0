"""What a scenario sends, as perf_analyzer's --input-data: a JSON file per stream, one request an entry."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from perf.scenario import ImageSection, Scenario, StreamKind, TextSection
from perf.workload import encode_jpeg, muge_like_texts, photographs


def write_inputs(scenario: Scenario, folder: Path) -> dict[StreamKind, Path]:
    """The input file of each stream; the same scenario gives the same bytes."""
    paths: dict[StreamKind, Path] = {}
    for kind in scenario.streams:
        section = scenario.text if kind == "text" else scenario.image
        assert section is not None  # the scenario has been validated
        entries = (
            _texts(section, scenario.seed) if isinstance(section, TextSection) else _images(section, scenario.seed)
        )
        paths[kind] = folder / f"{kind}_input.json"
        paths[kind].write_text(json.dumps({"data": entries}, ensure_ascii=False), encoding="utf-8")
    return paths


def _texts(section: TextSection, seed: int) -> list[dict[str, Any]]:
    texts = muge_like_texts(section.count, seed, section.median_characters, section.spread, section.max_characters)
    return [{"text": [text]} for text in texts]


def _images(section: ImageSection, seed: int) -> list[dict[str, Any]]:
    """JPEGs whose sizes come in the shares asked for to within one picture, in random order."""
    pictures = [picture for _, picture in photographs()]
    shares = np.cumsum([size.share for size in section.sizes])
    # Evenly spaced through the cumulated shares: a draw would miss a rare size, or hit it twice.
    places = (np.arange(section.count) + 0.5) / section.count * shares[-1]
    sizes = [section.sizes[index] for index in np.searchsorted(shares, places, side="right")]
    order = np.random.default_rng(seed).permutation(section.count)
    entries: list[dict[str, Any]] = []
    for number, index in enumerate(order):
        size = (sizes[index].width, sizes[index].height)
        jpeg = encode_jpeg(pictures[number % len(pictures)], size)
        content = {"b64": base64.b64encode(jpeg).decode("ascii")}
        entries.append({"image": {"content": content, "shape": [len(jpeg)]}})
    return entries
