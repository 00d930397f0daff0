"""Pictures through system shared memory: equal rows, nothing left behind, and no harm when something goes wrong."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from tuwen_client import AsyncClient, Client, DeadlineExceeded, TuwenError, transport
from tuwen_client.memory import REGION_BYTES, SHM_DIR, Region, SharedPictures

from tests.client.test_memory import more_than_there_is
from tests.system.conftest import some_ports
from tuwen.data.pairs import PairSet
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def files(sample_pairs: PairSet) -> list[bytes]:
    return [sample_pairs.image_bytes(image_id) for image_id in sample_pairs.image_ids[:200]]


def region_of(client: Client) -> Region:
    pictures = client._servers[0].pictures
    assert pictures is not None
    assert pictures.region is not None
    return pictures.region


def left_behind() -> list[str]:
    return [path.name for path in SHM_DIR.glob(f"tuwen_client_{os.getpid()}_*")]


def await_idle(region: Region) -> None:
    """What was under way when a caller stopped is answered soon."""
    deadline = time.monotonic() + 10
    while not region.is_idle:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def mapped_by(pid: int | None) -> int:
    """Regions of clients in the memory of a process."""
    return Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").count("/dev/shm/tuwen_client_")


def test_rows_are_equal_and_nothing_is_left(sample_server: EmbeddedServer, client: Client, files: list[bytes]) -> None:
    expected = client.embed_images(files)
    with Client(client.url, shared_memory=True, token=sample_server.admin_token) as near:
        assert np.allclose(near.embed_images(files), expected, atol=TOLERANCE)
        assert region_of(near).free_bytes == REGION_BYTES, "every picture's room came back"
        assert mapped_by(sample_server.pid) == 1
        # A caller who stops early leaves requests under way, which still read.
        next(near.iter_embed_images(files))
        assert np.allclose(near.embed_images(files), expected, atol=TOLERANCE)
        assert near.embed_text(["猫"]).shape == (1, near.embed_dim)
        assert left_behind() == []
        await_idle(region_of(near))
    assert mapped_by(sample_server.pid) == 0

    async def run() -> None:
        async with AsyncClient(client.url, shared_memory=True, token=sample_server.admin_token) as twin:
            assert np.allclose(await twin.embed_images(files), expected, atol=TOLERANCE)
            assert mapped_by(sample_server.pid) == 1

    asyncio.run(run())
    assert mapped_by(sample_server.pid) == 0


def test_a_region_too_small_for_all_sends_the_rest_in_messages(
    sample_server: EmbeddedServer, client: Client, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(client.url, shared_memory=True, token=sample_server.admin_token) as near:
        server = near._servers[0]
        near._servers[0].pictures = SharedPictures(server._register, server._unregister, size_bytes=8192)
        assert np.allclose(near.embed_images(files), client.embed_images(files), atol=TOLERANCE)


@pytest.mark.parametrize("token", ["", "not-the-servers-token"])
def test_a_wrong_token_is_one_sentence(
    token: str, client: Client, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        Client(client.url, shared_memory=True, token=token) as near,
        pytest.raises(TuwenError, match="refuses shared memory without its admin token"),
    ):
        near.embed_images(files)
    assert left_behind() == []


def test_the_token_may_come_from_the_environment(
    sample_server: EmbeddedServer, client: Client, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUWEN_ADMIN_TOKEN", sample_server.admin_token)
    with Client(client.url, shared_memory=True) as near:
        near.embed_images(files[:2])
        assert region_of(near)


def test_full_shared_memory_loses_no_item(
    sample_server: EmbeddedServer,
    client: Client,
    files: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The system refuses more than it has as it refuses a megabyte when /dev/shm is full."""
    monkeypatch.setattr(
        transport,
        "SharedPictures",
        lambda register, unregister: SharedPictures(register, unregister, more_than_there_is()),
    )
    with (
        caplog.at_level(logging.WARNING),
        Client(client.url, shared_memory=True, token=sample_server.admin_token) as near,
    ):
        assert np.allclose(near.embed_images(files), client.embed_images(files), atol=TOLERANCE)
    assert len(caplog.records) == 1
    assert "pictures go in their messages" in caplog.text


def await_free(region: Region) -> None:
    """Until the answer to what was given up has come as well."""
    deadline = time.monotonic() + 10
    while region.free_bytes < REGION_BYTES and time.monotonic() < deadline:
        time.sleep(0.01)
    assert region.free_bytes == REGION_BYTES


def test_a_server_that_hangs_or_begins_anew_costs_no_wrong_row(
    sample_repository: Path, client: Client, files: list[bytes]
) -> None:
    """What a timed-out request may still read is kept until then; a server without the region is given another."""
    expected = client.embed_images(files)
    ports = some_ports()
    with ports.serve(sample_repository) as server:
        near = Client(server.endpoints.grpc, shared_memory=True, token=server.admin_token)
        assert np.allclose(near.embed_images(files), expected, atol=TOLERANCE)
        first = region_of(near)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded):
            near.embed_images(files[:1], timeout_s=0.3)
        assert REGION_BYTES - first.free_bytes >= len(files[0])
        os.kill(server.pid, signal.SIGCONT)
        assert np.allclose(near.embed_images(files), expected, atol=TOLERANCE)
        await_free(first)
        token = server.admin_token
    with EmbeddedServer(
        sample_repository, grpc_port=ports.grpc, http_port=ports.http, metrics_port=ports.metrics, admin_token=token
    ) as again:
        assert np.allclose(near.embed_images(files), expected, atol=TOLERANCE)
        assert region_of(near) is not first
        assert region_of(near).free_bytes == REGION_BYTES
        assert mapped_by(again.pid) == 1
        near.close()
        assert mapped_by(again.pid) == 0
    assert left_behind() == []
