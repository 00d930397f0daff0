"""The containers' own commands, run in folders laid out as their images are: builder, Triton, health check, page, end.

The wheel's tritonserver stands in for the image's, with the same command line; everything else is what the image has,
packages included: what requirements/*.txt leaves out is not there.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tuwen_client import Client, ServerUnavailable

from tests.deploy.compose_file import ROOT, mounts, services
from tests.deploy.images import Container, lay_out, read_dockerfile, stand_in_triton
from tuwen.serving.ports import free_ports

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(shutil.which("curl") is None, reason="the image has curl, this machine does not"),
]
SERVICES = services()
READY_WITHIN_S = 120
NUM_PICTURES = 24
ADMIN = "known-to-the-operator"


@dataclass(frozen=True)
class Deployment:
    """Folders for all services, and where the server of this run listens: 8000 to 8002 may be taken here."""

    folder: Path
    http: int
    grpc: int
    metrics: int

    def container(self, name: str, all_packages: bool = False) -> Container:
        service = SERVICES[name]
        build = service["build"]
        image = read_dockerfile(ROOT / build["dockerfile"], build.get("target"), build.get("args"))
        return lay_out(image, self.folder / name, mounts(service), self.folder / "volumes", all_packages)

    def here(self, words: list[str]) -> list[str]:
        """A command with this run's ports, and this machine for the host `triton`."""
        by_port = {"8000": self.http, "8001": self.grpc, "8002": self.metrics}
        return [re.sub(r"\b(triton|127\.0\.0\.1):(800\d)", lambda m: f"127.0.0.1:{by_port[m[2]]}", w) for w in words]

    @property
    def ports(self) -> list[str]:
        return [f"--http-port={self.http}", f"--grpc-port={self.grpc}", f"--metrics-port={self.metrics}"]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return Deployment(tmp_path_factory.mktemp("deployment"), *free_ports(3))


@pytest.fixture(scope="module")
def built(deployment: Deployment) -> list[str]:
    """What the builder says, the first time and the second."""
    container = deployment.container("builder-cpu", all_packages=True)
    said = []
    for _ in range(2):
        ended = container.run(SERVICES["builder-cpu"]["command"])
        assert ended.returncode == 0, ended.stderr
        said.append(ended.stdout)
    return said


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[str]
    log: list[str]


@pytest.fixture(scope="module")
def triton(deployment: Deployment, built: list[str]) -> Iterator[Running]:
    """`docker compose --profile cpu up`: the server, once its health check says so."""
    container = deployment.container("triton-cpu")
    stand_in_triton(container.root / "opt" / "tritonserver")
    environment = dict.fromkeys(SERVICES["triton-cpu"]["environment"], ADMIN)
    command = SERVICES["triton-cpu"]["command"] + deployment.ports
    process = container.start(command, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    running = Running(process, [])
    reader = threading.Thread(target=running.log.extend, args=[process.stdout])
    reader.start()
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while not is_healthy(deployment):
            assert process.poll() is None, "".join(running.log[-20:])
            assert time.monotonic() < deadline, "".join(running.log[-20:])
            time.sleep(0.2)
        yield running
    finally:
        process.terminate()
        process.wait(60)
        reader.join()


def is_healthy(deployment: Deployment) -> bool:
    """By the health check as Compose would run it."""
    how, *command = SERVICES["triton-cpu"]["healthcheck"]["test"]
    assert how == "CMD"
    return subprocess.run(deployment.here(command), capture_output=True, check=False).returncode == 0


def test_the_builder_builds_once(built: list[str]) -> None:
    assert "equals PyTorch" in built[0]
    assert "equals PyTorch" not in built[1]
    assert "version 1: current, nothing was made" in " ".join(built[1].split())


def test_the_server_s_image_has_no_torch(deployment: Deployment, triton: Running) -> None:
    container = Container(deployment.folder / "triton-cpu", read_dockerfile(ROOT / "docker" / "Dockerfile.triton"))
    ended = container.run(["python3", "-c", "import tuwen, importlib.util as u; print(u.find_spec('torch'))"])
    assert ended.stdout == "None\n", ended.stderr


def test_texts_and_pictures_are_answered(deployment: Deployment, triton: Running) -> None:
    with Client(f"127.0.0.1:{deployment.grpc}") as client:
        embeds = client.embed_text(["戴墨镜的笑脸", "生日蛋糕"])
        np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-5)
        picture = np.zeros((64, 64, 3), np.uint8)
        assert client.embed_images([picture]).shape == (1, embeds.shape[1])


def test_models_that_call_others_are_served_too(deployment: Deployment, triton: Running) -> None:
    for model in ("tiny_rn_similarity", "tiny_rn_zero_shot"):
        url = f"http://127.0.0.1:{deployment.http}/v2/models/{model}/ready"
        with urllib.request.urlopen(url, timeout=5) as answer:
            assert answer.status == 200


def test_the_operator_s_token_is_the_one_of_the_environment(deployment: Deployment, triton: Running) -> None:
    index = f"http://127.0.0.1:{deployment.http}/v2/repository/index"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(index, method="POST"), timeout=5)
    asked = urllib.request.Request(index, method="POST", headers={"tuwen-admin-token": ADMIN})
    with urllib.request.urlopen(asked, timeout=5) as answer:
        assert b"tiny_rn_text" in answer.read()


def test_metrics_are_where_prometheus_looks(deployment: Deployment, triton: Running) -> None:
    assert (ROOT / "docker" / "prometheus.yml").read_text(encoding="utf-8").count("triton:8002") == 1
    with urllib.request.urlopen(f"http://127.0.0.1:{deployment.metrics}/metrics", timeout=5) as answer:
        assert b"nv_inference_request_success" in answer.read()


def test_triton_s_log_is_the_container_s(triton: Running) -> None:
    assert any("Started GRPCInferenceService" in line for line in triton.log)


def test_the_page_finds_pictures(deployment: Deployment, triton: Running) -> None:
    container = deployment.container("web")
    port = free_ports(1)[0]
    command = [*deployment.here(SERVICES["web"]["command"]), f"--port={port}"]
    process = container.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert f":{port}" in process.stdout.readline(), process.communicate()[1]
        wait_until_searchable(f"http://127.0.0.1:{port}/healthz")
        asked = f"http://127.0.0.1:{port}/api/search?limit=3&q={urllib.parse.quote('墨镜')}"
        with urllib.request.urlopen(asked, timeout=10) as answer:
            assert json.load(answer)["results"][0]["name"] == "墨镜"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_perf_s_command_finds_all_it_imports(deployment: Deployment) -> None:
    """Up to the binary, which the image fetches while it is built."""
    container = deployment.container("perf")
    script = """
import os
from perf import bench, curves, report, rounds, workload
curves.check_matplotlib()
rounds.machine()
workload.encode_jpeg(next(workload.photographs())[1], (64, 48))
os.environ["PATH"] = "/nowhere"  # the image has no git
assert bench._checkout() is None
"""
    ended = container.run(["python3", "-c", script])
    assert ended.returncode == 0, ended.stderr
    assert container.run(["tuwen", "bench", "run", "--help"]).returncode == 0


def test_sigterm_finishes_what_is_under_way(deployment: Deployment, triton: Running) -> None:
    """The last test: what `docker compose stop` does, while one request of a second's work is being answered."""
    pixels = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    with Client(f"127.0.0.1:{deployment.grpc}") as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.score, [file.getvalue()] * NUM_PICTURES, ["猫", "狗"])
        wait_until_busy(deployment)
        triton.process.send_signal(signal.SIGTERM)
        assert not asked.done()
        assert asked.result(timeout=40).probs.shape == (NUM_PICTURES, 2)
        assert triton.process.wait(45) == 0
        with pytest.raises(ServerUnavailable):
            client.embed_text(["猫"])
    assert "stopped" in "".join(triton.log[-3:])


def wait_until_searchable(health: str) -> None:
    """Until every picture is embedded."""
    deadline, reason = time.monotonic() + READY_WITHIN_S, b""
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(health, timeout=5):
                return
        except urllib.error.HTTPError as error:
            reason = error.read()
        time.sleep(0.2)
    pytest.fail(f"never searchable: {reason!r}")


def wait_until_busy(deployment: Deployment) -> None:
    """Until the server has begun with pictures."""
    deadline = time.monotonic() + 20
    pattern = re.compile(r'^nv_inference_pending_request_count\{model="preprocess_image_64.*\} (\d+)', re.MULTILINE)
    counted = re.compile(r'^nv_inference_count\{model="preprocess_image_64.*\} (\d+)', re.MULTILINE)
    before = None
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://127.0.0.1:{deployment.metrics}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        count = sum(int(number) for number in (*pattern.findall(text), *counted.findall(text)))
        before = count if before is None else before
        if count > before:
            return
    pytest.fail("the request did not reach the server")
