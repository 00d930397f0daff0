"""The sample checkpoint, built and served by the real Triton: once for all system tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tuwen_client import Client

from builders.build import build
from tuwen.checkpoint import load_checkpoint
from tuwen.data.pairs import PairSet, open_pairs
from tuwen.model import ChineseCLIP
from tuwen.serving.ports import free_ports
from tuwen.serving.server import EmbeddedServer

ROOT = Path(__file__).parent.parent.parent
SAMPLE_CHECKPOINT = ROOT / "samples" / "emoji_tiny"
SAMPLE_DATA = ROOT / "samples" / "emoji_cn"


@dataclass(frozen=True)
class Ports:
    grpc: int
    http: int
    metrics: int

    def serve(self, repository: Path) -> EmbeddedServer:
        return EmbeddedServer(repository, grpc_port=self.grpc, http_port=self.http, metrics_port=self.metrics)


def some_ports() -> Ports:
    return Ports(*free_ports(3))


@pytest.fixture(scope="session")
def sample_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository built from the sample checkpoint, in a folder of its own."""
    repository = tmp_path_factory.mktemp("model_repository")
    build(SAMPLE_CHECKPOINT, repository=repository)
    return repository


@pytest.fixture(scope="session")
def sample_server(sample_repository: Path) -> Iterator[EmbeddedServer]:
    with some_ports().serve(sample_repository) as server:
        yield server


@pytest.fixture
def client(sample_server: EmbeddedServer) -> Iterator[Client]:
    with Client(sample_server.endpoints.grpc) as one:
        yield one


@pytest.fixture(scope="session")
def sample_model() -> ChineseCLIP:
    return load_checkpoint(SAMPLE_CHECKPOINT)


@pytest.fixture(scope="session")
def sample_pairs() -> PairSet:
    return open_pairs(SAMPLE_DATA, "valid")


def openssl(*arguments: str, folder: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: ca.pem signed server.pem (of 127.0.0.1) and client.pem; other.pem is another authority."""
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    for name in ("ca", "other"):
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-days", "2",
                "-keyout", f"{name}.key", "-out", f"{name}.pem", folder=folder)  # fmt: skip
    for name in ("server", "client"):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", f"{name}.key",
                "-out", f"{name}.csr", folder=folder)  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", "2", "-extfile", "san", "-out", f"{name}.pem", folder=folder)  # fmt: skip
    return folder
