"""Where a request's time goes in the server: queue, input, infer, output.

Triton's own inference statistics, and, for the models whose requests wait in their own process
(tuwen/serving/queued_model.py), the counters that these tell: of them Triton sees the hand-over only.
"""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tritonclient.grpc as triton

from tuwen.errors import TuwenError

Counters = Mapping[str, Mapping[str, float]]  # model -> name of a counter -> its value
_COUNTER = re.compile(r'^tuwen_(\w+)_total\{model="([^"]+)"\} (\S+)$', re.MULTILINE)
_TOLD_AFTER_S = 1.3  # models tell their counters once a second
_TIMEOUT_S = 10


class MetricsUnavailable(TuwenError):
    """Nothing answers at the address of the metrics."""


@dataclass(frozen=True)
class Statistics:
    """One reading: Triton's ModelStatistics of every model, and the counters of those that have some."""

    models: Mapping[str, Any]
    counters: Counters


@dataclass(frozen=True)
class Stage:
    """One model over a stretch of time: requests, mean batch, and milliseconds.

    Attributes:
        queue_ms: a request's wait.
        input_ms: gathering a batch's tensors; with a queue of its own: until the model's process has the request.
        infer_ms: of the batch, all of which a request in it spends there.
        output_ms: handing the answers out; 0 where the model's process does that, untimed.
    """

    model: str
    requests: int
    mean_batch: float
    queue_ms: float
    input_ms: float
    infer_ms: float
    output_ms: float

    @staticmethod
    def header() -> str:
        return (
            f"  {'model':24s} requests  batch   queue   input   infer  output  (ms a request; infer: ms of its batch)"
        )

    def row(self) -> str:
        times = "  ".join(f"{ms:6.2f}" for ms in (self.queue_ms, self.input_ms, self.infer_ms, self.output_ms))
        return f"  {self.model:24s} {self.requests:8d} {self.mean_batch:6.2f}  {times}"


def read_statistics(url: str, metrics_url: str | None) -> Statistics:
    """Now; `settle` first, if something was asked just before.

    Args:
        metrics_url: None leaves the counters out, and all figures to Triton.
    Raises:
        MetricsUnavailable: nothing answers there.
    """
    with triton.InferenceServerClient(url) as server:
        models = {entry.name: entry for entry in server.get_inference_statistics().model_stats}
    return Statistics(models, read_counters(metrics_url) if metrics_url else {})


def settle() -> None:
    """Wait until the models have told all that they have counted."""
    time.sleep(_TOLD_AFTER_S)


def read_counters(metrics_url: str) -> Counters:
    """What the models themselves tell.

    Raises:
        MetricsUnavailable: nothing answers there.
    """
    try:
        with urllib.request.urlopen(metrics_url, timeout=_TIMEOUT_S) as answer:
            page = answer.read().decode()
    except (OSError, ValueError) as error:  # ValueError: no URL, or no text
        raise MetricsUnavailable(f"no metrics at {metrics_url}: {error}") from error
    found: dict[str, dict[str, float]] = {}
    for name, model, value in _COUNTER.findall(page):
        found.setdefault(model, {})[name] = float(value)
    return found


def measure_stages(before: Statistics, after: Statistics, models: Sequence[str]) -> list[Stage]:
    """What happened between two readings, for models that were asked at least once."""
    return [
        _own_stage(before, after, model)
        if "batches" in after.counters.get(model, {})
        else _triton_stage(before, after, model)
        for model in models
    ]


def _triton_stage(before: Statistics, after: Statistics, model: str) -> Stage:
    old, new = before.models[model], after.models[model]
    requests = new.inference_count - old.inference_count
    executions = new.execution_count - old.execution_count

    def per_request(which: str) -> float:
        nanoseconds = getattr(new.inference_stats, which).ns - getattr(old.inference_stats, which).ns
        return float(nanoseconds) / 1e6 / max(requests, 1)

    times = (per_request(which) for which in ("queue", "compute_input", "compute_infer", "compute_output"))
    return Stage(model, requests, requests / max(executions, 1), *times)


def _own_stage(before: Statistics, after: Statistics, model: str) -> Stage:
    hand_over = _triton_stage(before, after, model)

    def increase(name: str) -> float:
        return after.counters[model][name] - before.counters[model][name]

    requests, batches = increase("batch_items"), increase("batches")
    return Stage(
        model,
        round(requests),
        requests / max(batches, 1),
        queue_ms=increase("queue_duration_us") / 1000 / max(requests, 1),
        input_ms=hand_over.queue_ms + hand_over.input_ms + hand_over.infer_ms + hand_over.output_ms,
        infer_ms=increase("compute_duration_us") / 1000 / max(batches, 1),
        output_ms=0.0,
    )
