"""Bench runs as they would be read from a summary.json, with figures a test chooses."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence

from perf.analyzer import Measurement, Window
from perf.scenario import Scenario
from perf.stages import Stage
from perf.summary import FORMAT, Point, Repeat, Summary

Figures = tuple[float, float, float]  # throughput, p50, p99

SCENARIO = """
name = "made_up"
kind = "text"
[text]
[load]
concurrencies = [1, 16]
capacity_fractions = [0.5]
"""


def measurement(throughput: float, p50: float, p99: float) -> Measurement:
    latency_ms = {"avg": p50 * 1.1, "p50": p50, "p90": p50 * 1.5, "p95": p50 * 1.8, "p99": p99}
    return Measurement(throughput, latency_ms, tuple(Window(throughput, p50) for _ in range(3)))


def repeat(found: Measurement, refused: int = 0) -> Repeat:
    stage = Stage("tiny_text_tower", 321, 4.5, 1.25, 0.05, 2.75, 0.125)
    return Repeat({"text": found}, {"text": "csv/one.csv"}, (stage,), refused, 0)


def summary(figures: Mapping[str, Sequence[Figures | str]], level: float = 50.0) -> Summary:
    """Load name -> figures of each repeat, or the reason why there are none; `level` is what open loops asked for."""
    points = []
    for name, rows in figures.items():
        loop, _, rest = name.partition(" ")
        asked = float(rest.split()[0]) if loop == "closed" else level
        measured = [Measurement(0, {}, (), failure=row) if isinstance(row, str) else measurement(*row) for row in rows]
        repeats = tuple(repeat(one, refused=7 if one.failure else 0) for one in measured)
        points.append(
            Point(name, "closed" if loop == "closed" else "open", float(rest.split()[0]), {"text": asked}, repeats)
        )
    return Summary(
        format=FORMAT,
        started_at="2026-01-02 03:04:05 +0000",
        scenario=Scenario.model_validate(tomllib.loads(SCENARIO)),
        scenario_text=SCENARIO,
        model="tiny",
        fingerprint=4711,
        url="127.0.0.1:8001",
        machine={"cpu": "Some CPU", "cores": 2},
        versions={"tuwen": "0.1.0", "triton server": "2.51.0"},
        capacity={"text": 100.0},
        points=tuple(points),
    )
