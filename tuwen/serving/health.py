"""Does a server that says it is ready still answer? A model that hangs looks healthy to Triton.

Requests answered well prove a model well. One without is asked something small now and then; one that neither answers
that nor anything else for `hang_timeout_s` hangs, and so does one whose process Triton twice calls unhealthy. So a busy
server is never asked, nor mistaken.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

from tuwen.serving.control import ControlFailed, NoAnswer, ServerControl

HANG_TIMEOUT_S = 15.0
PROBE_INTERVAL_S = 15.0

_NOT_RESPONDING = "is not healthy"  # Triton 2.51, where the process lives and has stopped
_PIXEL = "P6 1 1 255 abc"  # a picture file that is also text: PPM, one pixel
_COUNTER = itertools.count()


class HealthCheck:
    """Watches one server from a thread of its own; `hung` tells what it found.

    Args:
        models: those that clients call.
        hang_timeout_s: a probe, or the server itself, may take this long.
        on_hung: called once, from the thread.
    """

    def __init__(
        self,
        control: ServerControl,
        models: Sequence[str],
        *,
        hang_timeout_s: float = HANG_TIMEOUT_S,
        probe_interval_s: float = PROBE_INTERVAL_S,
    ) -> None:
        self._control, self._models = control, models
        self._hang_timeout_s, self._probe_interval_s = hang_timeout_s, probe_interval_s
        self._stopped = threading.Event()
        self._unresponsive: set[str] = set()
        self.hung: str | None = None
        self._thread = threading.Thread(target=self._watch, name="health-check", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        finished: dict[str, int] = {}
        while not self._stopped.wait(self._probe_interval_s):
            try:
                before, finished = finished, self._control.answered_requests(self._hang_timeout_s)
                # Those that call others come first: their probe does for the others too.
                for model in sorted(self._models, key=lambda name: name.endswith(("_text", "_image"))):
                    if finished.get(model) == before.get(model):
                        finished = self._probe(model, finished)
            except NoAnswer as error:
                self.hung = str(error)
                return
            except ControlFailed:  # it ended, or refuses: others see to that
                continue

    def _probe(self, model: str, finished: dict[str, int]) -> dict[str, int]:
        """Ask the model something; returns what is finished by then.

        Raises:
            NoAnswer: neither this request nor any other to the model was answered in the time.
        """
        started = time.monotonic()
        inputs = probe_inputs(self._control.input_names(model, self._hang_timeout_s))
        if inputs is None:
            return finished
        try:
            self._control.infer(model, inputs, self._hang_timeout_s)
        except NoAnswer as error:
            if self._stopped.is_set():
                return finished
            later = self._control.answered_requests(self._hang_timeout_s)
            if later.get(model) == finished.get(model):
                raise NoAnswer(f"model {model} has not answered for {time.monotonic() - started:.0f} s") from error
            return later
        except ControlFailed as error:  # an error is an answer, but for the one that Triton gives in a process's place
            if _NOT_RESPONDING not in str(error):
                self._unresponsive.discard(model)
            elif model in self._unresponsive:
                raise NoAnswer(f"model {model} fails: a process of its does not respond") from error
            else:  # it may have died just now, and is being replaced: the next probe tells
                self._unresponsive.add(model)
        else:
            self._unresponsive.discard(model)
        return self._control.answered_requests(self._hang_timeout_s)


def probe_inputs(names: set[str]) -> list[dict[str, Any]] | None:
    """A small request to one of our models by its input names, in Triton's JSON; None for any other model."""
    # A text never seen: an answer out of the cache would prove nothing.
    text = f"健康{next(_COUNTER)}"
    strings = {"images": _PIXEL, "texts": text, "labels": text}
    if names == {"text"}:
        return [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": [text]}]
    if names == {"image"}:
        return [{"name": "image", "datatype": "UINT8", "shape": [1, len(_PIXEL)], "data": [*_PIXEL.encode()]}]
    if "images" in names:
        asked = [name for name in strings if name in names]
        return [{"name": name, "datatype": "BYTES", "shape": [1], "data": [strings[name]]} for name in asked]
    return None
