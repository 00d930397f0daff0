"""The window of items under way: what to send next, to whom, until when, and what an answer means.

No input or output happens here and no clock is read: `Client` and `AsyncClient` send what `next_attempt` says, tell
`settle` what came of it, and hand out calls from the front as they are settled. So order holds by construction, and
all of it is tested with a clock of our own.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuwen_client.codec import Tensor
from tuwen_client.endpoints import Endpoint, Endpoints
from tuwen_client.errors import DeadlineExceeded, ModelNotFound, Overloaded, ServerUnavailable, TuwenError
from tuwen_client.options import RetryPolicy


class RegionLost(TuwenError):
    """The server no longer knows the shared memory of a request: it began anew. Never leaves this package."""


@dataclass(eq=False)
class Call:
    """One item, from its turn until its answer is handed out.

    Attributes:
        index: position among the items.
        tensors: what is sent; let go as soon as the call is settled.
        deadline_at, due_at: on the caller's clock, in seconds; due_at is when it is to be sent (again).
        lacking: endpoints that do not serve the model.
        failed: the endpoint that failed last; the next attempt goes elsewhere if it can.
    """

    index: int
    item: object
    tensors: Sequence[Tensor]
    deadline_at: float
    due_at: float
    attempts: int = 0
    lacking: set[Endpoint] = field(default_factory=set)
    failed: Endpoint | None = None
    answer: Any = None
    error: TuwenError | None = None
    is_settled: bool = False


@dataclass(eq=False)
class Attempt:
    """One sending of a call's item to an endpoint."""

    call: Call
    endpoint: Endpoint
    timeout_s: float
    is_settled: bool = False


class Window:
    """At most `size` calls in the order of their items.

    Args:
        timeout_s: deadline of each item, from when it is added; back-off and all attempts lie within.
        chance: a random number from 0 to 1, for the back-off.
    """

    def __init__(
        self,
        size: int,
        timeout_s: float,
        retry: RetryPolicy,
        endpoints: Endpoints,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._size, self._timeout_s, self._retry, self._endpoints, self._chance = (
            size, timeout_s, retry, endpoints, chance,
        )  # fmt: skip
        self._calls: deque[Call] = deque()
        self._due: list[tuple[float, int, Call]] = []
        self._sent: list[tuple[float, int, int, Attempt]] = []  # by deadline

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Any:
        return iter(self._calls)

    @property
    def has_room(self) -> bool:
        """Whether another item may be added."""
        return len(self._calls) < self._size

    @property
    def has_result(self) -> bool:
        """Whether the oldest call is settled, so that `pop` may be called."""
        return bool(self._calls) and self._calls[0].is_settled

    def add(self, index: int, item: object, tensors: Sequence[Tensor] | TuwenError, now: float) -> None:
        """Let an item in: as tensors to send, or with the error it failed with before."""
        call = Call(index, item, (), now + self._timeout_s, now)
        self._calls.append(call)
        if isinstance(tensors, TuwenError):
            call.error, call.is_settled = tensors, True
        else:
            call.tensors = tensors
            heapq.heappush(self._due, (now, index, call))

    def next_attempt(self, now: float) -> Attempt | None:
        """The next sending that is due, which counts as made; None when there is nothing to send at this time."""
        if not self._due or self._due[0][0] > now:
            return None
        call = heapq.heappop(self._due)[2]
        # Late means that the caller did not ask for rows meanwhile: that time is not the item's.
        call.deadline_at += now - call.due_at
        call.attempts += 1
        avoid = call.lacking or ({call.failed} if call.failed else ())
        attempt = Attempt(call, self._endpoints.choose(now, avoid), call.deadline_at - now)
        heapq.heappush(self._sent, (call.deadline_at, call.index, call.attempts, attempt))
        return attempt

    def wait_s(self, now: float) -> float | None:
        """Seconds until something is due, to be sent or to be given up; None when nothing is."""
        self._forget_settled()
        times = [heap[0][0] for heap in (self._due, self._sent) if heap]
        return max(0.0, min(times) - now) if times else None

    def expire(self, now: float) -> None:
        """Settle what is under way and past its deadline. Look first at what has ended: it may be among it."""
        self._forget_settled()
        while self._sent and self._sent[0][0] <= now:
            self.settle(self._sent[0][-1], DeadlineExceeded("the server did not answer in time"), now)
            self._forget_settled()

    def _forget_settled(self) -> None:
        while self._sent and self._sent[0][-1].is_settled:
            heapq.heappop(self._sent)

    def settle(self, attempt: Attempt, outcome: object, at: float) -> None:
        """An attempt ended; that of one that was given up changes nothing.

        Args:
            outcome: the answer, or the error.
            at: when it ended.
        """
        if attempt.is_settled:
            return
        call, attempt.is_settled = attempt.call, True
        if not isinstance(outcome, TuwenError):
            self._endpoints.answered(attempt.endpoint)
            call.answer = outcome
        else:
            if isinstance(outcome, (ServerUnavailable, DeadlineExceeded)):
                self._endpoints.failed(attempt.endpoint, at)
            else:
                self._endpoints.answered(attempt.endpoint)
            delay_s = self._retry_delay_s(attempt, outcome)
            if delay_s is not None and at + delay_s < call.deadline_at:
                call.due_at = at + delay_s
                heapq.heappush(self._due, (call.due_at, call.index, call))
                return
            call.error = outcome
        call.tensors, call.is_settled = (), True

    def pop(self) -> Call:
        """Take the oldest call out; `has_result` must hold."""
        assert self.has_result
        return self._calls.popleft()

    def _retry_delay_s(self, attempt: Attempt, error: TuwenError) -> float | None:
        """Seconds until the item is sent again; None: never."""
        call, endpoint = attempt.call, attempt.endpoint
        # For what is no failure of a server: one attempt more at each of them.
        most_attempts = self._retry.attempts + len(self._endpoints.all)
        if isinstance(error, ModelNotFound):
            # Whatever the policy: this looks for the right endpoint, it does not insist.
            call.lacking.add(endpoint)
            is_elsewhere = len(call.lacking) < len(self._endpoints.all)
            return 0.0 if is_elsewhere and call.attempts < most_attempts else None
        if isinstance(error, RegionLost):
            return 0.0 if call.attempts < most_attempts else None
        if call.attempts >= self._retry.attempts:
            return None
        if isinstance(error, (ServerUnavailable, Overloaded)):
            call.failed = endpoint
            if isinstance(error, ServerUnavailable) and self._endpoints.others_are_healthy(endpoint):
                return 0.0
            return self._retry.delay_s(call.attempts, self._chance())
        return None
