"""How many requests that are taken back does Triton survive? And what does our client do instead?

    tuwen build --checkpoint samples/emoji_tiny && python -m perf.cancellations      # some two minutes

Triton before 25.04 has races between an answer and its cancellation, by the client, its deadline, or its death (issues
7368 and 8034 of triton-inference-server/server), and crashes of them; the embedded server is 2.51. Bursts of requests
are sent and taken back after a random time: over plain gRPC, which tells the server, and through our client, which
does not. A server that died is started anew and counted.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2_grpc
from tuwen_client import AsyncClient, TuwenError
from tuwen_client.codec import bytes_tensor, infer_request

from tuwen.serving.ports import free_ports
from tuwen.serving.server import EmbeddedServer

REPOSITORY = Path("model_repository")
MODEL = "tiny_rn"
BURST = 64
_MAX_WAIT_S = 0.05
_TIMEOUT_S = 30.0

Burst = Callable[[str, list[str]], None]


def taken_back_on_the_wire(url: str, texts: list[str]) -> None:
    """As a client with a deadline does, or one that dies."""
    with grpc.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        requests = [
            infer_request(f"{MODEL}_text", [bytes_tensor("text", [text.encode()], (1, 1))], (), 2, _TIMEOUT_S)
            for text in texts
        ]
        futures = [stub.ModelInfer.future(request, timeout=_TIMEOUT_S) for request in requests]
        time.sleep(random.uniform(0, _MAX_WAIT_S))
        for future in futures:
            future.cancel()


def taken_back_by_our_client(url: str, texts: list[str]) -> None:
    """A cancelled task of AsyncClient."""

    async def run() -> None:
        async with AsyncClient(url, MODEL) as client:
            task = asyncio.create_task(client.embed_text(texts))
            await asyncio.sleep(random.uniform(0, _MAX_WAIT_S))
            task.cancel()
            with suppress(asyncio.CancelledError, TuwenError):
                await task

    asyncio.run(run())


def count_deaths(burst: Burst, is_repeated: bool, requests: int) -> int:
    """How often the server died of so many requests taken back."""
    deaths, left = 0, requests
    texts = [f"第{number}个" for number in range(BURST)]
    while left > 0:
        grpc_port, http_port, metrics_port = free_ports(3)
        server = EmbeddedServer(REPOSITORY, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port)
        try:
            url = server.start().grpc
            while left > 0 and server.is_alive:
                burst(url, texts if is_repeated else [f"{left}{text}" for text in texts])
                left -= BURST
            deaths += not server.is_alive
        finally:
            server.stop(timeout_s=0)
    return deaths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000, help="taken back in each of the four ways")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    print(f"of {options.requests} requests taken back, the server died")
    for name, burst in (("on the wire", taken_back_on_the_wire), ("by our client", taken_back_by_our_client)):
        for kind, is_repeated in (("new texts", False), ("repeated texts", True)):
            print(f"{name:14s}{kind:16s}{count_deaths(burst, is_repeated, options.requests):4d} times")


if __name__ == "__main__":
    main()
