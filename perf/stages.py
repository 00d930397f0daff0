"""Where a request's time goes in the server, by Triton's own inference statistics: queue, input, infer, output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tritonclient.grpc as triton
from tuwen_client import Client

Statistics = dict[str, Any]  # model -> Triton's ModelStatistics


@dataclass(frozen=True)
class Stage:
    """One model over a stretch of time: milliseconds per request, and requests per execution."""

    model: str
    requests: int
    mean_batch: float
    queue_ms: float
    input_ms: float
    infer_ms: float
    output_ms: float

    @staticmethod
    def header() -> str:
        return f"  {'model':24s} requests  batch   queue   input   infer  output  (ms per request)"

    def row(self) -> str:
        times = "  ".join(f"{ms:6.2f}" for ms in (self.queue_ms, self.input_ms, self.infer_ms, self.output_ms))
        return f"  {self.model:24s} {self.requests:8d} {self.mean_batch:6.2f}  {times}"


def read_statistics(client: Client) -> Statistics:
    return read_statistics_at(client.url)


def read_statistics_at(url: str) -> Statistics:
    with triton.InferenceServerClient(url) as server:
        return {entry.name: entry for entry in server.get_inference_statistics().model_stats}


def measure_stages(before: Statistics, after: Statistics, models: Sequence[str]) -> list[Stage]:
    """What happened between two readings, for models that were asked at least once."""
    return [_stage(before[model], after[model]) for model in models]


def _stage(before: Any, after: Any) -> Stage:
    requests = after.inference_count - before.inference_count
    executions = after.execution_count - before.execution_count

    def per_request(which: str) -> float:
        nanoseconds = getattr(after.inference_stats, which).ns - getattr(before.inference_stats, which).ns
        return float(nanoseconds) / 1e6 / max(requests, 1)

    times = (per_request(which) for which in ("queue", "compute_input", "compute_infer", "compute_output"))
    return Stage(after.name, requests, requests / max(executions, 1), *times)
