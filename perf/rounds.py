"""A against B in one run: all sides in turn, several rounds over, and the median of each."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Threads of the side before stop spinning: ONNX Runtime's do so for a while, waiting for more.
_REST_S = 0.1
_TOOLS = ("torch", "onnxruntime", "nvidia-pytriton", "tritonclient", "numpy", "Pillow")


def rate_of(work: Callable[[], object], items: int) -> Callable[[], float]:
    """A side that does `work` on so many items: items per second."""

    def measure() -> float:
        started = time.perf_counter()
        work()
        return items / (time.perf_counter() - started)

    return measure


def milliseconds_of(work: Callable[[], object]) -> Callable[[], float]:
    """A side that does `work` once: milliseconds."""

    def measure() -> float:
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1000

    return measure


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each side measured in each round; a round runs every side once, in turn, each after a short rest.

    Every other round goes the other way, because whoever follows a side finds the caches as that side left them.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in reversed(list(sides)) if number % 2 else sides:
            time.sleep(_REST_S)
            found[name].append(sides[name]())
    return found


def medians(found: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in found.items()}


def median_ratio(found: Mapping[str, list[float]], side: str, base: str) -> float:
    """Median over rounds of side / base within a round, which cancels what slows a whole round down."""
    return statistics.median(a / b for a, b in zip(found[side], found[base], strict=True))


def median_difference(found: Mapping[str, list[float]], side: str, base: str) -> float:
    """Median over rounds of side - base within a round."""
    return statistics.median(a - b for a, b in zip(found[side], found[base], strict=True))


def machine() -> dict[str, Any]:
    """What a figure depends on: the processor, its cores, and the versions of what ran."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{tool: found for tool in _TOOLS if (found := _version(tool))},
    }


def _version(tool: str) -> str | None:
    """None where it is not installed: a machine that only sends requests needs neither torch nor a server."""
    try:
        return version(tool)
    except PackageNotFoundError:
        return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
