"""Which models have no room for bulk requests, told to the steps before them: what will be refused costs little.

A file a model in the working folder that all model processes of an embedded server share: side.MODEL.open or .full.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

Side = Literal["text", "image"]
FOLDER = Path("queues")


class FullFlag:
    """Of one model, whose process tells it."""

    def __init__(self, side: Side, model: str) -> None:
        self._stem, self._is_full, self._lock = f"{side}.{model}", False, threading.Lock()
        FOLDER.mkdir(exist_ok=True)
        self._path("full").unlink(missing_ok=True)  # of a process that died
        self._path("open").touch()

    def tell(self, is_full: Callable[[], bool]) -> None:
        """Call after every change; costs nothing where the answer is the same.

        Args:
            is_full: asked one caller at a time, so that what is told last is what is true.
        """
        with self._lock:
            now_full = is_full()
            if now_full != self._is_full:
                self._is_full = now_full
                before, after = ("open", "full") if now_full else ("full", "open")
                os.replace(self._path(before), self._path(after))

    def remove(self) -> None:
        """The model is unloaded."""
        for state in ("open", "full"):
            self._path(state).unlink(missing_ok=True)

    def _path(self, state: str) -> Path:
        return FOLDER / f"{self._stem}.{state}"


def are_all_full(side: Side) -> bool:
    """Whether no model of this side has room; False where none tells."""
    try:
        names = [name for name in os.listdir(FOLDER) if name.startswith(f"{side}.")]
    except FileNotFoundError:
        return False
    return bool(names) and all(name.endswith(".full") for name in names)
