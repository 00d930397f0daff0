"""Keeps an embedded server serving: what dies or hangs is replaced, until someone asks it to stop.

    Supervisor(lambda: EmbeddedServer(repository, ...)).run()

A model process that died gets a successor while the rest goes on; a server that died, or hangs, is started anew on the
same ports. What fails again and again is given up with a sentence.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from tuwen.serving.health import HANG_TIMEOUT_S, PROBE_INTERVAL_S, HealthCheck
from tuwen.serving.server import EmbeddedServer, Endpoints, ServerError

# More repairs than this within the window: it will not get better by itself.
MAX_REPAIRS = 5
REPAIR_WINDOW_S = 300.0
_POLL_INTERVAL_S = 0.1


class Supervisor:
    """Runs one server after the other.

    Args:
        make_server: a new server, not started; every time with the same ports and admin token.
        max_repairs: within REPAIR_WINDOW_S; 0: the first trouble ends it.
        on_event: hears in a sentence what went wrong and what was done.
    """

    def __init__(
        self,
        make_server: Callable[[], EmbeddedServer],
        *,
        hang_timeout_s: float = HANG_TIMEOUT_S,
        probe_interval_s: float = PROBE_INTERVAL_S,
        max_repairs: int | None = None,
        on_event: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self._make_server, self._on_event = make_server, on_event
        self._hang_timeout_s, self._probe_interval_s = hang_timeout_s, probe_interval_s
        self._stop_asked = threading.Event()
        self._max_repairs = MAX_REPAIRS if max_repairs is None else max_repairs
        self._repairs: deque[float] = deque(maxlen=self._max_repairs)
        self.server = make_server()
        self._health: HealthCheck | None = None

    def start(self) -> Endpoints:
        """Start the first server.

        Raises:
            ServerError: it does not start; there is no second try.
        """
        endpoints = self.server.start()
        self._watch()
        return endpoints

    def request_stop(self) -> None:
        """Let run() return, from a signal handler or another thread."""
        self._stop_asked.set()

    def run(self) -> None:
        """Serve until request_stop(), then finish what is under way; call after start().

        Raises:
            ServerError: too many repairs in a short time, or the server cannot be started anew.
        """
        try:
            while not self._stop_asked.wait(_POLL_INTERVAL_S):
                trouble = self._trouble()
                if trouble is not None:
                    self._repair(trouble)
                elif not self.server.is_alive:  # it was told to end by someone else, and did in good order
                    return
        finally:
            self._unwatch()
            self.server.stop()

    def _watch(self) -> None:
        self._health = HealthCheck(
            self.server.control,
            self.server.models,
            hang_timeout_s=self._hang_timeout_s,
            probe_interval_s=self._probe_interval_s,
        )

    def _unwatch(self) -> None:
        if self._health:
            self._health.stop()

    def _trouble(self) -> str | None:
        if self._health and self._health.hung:
            return self._health.hung
        try:
            self.server.wait(timeout_s=0)
        except ServerError as error:
            return str(error)
        return None

    def _repair(self, trouble: str) -> None:
        now = time.monotonic()
        if not self._max_repairs:
            raise ServerError(trouble)
        if len(self._repairs) == self._max_repairs and now - self._repairs[0] < REPAIR_WINDOW_S:
            raise ServerError(
                f"{trouble}; given up after {self._max_repairs} repairs in {now - self._repairs[0]:.0f} s"
            )
        self._repairs.append(now)
        if self.server.dead_model:
            try:
                model = self.server.revive()
            except ServerError as error:
                trouble = str(error)
            else:
                self._on_event(f"{trouble}; {model} serves again after {time.monotonic() - now:.1f} s")
                return
        self._restart()
        self._on_event(f"{trouble}; the server serves again after {time.monotonic() - now:.1f} s")

    def _restart(self) -> None:
        self._unwatch()
        self.server.stop(timeout_s=0)
        log_path = self.server.log_path
        self.server = self._make_server()
        if log_path and log_path.exists() and self.server.log_path == log_path:
            log_path.replace(log_path.with_name(f"{log_path.name}.previous"))  # what went wrong stands in there
        self.server.start()
        self._watch()
