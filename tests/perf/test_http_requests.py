"""The sender of the measurements, against a real HTTP server that answers late, in pieces or not at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from perf.http_requests import HttpRequests, Response, closed_loop, request_bytes
from tuwen.errors import TuwenError


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        json_size = int(self.headers["Inference-Header-Content-Length"])
        if b"slow" in body:
            time.sleep(0.2)
        if b"cut" in body:
            self.close_connection = True
            return
        self.send_response(503 if b"refuse" in body else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Inference-Header-Content-Length", str(json_size))
        self.end_headers()
        for start in range(0, len(body), 50_000):
            self.wfile.write(body[start : start + 50_000])
            time.sleep(0.01)
        if b"twice" in body:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def requests() -> Iterator[HttpRequests[Any]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    requests: HttpRequests[Any] = HttpRequests(f"127.0.0.1:{server.server_port}")
    yield requests
    requests.close()
    server.shutdown()
    server.server_close()


def send(requests: HttpRequests[str], *words: str) -> None:
    for word in words:
        requests.send(request_bytes("m", b"{}" + word.encode(), 2), word)


def wait(requests: HttpRequests[str]) -> list[tuple[str, Response]]:
    found: list[tuple[str, Response]] = []
    while requests.under_way:
        found += requests.ended(5.0)
    return found


def test_every_request_has_its_own_answer_the_quick_before_the_slow(requests: HttpRequests[str]) -> None:
    send(requests, "slow", "quick", "refuse")
    found = wait(requests)
    assert found[-1] == ("slow", Response(200, b"{}slow", 2))
    assert dict(found) == {
        "slow": Response(200, b"{}slow", 2),
        "quick": Response(200, b"{}quick", 2),
        "refuse": Response(503, b"{}refuse", 2),
    }


def test_a_long_answer_comes_in_pieces(requests: HttpRequests[str]) -> None:
    word = "long" * 50_000
    send(requests, word)
    assert wait(requests) == [(word, Response(200, b"{}" + word.encode(), 2))]


def test_connections_are_used_again(requests: HttpRequests[str]) -> None:
    for _ in range(3):
        send(requests, "one", "two")
        assert {key for key, _ in wait(requests)} == {"one", "two"}
    assert len(requests._idle) == 2


def test_a_connection_that_ends_ends_its_request(requests: HttpRequests[str]) -> None:
    send(requests, "cut", "quick")
    assert dict(wait(requests)) == {"cut": Response(0, b"", 0), "quick": Response(200, b"{}quick", 2)}
    send(requests, "again")
    assert wait(requests) == [("again", Response(200, b"{}again", 2))]


def test_an_answer_that_no_request_asked_for_is_counted(requests: HttpRequests[str]) -> None:
    send(requests, "twice")
    assert wait(requests) == [("twice", Response(200, b"{}twice", 2))]
    while not requests.unasked:
        assert requests.ended(5.0) == []
    send(requests, "again")
    assert wait(requests) == [("again", Response(200, b"{}again", 2))]


def test_a_closed_loop_keeps_so_many_under_way_and_answers_in_order(requests: HttpRequests[int]) -> None:
    words = ["slow", *(f"quick {n}" for n in range(10)), "refuse", "cut"]
    found = closed_loop(requests, [request_bytes("m", b"{}" + word.encode(), 2) for word in words], 3)
    assert [each.status for each in found] == [200] * 11 + [503, 0]
    assert [each.body for each in found] == [b"{}" + word.encode() for word in words[:-1]] + [b""]
    assert len(requests._idle) == 2  # three connections, of which one was cut


def test_more_connections_than_may_be_opened_are_a_sentence(requests: HttpRequests[str]) -> None:
    requests._most = 2
    send(requests, "slow", "quick")
    with pytest.raises(TuwenError, match="2 requests are under way, no more connections"):
        send(requests, "more")
    assert {key for key, _ in wait(requests)} == {"slow", "quick"}
