"""The gateway of deploy/gateway in front of a server, by the haproxy that is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tuwen.errors import MissingDependency, TuwenError
from tuwen.serving.ports import free_ports
from tuwen.serving.server import Endpoints

CONFIG = Path(__file__).parents[1] / "deploy" / "gateway" / "haproxy.cfg"
_START_TIMEOUT_S = 10.0


def find_haproxy() -> str | None:
    """Its path; Debian puts it where only root looks."""
    return shutil.which("haproxy", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


@contextmanager
def open_gateway(behind: Endpoints, settings: Mapping[str, str] | None = None) -> Iterator[Endpoints]:
    """The addresses to ask instead of those behind it.

    Args:
        settings: environment variables of haproxy.cfg, as TUWEN_GATEWAY_WAIT.
    Raises:
        MissingDependency: haproxy is not installed.
        TuwenError: it does not start.
    """
    haproxy = find_haproxy()
    if haproxy is None:
        raise MissingDependency("haproxy is not installed: apt-get install haproxy")
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    environment = {
        **os.environ,
        "TUWEN_GATEWAY_HTTP": addresses[0],
        "TUWEN_GATEWAY_GRPC": addresses[1],
        "TUWEN_TRITON_HTTP": behind.http_address,
        "TUWEN_TRITON_GRPC": behind.grpc,
        **(settings or {}),
    }
    process = subprocess.Popen([haproxy, "-q", "-f", CONFIG], env=environment, stdout=subprocess.DEVNULL)
    try:
        _wait_until_it_listens(process, addresses)
        yield Endpoints(grpc=addresses[1], http=f"http://{addresses[0]}", metrics=behind.metrics)
    finally:
        process.terminate()
        process.wait()


def _wait_until_it_listens(process: subprocess.Popen[bytes], addresses: list[str]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    for address in addresses:
        host, _, port = address.partition(":")
        while True:
            try:
                socket.create_connection((host, int(port)), timeout=1.0).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise TuwenError(f"haproxy does not listen on {address}; it said why above") from None
                time.sleep(0.02)
