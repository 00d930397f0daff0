"""Which server is asked next: round robin over those that answer, and now and then one that did not."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tuwen_client.options import RetryPolicy

# A server that refused is left alone for half a second at most, then for up to one, ..., up to 15 s. Each time one
# item goes there as a probe; what it costs is that item's retry.
_BACK_OFF = RetryPolicy(first_delay_s=0.5, max_delay_s=15.0)


@dataclass(eq=False)
class Endpoint:
    """One server.

    Attributes:
        number: its position among the client's endpoints.
        failures: how many times in a row it failed; 0 is healthy.
        rests_until: no item goes there before, while others are healthy.
    """

    number: int
    url: str
    failures: int = 0
    rests_until: float = 0.0


class Endpoints:
    """The servers of one client and their health, shared by all its calls and threads. Does no input or output."""

    def __init__(self, urls: Sequence[str], chance: Callable[[], float] = random.random) -> None:
        self.all = tuple(Endpoint(number, url) for number, url in enumerate(urls))
        self._chance = chance
        self._lock = threading.Lock()
        self._turn = 0

    def choose(self, now: float, avoid: Collection[Endpoint] = ()) -> Endpoint:
        """The next in turn that is healthy or due for a probe; where none is, the one whose rest ends first.

        Args:
            avoid: not these, unless there are no others.
        """
        with self._lock:
            in_turn = self.all[self._turn :] + self.all[: self._turn]
            candidates = [one for one in in_turn if one not in avoid] or list(in_turn)
            awake = [one for one in candidates if now >= one.rests_until]
            chosen = awake[0] if awake else min(candidates, key=lambda one: one.rests_until)
            self._turn = (chosen.number + 1) % len(self.all)
            if awake and chosen.failures:  # a probe: a failure until it is answered, and the only one meanwhile
                chosen.failures += 1
                chosen.rests_until = now + self._rest_s(chosen)
            return chosen

    def answered(self, endpoint: Endpoint) -> None:
        """It is healthy."""
        with self._lock:
            endpoint.failures, endpoint.rests_until = 0, 0.0

    def failed(self, endpoint: Endpoint, now: float) -> None:
        """It is gone, or does not answer in time."""
        with self._lock:
            # All that were under way fail together: that is one failure, not sixty-four.
            if now >= endpoint.rests_until or not endpoint.failures:
                endpoint.failures += 1
            endpoint.rests_until = max(endpoint.rests_until, now + self._rest_s(endpoint))

    def others_are_healthy(self, endpoint: Endpoint) -> bool:
        """Whether a healthy one is left besides this one."""
        with self._lock:
            return any(one.failures == 0 for one in self.all if one is not endpoint)

    def _rest_s(self, endpoint: Endpoint) -> float:
        # At least half of the longest delay: a rest of no length would be no rest.
        return _BACK_OFF.delay_s(endpoint.failures, 0.5 + 0.5 * self._chance())
