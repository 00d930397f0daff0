"""What an operator may ask of a running Triton over HTTP: load and unload models, read statistics, ask a model.

One request, one connection: an idle one that stays open would make Triton wait for it when it stops.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

from tuwen.errors import TuwenError
from tuwen.serving.access import HTTP_TOKEN_HEADER

_POLL_INTERVAL_S = 0.02


class ControlFailed(TuwenError):
    """The server refused a request of ours, or did not answer it in time."""


class ServerControl:
    """Of one running server.

    Args:
        host, port: of its HTTP endpoint.
        admin_token: what opens loading and unloading; see access.py.
    """

    def __init__(self, host: str, port: int, admin_token: str) -> None:
        self._host, self._port, self._token = host, port, admin_token

    def answers(self, port: int, path: str, timeout_s: float = 5.0) -> bool:
        """Whether GET `path` is met with 200; `port` may be that of the metrics."""
        try:
            self._send("GET", path, None, timeout_s, port)
        except ControlFailed:
            return False
        return True

    def load(self, model: str, timeout_s: float) -> None:
        """Load the model, and the parts of an ensemble; returns when it is ready."""
        self._ask("POST", f"/v2/repository/models/{model}/load", {}, timeout_s)

    def unload(self, models: Sequence[str], timeout_s: float) -> None:
        """Refuse new requests to these models, and return when those under way are answered.

        Args:
            timeout_s: 0 does not wait.
        Raises:
            ControlFailed: that took longer than the time given.
        """
        deadline = time.monotonic() + timeout_s
        for model in models:
            self._ask("POST", f"/v2/repository/models/{model}/unload", {}, timeout_s or 5.0)
        while timeout_s and (busy := sorted(set(models) & set(self._unloading(deadline)))):
            if time.monotonic() > deadline:
                raise ControlFailed(f"{', '.join(busy)} still has requests under way after {timeout_s:g} s")
            time.sleep(_POLL_INTERVAL_S)

    def answered_requests(self, timeout_s: float) -> dict[str, int]:
        """Model -> requests answered well so far."""
        found = self._ask("GET", "/v2/models/stats", None, timeout_s)
        return {entry["name"]: int(entry["inference_stats"]["success"]["count"]) for entry in found["model_stats"]}

    def input_names(self, model: str, timeout_s: float) -> set[str]:
        return {tensor["name"] for tensor in self._ask("GET", f"/v2/models/{model}", None, timeout_s)["inputs"]}

    def infer(self, model: str, inputs: Iterable[dict[str, Any]], timeout_s: float) -> None:
        """Ask a model, in Triton's JSON, before all bulk requests; the answer itself is not looked at."""
        self._ask(
            "POST", f"/v2/models/{model}/infer", {"parameters": {"queue_priority": 1}, "inputs": [*inputs]}, timeout_s
        )

    def _unloading(self, deadline: float) -> list[str]:
        entries = self._ask("POST", "/v2/repository/index", {}, max(0.1, deadline - time.monotonic()))
        return [entry["name"] for entry in entries if entry.get("state") in ("UNLOADING", "READY")]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        answer = self._send(method, path, body, timeout_s, self._port)
        return json.loads(answer) if answer else None

    def _send(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float, port: int) -> bytes:
        connection = http.client.HTTPConnection(self._host, port, timeout=timeout_s)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {HTTP_TOKEN_HEADER: self._token, "Connection": "close"})
            response = connection.getresponse()
            answer = response.read()
        except TimeoutError as error:
            raise NoAnswer(f"{path}: no answer within {timeout_s:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise ControlFailed(f"{path}: {error}") from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise ControlFailed(f"{path}: {answer.decode(errors='replace')[:300]}")
        return answer


class NoAnswer(ControlFailed):
    """The connection stands, and nothing comes: the server, or the model asked, hangs or is busy."""
