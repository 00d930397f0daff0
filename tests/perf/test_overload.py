"""What the overload measurement makes of a burst: a bound that is missed is named."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from perf.http_requests import Response
from perf.overload import Seen, Sent, judge

ROWS = np.eye(2, dtype=np.float32)


def answered(text: int, ended_at: float = 0.5) -> Sent:
    return Sent(text, 0.4, ended_at, Response(200, b"{}" + ROWS[text].tobytes(), 2), 1)


def refused(sentence: str = "Exceeds maximum queue size", status: int = 503, ms: float = 5.0) -> Sent:
    body = json.dumps({"error": sentence}).encode()
    return Sent(0, 0.0, ms / 1000, Response(status, body, len(body)), 1)


GOOD = Seen(
    requests=[answered(n % 2) for n in range(95)] + [refused() for _ in range(200)],
    unasked=0,
    memory_mib=[100.0] * 10,
    started=0.0,
    burst_s=1.0,
    normal_ms=20.0,
    recovery_s=1.0,
    capacities=(100.0, 100.0),
    p99_bound_ms=150.0,
)


def missed(seen: Seen) -> set[str]:
    return {name for name, held in judge(seen, ROWS)["bounds"].items() if not held}


def with_one(sent: Sent) -> Seen:
    return replace(GOOD, requests=[*GOOD.requests, sent])


def test_a_good_burst_keeps_every_bound() -> None:
    found = judge(GOOD, ROWS)
    assert missed(GOOD) == set()
    assert found["outcomes"] == {"answered": 95, "Overloaded": 200}
    assert found["goodput_of_capacity"] == 0.95


def test_each_fault_is_named() -> None:
    lost, wrong = Sent(0, 0.4), replace_row(answered(0))
    assert missed(with_one(lost)) == {"every other is refused as Overloaded", "each ended once"}
    assert missed(with_one(wrong)) == {"answers are right"}
    assert missed(with_one(refused("something else", 500))) == {"every other is refused as Overloaded"}
    assert missed(with_one(refused(ms=51))) == {"refusals are quick"}
    assert missed(replace(GOOD, unasked=1)) == {"each ended once"}
    assert missed(replace(GOOD, memory_mib=[100.0] * 8 + [103.0] * 2)) == {"memory is flat"}
    assert missed(replace(GOOD, memory_mib=[100.0] * 4 + [106.0] * 6)) == {"memory is flat"}
    assert missed(replace(GOOD, memory_mib=[97.0] * 4 + [100.0] * 2 + [101.0] * 4)) == set()
    assert missed(replace(GOOD, recovery_s=2.1)) == {"normal again"}
    assert missed(replace(GOOD, capacities=(110.0, 110.0))) == {"goodput"}
    assert missed(replace(GOOD, requests=GOOD.requests[10:])) == {"goodput"}
    assert missed(replace(GOOD, p99_bound_ms=99.0)) == {"p99 of answers"}


def test_an_answer_after_the_burst_is_no_goodput() -> None:
    late = replace(GOOD, requests=[answered(0, ended_at=1.1) for _ in range(95)], p99_bound_ms=1000.0)
    assert missed(late) == {"goodput"}


def replace_row(sent: Sent) -> Sent:
    return replace(sent, response=Response(200, b"{}" + np.array([0.9, 0.4359], np.float32).tobytes(), 2))
