"""A model whose requests wait in its own process: Triton hands them over at once, worker threads answer in batches.

Runs inside a model process of Triton, where `triton_python_backend_utils` exists. A request names its priority by the
parameter `queue_priority` (1: interactive, 2: bulk, the default); its own `timeout` is heeded while it waits.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import triton_python_backend_utils as pb_utils

from tuwen.serving.full_models import FullFlag, Side, are_all_full
from tuwen.serving.request_queue import BULK, INTERACTIVE, QueueLimits, RequestQueue, Taken
from tuwen.serving.responses import failure, refusal

_PARAMETERS = ("interactive", "bulk")
_METRICS_INTERVAL_S = 1.0
# The sentence that Triton itself says; clients know it.
_FULL = "Exceeds maximum queue size"
_EXPIRED = "Request timeout expired"

# A tower is known by what it takes.
_SIDE_OF_TOWER: dict[str, Side] = {"input_ids": "text", "pixel_values": "image"}
_COUNTERS = {
    "tuwen_batches_total": "Batches computed",
    "tuwen_batch_items_total": "Requests in those batches",
    "tuwen_queue_duration_us_total": "Microseconds that these requests waited before",
    "tuwen_compute_duration_us_total": "Microseconds that the batches took",
    "tuwen_queue_full_total": "Requests refused because the queue, or those of all towers behind, was full",
    "tuwen_queue_expired_total": "Requests refused because they had waited too long",
}


class QueuedModel:
    """Queue and workers of one model process.

    Args:
        config: the model's configuration, as Triton passes it; its parameters max_queue_size.interactive, .bulk,
            max_wait_s.interactive and .bulk bound the queue.
        answer: one response per request, in order; several threads call it if there are several workers.
        workers: threads.
        max_rows: of a batch.
        answer_beside: the same for a batch beside others, if workers share the cores; `answer` is then for a batch
            that comes alone, beside which nothing else is answered.
    """

    def __init__(
        self,
        config: dict[str, Any],
        answer: Callable[[list[Any]], list[Any]],
        workers: int,
        max_rows: int,
        answer_beside: Callable[[list[Any]], list[Any]] | None = None,
    ) -> None:
        self._answer, self._answer_beside, self._max_rows = answer, answer_beside, max_rows
        self._queue: RequestQueue[Any] = RequestQueue(read_limits(config), sharers=workers if answer_beside else 0)
        self._metrics = _Metrics(config["name"], self._queue)
        side = _SIDE_OF_TOWER.get(config["input"][0]["name"])
        self._flag = FullFlag(side, config["name"]) if side else None
        # Sending is a call to the server each, during which the next batch is computed already.
        self._answered: SimpleQueue[list[tuple[Any, Any]] | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send_answered, daemon=True)
        self._workers = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in (self._sender, *self._workers):
            thread.start()

    def submit(self, requests: list[Any]) -> None:
        """Take requests; each is answered later, or refused at once where there is no room."""
        for request in requests:
            rows = int(request.inputs()[0].shape()[0])
            timeout_s = request.timeout() / 1e6 or None
            if not self._queue.put(request, priority_of(request), rows, timeout_s):
                self._metrics.add("tuwen_queue_full_total", 1)
                _send(request, full_refusal())
        self._tell_room()

    def must_refuse(self, request: Any, side: Side) -> bool:
        """Whether to refuse a request that waited here, because the towers behind have no room; counted if so."""
        is_refused = _is_in_vain(request, side)
        if is_refused:
            self._metrics.add("tuwen_queue_full_total", 1)
        return is_refused

    def close(self) -> None:
        """Answer what waits, and end."""
        self._queue.close()
        for worker in self._workers:
            worker.join()
        self._answered.put(None)
        self._sender.join()
        self._metrics.close()
        if self._flag:
            self._flag.remove()

    def _tell_room(self) -> None:
        if self._flag:
            self._flag.tell(self._queue.is_full)

    def _work(self) -> None:
        while (taken := self._queue.take(self._max_rows)) is not None:
            self._tell_room()
            if taken.expired:
                self._answered.put([(request, _unavailable(_EXPIRED)) for request in taken.expired])
                self._metrics.add("tuwen_queue_expired_total", len(taken.expired))
            answered = self._compute(taken) if taken.items else []
            if self._answer_beside:
                self._queue.done()
            if len(self._queue):
                self._answered.put(answered)
            else:  # nothing to compute meanwhile
                _send_all(answered)

    def _compute(self, taken: Taken[Any]) -> list[tuple[Any, Any]]:
        answer = self._answer if self._answer_beside is None or taken.is_alone else self._answer_beside
        started = time.perf_counter()
        try:
            responses = answer(taken.items)
        except Exception as error:  # whatever it is, the next requests find a worker
            responses = [failure(error)] * len(taken.items)
        computed_s = time.perf_counter() - started
        self._metrics.add("tuwen_batches_total", 1)
        self._metrics.add("tuwen_batch_items_total", len(taken.items))
        self._metrics.add("tuwen_queue_duration_us_total", round(taken.waited_s * 1e6))
        self._metrics.add("tuwen_compute_duration_us_total", round(computed_s * 1e6))
        return list(zip(taken.items, responses, strict=True))

    def _send_answered(self) -> None:
        while (answered := self._answered.get()) is not None:
            _send_all(answered)


def read_limits(config: dict[str, Any]) -> QueueLimits:
    """The queue's bounds from the model's parameters.

    Raises:
        TritonModelException: one is missing or no positive number.
    """

    def read(name: str, priority: str) -> float:
        text = config["parameters"].get(f"{name}.{priority}", {}).get("string_value", "")
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not value > 0:
            raise pb_utils.TritonModelException(f"parameter {name}.{priority} is {text!r}, expected more than 0")
        return value

    sizes, waits = ([read(name, each) for each in _PARAMETERS] for name in ("max_queue_size", "max_wait_s"))
    return QueueLimits((int(sizes[0]), int(sizes[1])), (waits[0], waits[1]))


def is_queued(config: dict[str, Any]) -> bool:
    """Whether the model's configuration bounds a queue of its own."""
    return "max_queue_size.bulk" in config.get("parameters", {})


@dataclass
class _Metrics:
    """Counters in Triton's /metrics, by model; told once a second, because telling is a call to the server.

    Without a queue only refusals are counted.
    """

    model: str
    queue: RequestQueue[Any] | None
    _counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTERS, 0))

    def __post_init__(self) -> None:
        names = ["tuwen_queue_full_total"] if self.queue is None else list(_COUNTERS)
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._families: list[Any] = []
        self._counters = {name: self._make(name, _COUNTERS[name], pb_utils.MetricFamily.COUNTER) for name in names}
        if self.queue is not None:
            self._size = self._make("tuwen_queue_size", "Requests that wait", pb_utils.MetricFamily.GAUGE)
        self._thread = threading.Thread(target=self._tell_often, daemon=True)
        self._thread.start()

    def add(self, name: str, count: int) -> None:
        with self._lock:
            self._counts[name] += count

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _make(self, name: str, description: str, kind: Any) -> Any:
        family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
        self._families.append(family)  # a family that is collected takes its metrics along
        return family.Metric(labels={"model": self.model})

    def _tell_often(self) -> None:
        while not self._closed.wait(_METRICS_INTERVAL_S):
            with self._lock:
                counts, self._counts = self._counts, dict.fromkeys(_COUNTERS, 0)
            for name, count in counts.items():
                if count:
                    self._counters[name].increment(count)
            if self.queue is not None:
                self._size.set(len(self.queue))


def _send_all(answered: list[tuple[Any, Any]]) -> None:
    for request, response in answered:
        _send(request, response)


def _send(request: Any, response: Any) -> None:
    request.get_response_sender().send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def full_refusal() -> Any:
    """The answer to a request for which there is no room."""
    return _unavailable(_FULL)


class EarlyRefusals:
    """Of a step before the towers of this side, without a queue of its own."""

    def __init__(self, model: str, side: Side) -> None:
        self._side, self._metrics = side, _Metrics(model, None)

    def must_refuse(self, request: Any) -> bool:
        """Whether to refuse a request, because the towers behind have no room; counted if so."""
        is_refused = _is_in_vain(request, self._side)
        if is_refused:
            self._metrics.add("tuwen_queue_full_total", 1)
        return is_refused

    def close(self) -> None:
        self._metrics.close()


def _is_in_vain(request: Any, side: Side) -> bool:
    """Whether a step before the towers of this side may refuse a request: it is bulk, and none of them has room."""
    return are_all_full(side) and priority_of(request) != INTERACTIVE


def priority_of(request: Any) -> int:
    """A request's `queue_priority`; BULK where it has none, or one that is no number of ours."""
    priority = json.loads(request.parameters() or "{}").get("queue_priority")
    return INTERACTIVE if priority == INTERACTIVE else BULK


def _unavailable(sentence: str) -> Any:
    return refusal(sentence, pb_utils.TritonError.UNAVAILABLE)
