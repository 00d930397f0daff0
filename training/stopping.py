"""SIGTERM and Ctrl-C end a run after the step under way, in all processes, with its state saved."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import torch

from training.distributed import World

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Catches the signals while it is entered; a second Ctrl-C is an ordinary one."""

    def __init__(self) -> None:
        self._is_asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow it
            self._before = {one: signal.signal(one, self._ask) for one in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for one, before in self._before.items():
            signal.signal(one, before)

    def is_asked_for(self, world: World) -> bool:
        """Whether any process was asked to stop; all of them ask together."""
        return bool(world.sum(torch.tensor(int(self._is_asked), device=world.device)))

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._is_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._is_asked:
            log.warning("%s: stopping after this step", signal.Signals(number).name)
        self._is_asked = True
