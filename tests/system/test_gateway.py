"""The gateway before a real server, by the real HAProxy, where that is installed."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from tritonclient.utils import InferenceServerException
from tuwen_client import Client, InvalidInput, Overloaded, RetryPolicy, ServerUnavailable, Tls, TuwenError

from perf.gateway import find_haproxy, open_gateway
from perf.http_requests import HttpRequests, closed_loop, text_request
from tuwen.serving.ports import free_ports
from tuwen.serving.server import EmbeddedServer, Endpoints

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(find_haproxy() is None, reason="haproxy is not installed"),
]

MODEL = "tiny_rn"
TEXTS = [f"第{n}只猫" for n in range(200)]
ONCE = RetryPolicy(attempts=1)


@pytest.fixture
def gateway(sample_server: EmbeddedServer) -> Iterator[Endpoints]:
    with open_gateway(sample_server.endpoints) as endpoints:
        yield endpoints


def ask_http(endpoints: Endpoints, head: str) -> tuple[int, str]:
    """Status and body of the answer to a request without a body."""
    host, _, port = endpoints.http_address.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"{head}\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65_536), b"")).decode()
    return int(answer.split()[1]), answer.partition("\r\n\r\n")[2]


def test_answers_are_the_server_s_own(client: Client, gateway: Endpoints) -> None:
    with Client(gateway.grpc) as through:
        assert through.is_ready()
        assert through.model == MODEL
        assert through.fingerprint == client.fingerprint
        assert np.allclose(through.embed_text(TEXTS), client.embed_text(TEXTS), atol=1e-5)
        with pytest.raises(InvalidInput, match="empty"):
            through.embed_text([""])


def test_http_is_answered_too(client: Client, gateway: Endpoints) -> None:
    http: HttpRequests[int] = HttpRequests(gateway.http_address)
    responses = closed_loop(http, [text_request(f"{MODEL}_text", text) for text in TEXTS], 8)
    http.close()
    rows = np.stack([np.frombuffer(each.body[each.json_size :], np.float32) for each in responses])
    assert np.allclose(rows, client.embed_text(TEXTS), atol=1e-5)


def test_what_finds_no_place_in_time_is_refused_as_by_a_full_server(sample_server: EmbeddedServer) -> None:
    narrow = {"TUWEN_GATEWAY_UNDER_WAY": "1", "TUWEN_GATEWAY_WAIT": "1ms"}
    with open_gateway(sample_server.endpoints, narrow) as gateway:
        with Client(gateway.grpc, retry=ONCE) as hasty, pytest.raises(Overloaded):
            hasty.embed_text(TEXTS)
        with Client(gateway.grpc, retry=RetryPolicy(attempts=200)) as patient:
            assert len(patient.embed_text(TEXTS[:40])) == 40
        http: HttpRequests[int] = HttpRequests(gateway.http_address)
        responses = closed_loop(http, [text_request(f"{MODEL}_text", text) for text in TEXTS], 64)
        http.close()
    assert {each.status for each in responses} == {200, 503}
    refused = next(each for each in responses if each.status == 503)
    assert json.loads(refused.body) == {"error": "Exceeds maximum queue size"}


def test_with_no_server_behind_it_says_so() -> None:
    http, grpc = (f"127.0.0.1:{port}" for port in free_ports(2))
    with open_gateway(Endpoints(grpc=grpc, http=f"http://{http}", metrics="")) as gateway:
        deadline = time.monotonic() + 10
        while ask_http(gateway, "GET /v2/health/ready HTTP/1.1") != (503, '{"error":"no server is ready"}'):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with Client(gateway.grpc, MODEL, retry=ONCE) as client:
            with pytest.raises(ServerUnavailable, match="no server is ready"):
                client.embed_text(["猫"])
            assert not client.is_ready()


def test_a_server_that_breaks_off_is_told_in_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        threading.Thread(target=_say_no_more_than_ready, args=(listening,), daemon=True).start()
        with open_gateway(Endpoints(grpc=address, http=f"http://{address}", metrics="")) as gateway:
            question = f"POST /v2/models/{MODEL}_text/infer HTTP/1.1\r\nContent-Length: 0"
            assert ask_http(gateway, question) == (502, '{"error":"the server broke off"}')


def _say_no_more_than_ready(listening: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listening.accept()
            with connection:
                if connection.recv(65_536).startswith(b"GET /v2/health/ready"):
                    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /v2/health/ready HTTP/1.1", 200),
        (f"GET /v2/models/{MODEL}_text/config HTTP/1.1", 200),
        (f"GET /v2/models/{MODEL}_text/versions/1/ready HTTP/1.1", 200),
        ("POST /v2/repository/index HTTP/1.1", 403),
        (f"POST /v2/repository/models/{MODEL}_text/unload HTTP/1.1", 403),
        (f"POST /v2/models/{MODEL}_text/trace/setting HTTP/1.1", 403),
        ("GET /v2/systemsharedmemory/status HTTP/1.1", 403),
        ("POST /v2/logging HTTP/1.1", 403),
        (f"POST /v2/models/{MODEL}_text/ready HTTP/1.1\r\nContent-Length: 0", 403),
        (f"POST /v2/models/{MODEL}_text/infer HTTP/1.1\r\nTransfer-Encoding: chunked", 411),
        ("GET /v2/health/ready HTTP/1.1\r\nTransfer-Encoding: chunked", 411),
        (f"POST /v2/models/{MODEL}_text/infer HTTP/1.1\r\nContent-Length: 33619969", 413),
    ],
)
def test_what_is_open_to_the_outside(gateway: Endpoints, request_line: str, status: int) -> None:
    found, body = ask_http(gateway, request_line)
    assert found == status
    assert status == 200 or json.loads(body)["error"]


def test_grpc_is_open_for_the_same(gateway: Endpoints) -> None:
    server = grpc_client.InferenceServerClient(gateway.grpc)
    assert server.is_server_ready()
    assert server.is_model_ready(f"{MODEL}_text")
    closed = (
        server.get_model_repository_index,
        lambda: server.unload_model(f"{MODEL}_text"),
        server.get_system_shared_memory_status,
        server.get_trace_settings,
        server.get_log_settings,
    )
    for ask in closed:
        with pytest.raises(InferenceServerException, match=r"PERMISSION_DENIED.*not open to the outside"):
            ask()
    server.close()


def test_callers_show_their_token_where_there_is_one(sample_server: EmbeddedServer) -> None:
    with open_gateway(sample_server.endpoints, {"TUWEN_GATEWAY_TOKEN": "secret"}) as gateway:
        for headers in (None, {"authorization": "Bearer wrong"}):
            with Client(gateway.grpc, MODEL, headers=headers) as stranger, pytest.raises(TuwenError, match="missing"):
                stranger.embed_text(["猫"])
        with Client(gateway.grpc, headers={"authorization": "Bearer secret"}) as friend:
            assert friend.embed_text(["猫"]).shape == (1, friend.embed_dim)
        assert ask_http(gateway, "GET /v2 HTTP/1.1")[0] == 401
        assert ask_http(gateway, "GET /v2 HTTP/1.1\r\nAuthorization: Bearer secret")[0] == 200


def test_it_speaks_tls(sample_server: EmbeddedServer, certificates: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes((certificates / "server.pem").read_bytes() + (certificates / "server.key").read_bytes())
    with open_gateway(sample_server.endpoints, {"TUWEN_GATEWAY_CERT": str(both)}) as gateway:
        with Client(gateway.grpc, tls=Tls(ca_path=certificates / "ca.pem")) as client:
            assert client.embed_text(["猫"]).shape == (1, client.embed_dim)
        with Client(gateway.grpc, MODEL, tls=Tls(ca_path=certificates / "other.pem"), retry=ONCE) as stranger:
            assert not stranger.is_ready()
        context = ssl.create_default_context(cafile=certificates / "ca.pem")
        request = urllib.request.urlopen(f"https://{gateway.http_address}/v2/health/ready", context=context)
        assert request.status == 200
