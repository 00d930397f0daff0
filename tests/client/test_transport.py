"""No request is cancelled on its way: a server of ours, over real gRPC, sees how each one ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tuwen_client import AsyncClient, Client, DeadlineExceeded, TuwenError

WORK_S = 0.6


class Slow(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers each text after a while, and notes which requests were still wanted then."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.began, self.wanted, self.cancelled = 0, 0, 0

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802, the protocol's name
        with self.lock:
            self.began += 1
        time.sleep(WORK_S)
        with self.lock:
            if context.is_active():
                self.wanted += 1
            else:
                self.cancelled += 1
        return service_pb2.ModelInferResponse(
            outputs=[
                {"name": "text_embeds", "datatype": "FP32", "shape": [1, 2]},
                {"name": "fingerprint", "datatype": "INT64", "shape": [1, 1]},
            ],
            raw_output_contents=[np.ones(2, np.float32).tobytes(), np.ones(1, np.int64).tobytes()],
        )

    def check_all_were_wanted(self, at_least: int) -> None:
        """Waits until every request has ended."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self.wanted + self.cancelled < self.began:
            time.sleep(0.02)
        assert (self.wanted, self.cancelled) == (self.began, 0)
        assert self.began >= at_least


@pytest.fixture
def slow() -> Iterator[tuple[Slow, str]]:
    servicer = Slow()
    server = grpc.server(ThreadPoolExecutor(16))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(grace=None).wait()


def test_a_deadline_is_kept_and_cancels_nothing(slow: tuple[Slow, str]) -> None:
    servicer, url = slow
    with Client(url, "tiny_rn") as client:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"did not answer in time; timeout_s is 0\.1"):
            client.embed_text(["猫", "狗"], timeout_s=0.1)
        assert time.monotonic() - started < WORK_S
        servicer.check_all_were_wanted(2)


def test_a_cancelled_task_ends_at_once_and_cancels_nothing(slow: tuple[Slow, str]) -> None:
    servicer, url = slow

    async def run() -> None:
        async with AsyncClient(url, "tiny_rn") as twin:
            task = asyncio.create_task(twin.embed_text(str(number) for number in count()))
            await asyncio.sleep(0.1)
            started = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert time.monotonic() - started < WORK_S / 2
            with pytest.raises(DeadlineExceeded):
                await twin.embed_text(["猫"], timeout_s=0.1)

    asyncio.run(run())
    servicer.check_all_were_wanted(2)


def test_leaving_an_iterator_cancels_nothing(slow: tuple[Slow, str]) -> None:
    servicer, url = slow
    with Client(url, "tiny_rn", max_in_flight=8) as client:
        rows = client.iter_embed_text(str(number) for number in count())
        next(rows)
        rows.close()  # type: ignore[attr-defined]
    servicer.check_all_were_wanted(8)


def test_closing_waits_for_what_is_under_way(slow: tuple[Slow, str]) -> None:
    servicer, url = slow
    client = Client(url, "tiny_rn")
    with ThreadPoolExecutor(1) as pool:
        embedding = pool.submit(client.embed_text, (str(number) for number in count()))
        time.sleep(0.1)
        client.close()
        with pytest.raises(TuwenError, match="is closed"):
            embedding.result(timeout=5)
    servicer.check_all_were_wanted(1)
