"""Many HTTP requests under way from one thread, each on a connection of its own.

    requests = HttpRequests("127.0.0.1:8000")
    requests.send(request_bytes("m_text", body, json_size), "any key")
    for key, response in requests.ended(wait_s=0.1): ...

A load generator must leave the cores to the server that it measures: gRPC's Python client takes several times as much
for a request.
"""

from __future__ import annotations

import resource
import selectors
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from tuwen.errors import TuwenError

Key = TypeVar("Key")

_HEADERS_END = b"\r\n\r\n"
_READ_BYTES = 65_536
_OTHER_FILES = 200  # of the process, beside these connections


@dataclass(frozen=True)
class Response:
    """Of one request; `status` is 0 where the connection ended before the answer did.

    Attributes:
        json_size: bytes of the body that are JSON, where tensors follow them; else all of it.
    """

    status: int
    body: bytes
    json_size: int


@dataclass(eq=False)
class _Connection(Generic[Key]):
    socket: socket.socket
    key: Key | None = None  # while a request is under way
    received: bytearray = field(default_factory=bytearray)


class HttpRequests(Generic[Key]):
    """Opens a connection where none is idle, and keeps all of them.

    Attributes:
        under_way: requests that have not ended.
        unasked: answers that came on a connection with no request under way, each of which is closed then.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._address = (host, int(port))
        self._selector = selectors.DefaultSelector()
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OTHER_FILES
        self._idle: list[_Connection[Key]] = []
        self.under_way = self.unasked = 0

    def send(self, request: bytes, key: Key) -> None:
        """Send a whole request, small enough for the socket's buffer, without waiting for its answer.

        Raises:
            TuwenError: as many are under way as this process may have connections.
            OSError: nobody listens there.
        """
        connection = self._idle.pop() if self._idle else self._connect()
        connection.key = key
        connection.socket.sendall(request)
        self.under_way += 1

    def ended(self, wait_s: float) -> list[tuple[Key, Response]]:
        """What has ended since, after waiting for at most so long until something has."""
        found = []
        for chosen, _ in self._selector.select(max(0.0, wait_s)):
            connection: _Connection[Key] = chosen.data
            data = connection.socket.recv(_READ_BYTES)
            if connection.key is None:
                self.unasked += bool(data)
                self._idle.remove(connection)
                self._forget(connection)
                continue
            connection.received += data
            response = _read_response(connection.received) if data else Response(0, b"", 0)
            if response is not None:
                found.append((connection.key, response))
                self._put_back(connection, is_open=bool(data))
        return found

    def close(self) -> None:
        """Close all connections, those under way too."""
        for chosen in list(self._selector.get_map().values()):
            chosen.data.socket.close()
        self._selector.close()

    def _connect(self) -> _Connection[Key]:
        if len(self._selector.get_map()) >= self._most:
            raise TuwenError(f"{self.under_way} requests are under way, no more connections may be opened (ulimit -n)")
        connection: _Connection[Key] = _Connection(socket.create_connection(self._address))
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)
        return connection

    def _put_back(self, connection: _Connection[Key], is_open: bool) -> None:
        self.under_way -= 1
        connection.key = None
        connection.received.clear()
        if is_open:
            self._idle.append(connection)
        else:
            self._forget(connection)

    def _forget(self, connection: _Connection[Key]) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()


def request_bytes(model: str, body: bytes, json_size: int) -> bytes:
    """A request to infer: the body that tritonclient's `generate_request_body` makes, and what goes before it."""
    head = (
        f"POST /v2/models/{model}/infer HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/octet-stream",
        f"Content-Length: {len(body)}",
        f"Inference-Header-Content-Length: {json_size}",
    )
    return "\r\n".join(head).encode() + _HEADERS_END + body


def text_request(ensemble: str, text: str, timeout_s: float = 30.0) -> bytes:
    """One text to be embedded, as bulk, for its text_embeds alone."""
    data = InferInput("text", [1, 1], "BYTES").set_data_from_numpy(np.array([[text.encode()]], np.object_))
    wanted = [InferRequestedOutput("text_embeds", binary_data=True)]
    body, json_size = InferenceServerClient.generate_request_body(
        [data], outputs=wanted, timeout=round(timeout_s * 1e6), parameters={"queue_priority": 2}
    )
    return request_bytes(ensemble, body, json_size)


def closed_loop(http: HttpRequests[int], requests: Sequence[bytes], concurrency: int) -> list[Response]:
    """Responses in order, with so many requests under way until the last is sent."""
    responses: dict[int, Response] = {}
    sent = 0
    while len(responses) < len(requests):
        while sent < len(requests) and http.under_way < concurrency:
            http.send(requests[sent], sent)
            sent += 1
        responses.update(http.ended(wait_s=1.0))
    return [responses[n] for n in range(len(requests))]


def _read_response(received: bytearray) -> Response | None:
    """None while it isn't whole."""
    end = received.find(_HEADERS_END)
    if end < 0:
        return None
    status_line, *lines = bytes(received[:end]).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    size = int(headers.get("content-length", "0"))
    start = end + len(_HEADERS_END)
    if len(received) < start + size:
        return None
    body = bytes(received[start : start + size])
    return Response(int(status_line.split()[1]), body, int(headers.get("inference-header-content-length", size)))
