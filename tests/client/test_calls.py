"""The window of calls, with a clock of our own: order, bounds and retries under any latencies and failures."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuwen_client import (
    DeadlineExceeded,
    InvalidInput,
    ModelChanged,
    ModelNotFound,
    Overloaded,
    RetryPolicy,
    ServerUnavailable,
    TuwenError,
)
from tuwen_client.calls import Attempt, Call, RegionLost, Window
from tuwen_client.codec import Tensor
from tuwen_client.endpoints import Endpoints

Outcome = tuple[float, object]  # seconds until it ends, and how
TRANSIENT = (ServerUnavailable, Overloaded)
FATAL = (InvalidInput, ModelChanged, TuwenError)


def tensors(item: object) -> list[Tensor]:
    return [Tensor("text", "BYTES", (1, 1), repr(item).encode())]


@dataclass
class World:
    """Servers that answer as `answer` says, and a caller that takes its time."""

    window: Window
    size: int
    answer: Callable[[Attempt], Outcome]
    pause_s: Callable[[], float] = lambda: 0.0
    clock: float = 0.0
    sent: list[Attempt] = field(default_factory=list)
    pulled: int = 0
    _under_way: list[tuple[float, int, Attempt, object]] = field(default_factory=list)

    def run(self, num_items: int) -> Iterator[Call]:
        source = iter(range(num_items))
        is_exhausted = False
        while len(self.window) or not is_exhausted:
            self._send_due()
            if self.window.has_result:
                yield self.window.pop()
                self.clock += self.pause_s()
                self._end_what_ended()
            elif self.window.has_room and not is_exhausted:
                item = next(source, None)
                is_exhausted = item is None
                if item is not None:
                    self.pulled += 1
                    self.window.add(item, f"item {item}", tensors(item), self.clock)
            else:
                self._wait()

    def _send_due(self) -> None:
        while (attempt := self.window.next_attempt(self.clock)) is not None:
            assert attempt.call.tensors == tensors(attempt.call.index), "each sending carries its own item"
            assert attempt.timeout_s > 0
            seconds, outcome = self.answer(attempt)
            if seconds >= attempt.timeout_s:
                seconds, outcome = attempt.timeout_s, DeadlineExceeded("too slow")
            heapq.heappush(self._under_way, (self.clock + seconds, len(self.sent), attempt, outcome))
            self.sent.append(attempt)
            assert len(self._under_way) <= self.size
        assert len(self.window) <= self.size

    def _wait(self) -> None:
        wait_s = self.window.wait_s(self.clock)
        times = [self._under_way[0][0]] if self._under_way else []
        times += [self.clock + wait_s] if wait_s is not None else []
        self.clock = max(self.clock, min(times))
        self._end_what_ended()

    def _end_what_ended(self) -> None:
        while self._under_way and self._under_way[0][0] <= self.clock:
            at, _, attempt, outcome = heapq.heappop(self._under_way)
            self.window.settle(attempt, outcome, at)


def make_world(
    answer: Callable[[Attempt], Outcome],
    size: int = 4,
    retry: RetryPolicy = RetryPolicy(),  # noqa: B008, it is frozen
    num_endpoints: int = 1,
    timeout_s: float = 30.0,
    chance: float = 1.0,
) -> World:
    endpoints = Endpoints([f"host{number}:8001" for number in range(num_endpoints)], lambda: chance)
    return World(Window(size, timeout_s, retry, endpoints, lambda: chance), size, answer)


def own_answer(attempt: Attempt) -> str:
    return f"answer to {attempt.call.item}"


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 9),
    num_items=st.integers(0, 40),
    num_endpoints=st.integers(1, 3),
    attempts=st.integers(1, 4),
    failing=st.floats(0, 0.9),
)
def test_every_item_comes_back_once_in_order_whatever_happens(
    seed: int, size: int, num_items: int, num_endpoints: int, attempts: int, failing: float
) -> None:
    dice = random.Random(seed)
    kinds = (*TRANSIENT, *FATAL, ModelNotFound, RegionLost)

    def answer(attempt: Attempt) -> Outcome:
        seconds = dice.choice([0.0, 0.01, dice.random(), 20 * dice.random()])
        return seconds, dice.choice(kinds)("no") if dice.random() < failing else own_answer(attempt)

    world = make_world(answer, size, RetryPolicy(attempts), num_endpoints, timeout_s=10.0, chance=dice.random())
    world.pause_s = lambda: dice.choice([0.0, 0.0, 5.0])
    handed = []
    for call in world.run(num_items):
        handed.append(call.index)
        assert world.pulled <= len(handed) + size
        assert call.is_settled
        assert (call.answer is None) != (call.error is None)
        assert call.error is not None or call.answer == f"answer to item {call.index}"
        assert call.tensors == (), "what was sent is let go"
    assert handed == list(range(num_items))
    most = attempts + num_endpoints
    per_item = [sum(1 for one in world.sent if one.call.index == index) for index in range(num_items)]
    assert all(1 <= count <= most for count in per_item)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), timeout_s=st.floats(0.05, 5), attempts=st.integers(1, 9))
def test_no_item_outlives_its_deadline(seed: int, timeout_s: float, attempts: int) -> None:
    dice = random.Random(seed)
    world = make_world(
        lambda attempt: (dice.random(), dice.choice(TRANSIENT)("no")), 3, RetryPolicy(attempts), timeout_s=timeout_s
    )
    began: dict[int, float] = {}
    for call in world.run(20):
        sendings = [one for one in world.sent if one.call is call]
        began[call.index] = call.deadline_at - timeout_s
        assert sum(one.timeout_s for one in sendings[:1]) <= timeout_s + 1e-9
        assert isinstance(call.error, (*TRANSIENT, DeadlineExceeded))
        assert all(later.timeout_s < earlier.timeout_s for earlier, later in itertools.pairwise(sendings))


def test_time_in_which_the_caller_does_not_ask_is_not_the_items() -> None:
    """An item whose retry is due while the caller sleeps for a minute is still sent, with the time it had left."""
    failures = {0: 1, 1: 1}

    def answer(attempt: Attempt) -> Outcome:
        failures[attempt.call.index] = failures.get(attempt.call.index, 0) - 1
        return (0.5, Overloaded("full")) if failures[attempt.call.index] >= 0 else (0.5, own_answer(attempt))

    world = make_world(answer, size=2, timeout_s=2.0)
    world.pause_s = lambda: 60.0
    assert [call.answer for call in world.run(3)] == [f"answer to item {index}" for index in range(3)]


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_server_gone_or_full_is_tried_again_with_growing_delays(kind: type[TuwenError]) -> None:
    times: list[float] = []
    world = make_world(lambda attempt: (times.append(world.clock), (0.0, kind("no")))[1], 1, RetryPolicy(5, 0.1, 0.5))
    (call,) = world.run(1)
    assert type(call.error) is kind
    assert [round(later - earlier, 6) for earlier, later in itertools.pairwise(times)] == [0.1, 0.2, 0.4, 0.5]


@pytest.mark.parametrize("kind", [*FATAL, DeadlineExceeded, ModelNotFound])
def test_what_cannot_get_better_is_sent_once(kind: type[TuwenError]) -> None:
    world = make_world(lambda attempt: (0.0, kind("no")))
    (call,) = world.run(1)
    assert type(call.error) is kind
    assert len(world.sent) == 1


def test_retries_can_be_turned_off() -> None:
    world = make_world(lambda attempt: (0.0, ServerUnavailable("gone")), retry=RetryPolicy.off())
    (call,) = world.run(1)
    assert isinstance(call.error, ServerUnavailable)
    assert len(world.sent) == 1


def test_another_healthy_endpoint_is_asked_at_once() -> None:
    def answer(attempt: Attempt) -> Outcome:
        return 0.0, ServerUnavailable("gone") if attempt.endpoint.number == 0 else own_answer(attempt)

    world = make_world(answer, num_endpoints=2)
    assert all(call.answer for call in world.run(50))
    assert world.clock == 0.0, "no item waited"
    assert sum(1 for one in world.sent if one.endpoint.number == 0) <= 4, "the one that is gone is left alone"


def test_a_model_is_looked_for_at_every_endpoint_even_without_retries() -> None:
    def answer(attempt: Attempt) -> Outcome:
        return 0.0, own_answer(attempt) if attempt.endpoint.number == 2 else ModelNotFound("unknown model")

    world = make_world(answer, num_endpoints=3, retry=RetryPolicy.off())
    assert all(call.answer for call in world.run(9))


def test_lost_memory_is_sent_again_at_once_even_without_retries() -> None:
    world = make_world(
        lambda attempt: (0.0, RegionLost("unknown region") if attempt.call.attempts == 1 else own_answer(attempt)),
        retry=RetryPolicy.off(),
    )
    assert all(call.answer for call in world.run(9))
    assert world.clock == 0.0


def test_what_takes_too_long_is_given_up_and_its_late_answer_ignored() -> None:
    window = Window(4, 2.0, RetryPolicy(), Endpoints(["a:1"]))
    for index in range(2):
        window.add(index, index, (), now=float(index))
        attempt = window.next_attempt(float(index))
        assert attempt is not None
    assert window.wait_s(1.5) == pytest.approx(0.5)  # until the first is given up
    window.expire(1.9)
    assert not window.has_result
    window.expire(2.0)
    first = window.pop()
    assert isinstance(first.error, DeadlineExceeded)
    assert not window.has_result
    window.settle(attempt, "answer", at=2.5)
    window.expire(100.0)
    assert window.pop().answer == "answer"
    assert window.wait_s(100.0) is None


def test_a_late_answer_changes_nothing() -> None:
    window = Window(1, 1.0, RetryPolicy(), Endpoints(["a:1"]))
    window.add(0, "item", (), now=0.0)
    attempt = window.next_attempt(0.0)
    assert attempt is not None
    window.expire(1.0)
    window.settle(attempt, "answer", at=1.1)
    call = window.pop()
    assert call.answer is None
    assert isinstance(call.error, DeadlineExceeded)
