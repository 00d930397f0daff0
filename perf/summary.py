"""What a bench run found: summary.json, its dataclasses, its reading and writing.

A load point holds every repeat, because the spread of the repeats is what tells a difference from noise.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from perf.analyzer import Loop, Measurement
from perf.scenario import Scenario, StreamKind
from perf.stages import Stage
from tuwen.errors import InvalidInput

FORMAT: Literal["tuwen-bench-1"] = "tuwen-bench-1"
FILE_NAME = "summary.json"
LATENCIES = ("avg", "p50", "p90", "p95", "p99")


@dataclass(frozen=True)
class Repeat:
    """One measurement of a load point, all its streams at the same time.

    Attributes:
        csv: perf_analyzer's file of each stream, relative to the summary.
        stages: the parts of the ensembles, from before the first request to after the last.
        refused: requests the server turned away.
        cache_hits: requests answered from Triton's cache, and not computed.
    """

    streams: dict[StreamKind, Measurement]
    csv: dict[StreamKind, str]
    stages: tuple[Stage, ...]
    refused: int
    cache_hits: int


@dataclass(frozen=True)
class Point:
    """One load and its repeats.

    Attributes:
        level: requests under way, requests a second, or a fraction of capacity, as the scenario says it.
        levels: what each stream's perf_analyzer was asked for: concurrency, or requests a second.
    """

    name: str
    loop: Loop
    level: float
    levels: dict[StreamKind, float]
    repeats: tuple[Repeat, ...]

    def measured(self, stream: StreamKind) -> list[Measurement]:
        """Of the repeats that gave figures."""
        return [repeat.streams[stream] for repeat in self.repeats if not repeat.streams[stream].failure]

    def throughputs(self, stream: StreamKind) -> list[float]:
        return [one.throughput for one in self.measured(stream)]

    def latencies(self, stream: StreamKind, which: str) -> list[float]:
        return [one.latency_ms[which] for one in self.measured(stream)]

    def medians(self, stream: StreamKind) -> dict[str, float] | None:
        """throughput and latencies in ms; None where no repeat gave figures."""
        if not self.measured(stream):
            return None
        found = {"throughput": statistics.median(self.throughputs(stream))}
        return found | {f"{which}_ms": statistics.median(self.latencies(stream, which)) for which in LATENCIES}

    def remarks(self, stream: StreamKind, stability_percent: float) -> list[str]:
        """What a reader must know about this row, a short phrase each."""
        failures = [repeat.streams[stream].failure for repeat in self.repeats if repeat.streams[stream].failure]
        measured = self.measured(stream)
        unsteady = sum(one.unsteadiness() * 100 > stability_percent for one in measured)
        late = statistics.median(one.delayed for one in measured) if measured else 0
        hits = sum(repeat.cache_hits for repeat in self.repeats)
        found = [f"{failures.count(one)} of {len(self.repeats)}: {one}" for one in dict.fromkeys(failures)]
        found += [f"unsteady: {unsteady} of {len(measured)}"] if unsteady else []
        # perf_analyzer counts a request as late from a thousandth of its interval on; a few are always.
        found += [f"{late:.0%} sent late"] if late >= 0.1 else []
        return found + ([f"{hits} answers from the cache"] if hits else [])


@dataclass(frozen=True)
class Summary:
    """A whole run.

    Attributes:
        scenario_text: the file as written.
        machine, versions: what the figures hold for.
        own_counters: stages are by the models' own counters, where they have some; else all by Triton's statistics.
    """

    format: Literal["tuwen-bench-1"]
    started_at: str
    scenario: Scenario
    scenario_text: str
    model: str
    fingerprint: int
    url: str
    machine: dict[str, Any]
    versions: dict[str, str]
    capacity: dict[StreamKind, float]
    points: tuple[Point, ...]
    own_counters: bool = False  # earlier runs do not say

    def remarks(self, point: Point, stream: StreamKind) -> list[str]:
        return point.remarks(stream, self.scenario.measure.stability_percent)


_ADAPTER = TypeAdapter(Summary)


def write_summary(summary: Summary, folder: Path) -> None:
    """With the medians beside the repeats, for whoever reads the file with other tools."""
    content = _ADAPTER.dump_python(summary, mode="json")
    for point, values in zip(summary.points, content["points"], strict=True):
        values["medians"] = {stream: point.medians(stream) for stream in summary.scenario.streams}
        values["remarks"] = {stream: summary.remarks(point, stream) for stream in summary.scenario.streams}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def read_summary(path: Path) -> Summary:
    """A summary.json, or the folder that holds one.

    Raises:
        InvalidInput: there is none, or the file is something else.
    """
    file = path / FILE_NAME if path.is_dir() else path
    try:
        values: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidInput(f"{file}: there is no such summary; `tuwen bench run` writes one") from None
    except OSError as error:
        raise InvalidInput(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError:  # no JSON, or no UTF-8
        raise InvalidInput(f"{file}: not a summary of `tuwen bench run`: no JSON") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InvalidInput(f"{file}: not a summary of `tuwen bench run`: expected format {FORMAT}")
    try:
        return _ADAPTER.validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"{file}: not a whole summary: {where}: {first['msg']}") from None
