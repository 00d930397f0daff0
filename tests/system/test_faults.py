"""A server that dies, comes back, is slow, or changes its model under the client."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from tuwen_client import Client, DeadlineExceeded, ModelChanged, ServerUnavailable

from builders.build import build
from tests.conftest import SMALL_SPECS, random_model
from tests.system.conftest import some_ports
from tuwen.checkpoint import save_checkpoint
from tuwen.serving.access import GRPC_TOKEN_HEADER
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton


def test_kill_9_in_mid_batch_is_noticed_and_survived(sample_repository: Path) -> None:
    ports = some_ports()
    texts = [f"第{number}张图" for number in range(20_000)]
    with ports.serve(sample_repository) as server, Client(server.endpoints.grpc) as client:
        expected = client.embed_text(texts[:200])
        killed_at: list[float] = []

        def kill_after(done: int) -> None:
            if done == 500:
                threading.Thread(target=kill).start()

        def kill() -> None:
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            killed_at.append(time.monotonic())

        with pytest.raises(ServerUnavailable, match="no server answers") as raised:
            client.embed_text(texts, on_progress=kill_after)
        assert time.monotonic() - killed_at[0] < 5
        done = raised.value.done
        assert done[:500] == list(range(500))
        assert len(done) < len(texts)
        assert raised.value.index not in done
        assert np.allclose([raised.value.partial[index] for index in range(200)], expected, atol=1e-5)
        started = time.monotonic()
        with pytest.raises(ServerUnavailable):
            client.embed_text(["猫"])
        assert time.monotonic() - started < 5
        server.stop()
        with ports.serve(sample_repository):
            rows = _retry(client, texts[:200])
        assert np.allclose(rows, expected, atol=1e-5)


def _retry(client: Client, texts: list[str]) -> np.ndarray:
    """The same client, again and again for up to five seconds: its channel may wait before it reconnects."""
    deadline = time.monotonic() + 5
    while True:
        try:
            return client.embed_text(texts)
        except ServerUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_no_server_is_one_quick_sentence() -> None:
    started = time.monotonic()
    with Client(f"localhost:{some_ports().grpc}") as client:
        assert not client.is_ready()
        with pytest.raises(ServerUnavailable, match="no server answers"):
            client.embed_text(["猫"])
    assert time.monotonic() - started < 10


def test_a_server_that_hangs_meets_the_deadline(sample_repository: Path) -> None:
    with some_ports().serve(sample_repository) as server, Client(server.endpoints.grpc, timeout_s=1) as client:
        client.embed_text(["猫"])
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded, match="did not answer in time"):
                client.embed_text(["猫"])
            assert 0.5 < time.monotonic() - started < 5
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert client.embed_text(["猫"]).shape == (1, client.embed_dim)


def test_other_weights_under_a_running_client_are_noticed(tmp_path: Path) -> None:
    """A fine-tuned checkpoint becomes version 2; whoever holds vectors of version 1 is told, also by another server."""
    repository, old_repository = tmp_path / "repository", tmp_path / "old_repository"
    model = random_model(SMALL_SPECS["vit"])
    save_checkpoint(model, tmp_path / "one")
    build(tmp_path / "one", repository=repository)
    shutil.copytree(repository, old_repository)
    with some_ports().serve(repository) as server, Client(server.endpoints.grpc) as client:
        before = client.embed_text(["猫"])
        first = client.fingerprint
        model.text_projection.data.add_(0.5)
        save_checkpoint(model, tmp_path / "two")
        result = build(tmp_path / "two", repository=repository, model_version=2)
        with triton.InferenceServerClient(server.endpoints.grpc) as raw:
            for side in ("text", "image"):
                raw.load_model(f"small_vit_{side}", headers={GRPC_TOKEN_HEADER: server.admin_token})
        with pytest.raises(ModelChanged, match=str(first)):
            client.embed_text(["猫"])
        with Client(server.endpoints.grpc) as newcomer:
            after = newcomer.embed_text(["猫"])
            assert newcomer.fingerprint == result.fingerprint
        assert result.fingerprint != first
        assert not np.allclose(before, after, atol=1e-3)
        with some_ports().serve(old_repository) as older:
            for url in ([server.endpoints.grpc, older.endpoints.grpc], [older.endpoints.grpc, server.endpoints.grpc]):
                with Client(url) as both, pytest.raises(ModelChanged, match=str(first)):
                    both.embed_text(["猫"] * 8)


def test_the_embedded_server_serves_loopback_only(sample_server: EmbeddedServer) -> None:
    port = int(sample_server.endpoints.grpc.rsplit(":", 1)[1])
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, also as seen by an IPv6 socket
    listening = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            if state == "0A" and local.endswith(f":{port:04X}"):  # 0A is LISTEN
                listening.add(local.split(":")[0])
    assert listening
    assert listening <= loopback
