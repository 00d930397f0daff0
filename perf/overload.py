"""What happens when three times as many texts arrive as can be answered? Poisson arrivals for a minute.

    make bench-overload                     # ViT-B-16, random weights, float32
    python -m perf.overload --model sample --gateway     # the sample's tiny tower, behind deploy/gateway

First the capacity is measured (closed loop), and the latency of a lone request; then the burst, every text known and
its right answer too; then how soon a lone request is as fast as before. Exits 1 where a bound is missed. All of it over
HTTP by a cheap sender, because it takes its processor time from the server's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from tuwen_client import Client
from tuwen_client.errors import from_status

from perf.gateway import open_gateway
from perf.http_requests import HttpRequests, Response, closed_loop, text_request
from perf.processes import rss_mib
from perf.rounds import machine, rate_of, write_json
from perf.serving import BENCH_DIR, FP32, SAMPLE, open_bench, open_sample
from perf.workload import muge_like_texts
from tuwen.errors import TuwenError
from tuwen.serving.server import EmbeddedServer, Endpoints

OVERLOAD = 3.0
BURST_S = 60.0
NUM_TEXTS = 200
CAPACITY_CONCURRENCY = 64
MIN_GOODPUT = 0.90
MAX_REFUSAL_MS = 50.0
MAX_RECOVERY_S = 2.0
# An answer waits for the full queues of both priorities and two batches under way, at the measured capacity; what the
# other processes take from the tower meanwhile is the margin.
LATENCY_MARGIN = 1.5
# Of memory, from the first to the last fifth of the burst; and from the middle one: ONNX Runtime's arenas grow to its
# batches before, a leak goes on.
MAX_GROWTH, MAX_LATE_GROWTH = 0.05, 0.02
MIN_COSINE = 0.9999
GATEWAY_UNDER_WAY, GATEWAY_WAIT_S = 64, 0.02
_TIMEOUT_S = 30.0
_ALONE = 30


@dataclass
class Sent:
    """One request: when it went out and came back, and what it brought."""

    text: int
    sent_at: float
    ended_at: float = 0.0
    response: Response | None = None
    endings: int = 0

    @property
    def ms(self) -> float:
        return (self.ended_at - self.sent_at) * 1000

    @property
    def outcome(self) -> str:
        if self.response is None:
            return "lost"
        if self.response.status == 200:
            return "answered"
        if self.response.status == 0:
            return "connection lost"
        status = "UNAVAILABLE" if self.response.status == 503 else "INTERNAL"
        return type(from_status(status, json.loads(self.response.body)["error"])).__name__

    def cosine(self, rows: npt.NDArray[np.float32]) -> float:
        """To the right answer."""
        assert self.response is not None
        return float(np.frombuffer(self.response.body[self.response.json_size :], np.float32) @ rows[self.text])


@dataclass(frozen=True)
class Target:
    """What is overloaded.

    Attributes:
        model: its name.
        asked: where requests go: the server's own addresses, or the gateway's.
        most_waiting: requests before and with one that gets an answer.
        wait_s: for a place in the gateway.
    """

    model: str
    server: EmbeddedServer
    asked: Endpoints
    most_waiting: int
    wait_s: float

    def p99_bound_s(self, capacity: float) -> float:
        """How long answers may take, at so many texts per second."""
        return LATENCY_MARGIN * (self.wait_s + self.most_waiting / capacity)


class Sender:
    """Sends single texts without waiting."""

    def __init__(self, target: Target, texts: list[str]) -> None:
        self.target, self.texts = target, texts
        self.http: HttpRequests[Sent] = HttpRequests(target.asked.http_address)
        self.requests = [text_request(f"{target.model}_text", text, _TIMEOUT_S) for text in texts]

    def send(self, text: int) -> Sent:
        sent = Sent(text, time.perf_counter())
        self.http.send(self.requests[text], sent)
        return sent

    def take(self, wait_s: float) -> int:
        """How many have ended, after at most so long."""
        ended = self.http.ended(wait_s)
        now = time.perf_counter()
        for sent, response in ended:
            sent.ended_at, sent.response = now, response
            sent.endings += 1
        return len(ended)

    def send_and_wait(self, text: int) -> Sent:
        sent = self.send(text)
        while not sent.endings:
            self.take(_TIMEOUT_S)
        return sent

    def wait_for_all(self) -> None:
        deadline = time.perf_counter() + _TIMEOUT_S
        while self.http.under_way and time.perf_counter() < deadline:
            self.take(0.1)


@contextmanager
def open_target(model: str, behind_gateway: bool) -> Iterator[Target]:
    """The full-size model of the other measurements, or the sample, served for its texts alone."""
    opened = open_sample() if model == SAMPLE else open_bench(models=[f"{model}_text"])
    with opened as bench:
        own = bench.server.endpoints
        if not behind_gateway:
            yield Target(model, bench.server, own, most_waiting(own, model), 0.0)
            return
        settings = {
            "TUWEN_GATEWAY_UNDER_WAY": str(GATEWAY_UNDER_WAY),
            "TUWEN_GATEWAY_WAIT": f"{round(GATEWAY_WAIT_S * 1000)}ms",
        }
        with open_gateway(own, settings) as asked:
            yield Target(model, bench.server, asked, GATEWAY_UNDER_WAY, GATEWAY_WAIT_S)


def most_waiting(server: Endpoints, model: str) -> int:
    """Requests that the text tower's queues hold, and two batches under way, by the config that is served."""
    with triton.InferenceServerClient(server.grpc) as client:
        config = client.get_model_config(f"{model}_text_tower").config
    queues = sum(
        int(value.string_value) for key, value in config.parameters.items() if key.startswith("max_queue_size.")
    )
    return queues + 2 * int(config.max_batch_size)


def measure_capacity(sender: Sender) -> float:
    """Texts per second with 64 under way."""
    requests = sender.requests * 4
    http: HttpRequests[int] = HttpRequests(sender.target.asked.http_address)
    rate = rate_of(partial(closed_loop, http, requests, CAPACITY_CONCURRENCY), len(requests))()
    http.close()
    return rate


def burst(sender: Sender, rate: float, seconds: float) -> tuple[list[Sent], list[float]]:
    """Poisson arrivals at `rate` per second; returns the requests, all ended, and memory in MiB once a second."""
    random = np.random.default_rng(0)
    gaps = random.exponential(1 / rate, int(rate * seconds))
    chosen = random.integers(len(sender.texts), size=len(gaps))
    memory: list[float] = []
    gc.collect()
    gc.freeze()  # nor does the sender stop to look through all that it has kept
    requests: list[Sent] = []
    with first_at_the_cores():
        due = look_at = time.perf_counter()
        for gap, text in zip(gaps, chosen, strict=True):
            due += gap
            while (wait_s := due - time.perf_counter()) > 0:
                sender.take(wait_s)
            requests.append(sender.send(int(text)))
            if requests[-1].sent_at >= look_at:
                # Not in a thread, which would hold up this one at its own, lesser priority.
                memory.append(rss_mib(sender.target.server.pid or 0))
                look_at += 1.0
    return requests, memory


@contextmanager
def first_at_the_cores() -> Iterator[None]:
    """This thread waits for no other, where the system allows it (root does): its own waiting is not the server's."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        print("the sender shares the cores as any other: run as root to leave its own waiting out of the figures")
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def recover(sender: Sender, normal_ms: float) -> float:
    """Seconds until a lone request takes no longer than twice what is normal, three times in a row."""
    started, good = time.perf_counter(), 0
    began = started
    while good < 3:
        sent = sender.send_and_wait(0)
        is_normal = sent.outcome == "answered" and sent.ms <= 2 * normal_ms
        began = sent.sent_at if is_normal and not good else began
        good = good + 1 if is_normal else 0
    return began - started


def measure(target: Target, overload: float, seconds: float) -> dict[str, Any]:
    """Send `overload` times the capacity for so long."""
    texts = muge_like_texts(NUM_TEXTS, seed=2)
    with Client(target.asked.grpc, target.model) as client:
        rows = client.embed_text(texts)
    sender = Sender(target, texts)
    normal_ms = statistics.median(sender.send_and_wait(n).ms for n in range(_ALONE))
    capacity = measure_capacity(sender)
    started = time.perf_counter()
    requests, memory = burst(sender, overload * capacity, seconds)
    burst_s = time.perf_counter() - started
    recovery_s = recover(sender, normal_ms)
    sender.wait_for_all()
    sender.take(1.0)  # a second ending of any of them would have come by now
    capacities = (capacity, measure_capacity(sender))
    bound_ms = 1000 * target.p99_bound_s(statistics.mean(capacities))
    seen = Seen(requests, sender.http.unasked, memory, started, burst_s, normal_ms, recovery_s, capacities, bound_ms)
    return judge(seen, rows)


@dataclass(frozen=True)
class Seen:
    """Of one burst: its requests, answers that no request asked for, and all that they are judged by."""

    requests: list[Sent]
    unasked: int
    memory_mib: list[float]
    started: float
    burst_s: float
    normal_ms: float
    recovery_s: float
    capacities: tuple[float, float]  # texts per second, before and after
    p99_bound_ms: float


def judge(seen: Seen, rows: npt.NDArray[np.float32]) -> dict[str, Any]:
    """The figures, and which bounds they keep.

    Args:
        rows: the right answer to each text.
    """
    requests, memory, burst_s = seen.requests, seen.memory_mib, seen.burst_s
    answered = [each for each in requests if each.outcome == "answered"]
    refused = [each for each in requests if each.outcome == "Overloaded"]
    in_time = [each for each in answered if each.ended_at <= seen.started + burst_s]
    capacity = statistics.mean(seen.capacities)
    fifth = max(1, len(memory) // 5)
    middle = memory[(len(memory) - fifth) // 2 :][:fifth]
    last = statistics.median(memory[-fifth:])
    growth, late_growth = last / statistics.median(memory[:fifth]) - 1, last / statistics.median(middle) - 1
    p99_ms = float(np.percentile([each.ms for each in answered], 99))
    refusal_ms = [each.ms for each in refused]
    bounds = {
        "goodput": len(in_time) / burst_s >= MIN_GOODPUT * capacity,
        "p99 of answers": p99_ms <= seen.p99_bound_ms,
        "every other is refused as Overloaded": len(answered) + len(refused) == len(requests),
        "refusals are quick": max(refusal_ms, default=0.0) < MAX_REFUSAL_MS,
        "each ended once": all(each.endings == 1 for each in requests) and not seen.unasked,
        "answers are right": min(each.cosine(rows) for each in answered) >= MIN_COSINE,
        "memory is flat": growth <= MAX_GROWTH and late_growth <= MAX_LATE_GROWTH,
        "normal again": seen.recovery_s <= MAX_RECOVERY_S,
    }
    return {
        "capacity_before_after": seen.capacities,
        "arrivals_per_s": len(requests) / burst_s,
        "outcomes": dict(Counter(each.outcome for each in requests)),
        "goodput_per_s": len(in_time) / burst_s,
        "goodput_of_capacity": len(in_time) / burst_s / capacity,
        "normal_ms": seen.normal_ms,
        "answer_ms": _quantiles([each.ms for each in answered]),
        "p99_bound_ms": seen.p99_bound_ms,
        "refusal_ms": _quantiles(refusal_ms),
        "memory_mib": [memory[0], statistics.median(memory), memory[-1]],
        "memory_growth": {"first fifth to last": growth, "middle fifth to last": late_growth},
        "recovery_s": seen.recovery_s,
        "bounds": bounds,
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p99, p999 = np.percentile(values, [50, 99, 99.9])
    return {"p50": float(p50), "p99": float(p99), "p99.9": float(p999), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(FP32, SAMPLE), default=FP32, help=f"{SAMPLE}: the sample checkpoint's")
    parser.add_argument("--gateway", action="store_true", help="through deploy/gateway; haproxy must be installed")
    parser.add_argument("--times", type=float, default=OVERLOAD, help="of the capacity that arrive (%(default)s)")
    parser.add_argument("--seconds", type=float, default=BURST_S)
    parser.add_argument("--out", type=Path, default=BENCH_DIR / "overload.json")
    options = parser.parse_args()
    # What is not answered keeps its connection.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    try:
        with open_target(options.model, options.gateway) as target:
            found = measure(target, options.times, options.seconds)
    except TuwenError as error:
        raise SystemExit(f"overload: {error}") from None
    for key, value in found.items():
        print(f"{key:24s} {value}")
    write_json(options.out, {"machine": machine(), "at": time.strftime("%Y-%m-%d"), **found})
    print(options.out)
    if missed := [name for name, held in found["bounds"].items() if not held]:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
