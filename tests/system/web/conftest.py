"""`tuwen web` as a process of its own, over the real server with the sample model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.system.conftest import ROOT, SAMPLE_DATA
from tuwen.cli.search import captions_of
from tuwen.data.pairs import iter_images
from tuwen.serving.server import EmbeddedServer

IMAGES = SAMPLE_DATA / "valid_imgs.tsv"
HOSTILE_NAME = "<img src=x onerror='window.hit=1'>.png"
NO_PICTURE = "page.png"  # HTML that calls itself a PNG
START_WITHIN_S = 60


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Site:
    """A running `tuwen web`."""

    process: subprocess.Popen[str]
    port: int
    log_path: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8")

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """GET, or POST where there is a body; header names with _ for -."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET" if body is None else "POST", path, body, named)
        answer = read(connection.getresponse())
        connection.close()
        return answer

    def search(self, **terms: object) -> Answer:
        return self.ask(f"/api/search?{urlencode(terms)}")

    def await_ready(self) -> None:
        deadline = time.monotonic() + START_WITHIN_S
        while self.ask("/healthz").status != 200:
            assert time.monotonic() < deadline, self.log
            assert self.process.poll() is None, self.log
            time.sleep(0.1)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=20)


def read(response: HTTPResponse) -> Answer:
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


@contextmanager
def site(images: Path, url: str, folder: Path, *flags: str) -> Iterator[Site]:
    """`tuwen web` on a free port, once it answers; its collection may not be embedded yet."""
    log_path = folder / "stderr.txt"
    command = [sys.executable, "-m", "tuwen.cli", "web", "--images", str(images), "--url", url, "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "clients/python"), str(ROOT / "clients/web"), os.environ.get("PYTHONPATH", "")]
    )
    with (
        open(log_path, "w", encoding="utf-8") as log,
        subprocess.Popen(
            [*command, "--cache", str(folder / "cache"), *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            cwd=folder,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(r"http://\S+:(\d+)\n", line)
            assert found, f"{line!r} {log_path.read_text(encoding='utf-8')}"
            yield Site(process, int(found[1]), log_path)
        finally:
            process.kill()


@pytest.fixture(scope="session")
def emoji() -> dict[str, bytes]:
    """The first hundred pictures of the sample by name, and a few that are searched for."""
    names = captions_of(IMAGES)
    everything = {names[one.image_id]: one.encoded for one in iter_images(IMAGES)}
    wanted = ("墨镜", "电脑鼠标", "哭泣的猫", "纸杯蛋糕")
    return dict(list(everything.items())[:100]) | {name: everything[name] for name in wanted}


@pytest.fixture(scope="session")
def folder(emoji: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those as files; one with a hostile name, and one that is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, encoded in emoji.items():
        (folder / f"{name}.png").write_bytes(encoded)
    (folder / HOSTILE_NAME).write_bytes(emoji["墨镜"])
    (folder / NO_PICTURE).write_text("<script>window.hit=1</script>")
    return folder


@pytest.fixture(scope="module")
def folder_site(
    folder: Path, sample_server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    with site(folder, sample_server.endpoints.grpc, tmp_path_factory.mktemp("site")) as running:
        running.await_ready()
        yield running


@pytest.fixture(scope="module")
def sample_site(sample_server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The whole sample, whose pictures have names."""
    with site(IMAGES, sample_server.endpoints.grpc, tmp_path_factory.mktemp("site")) as running:
        running.await_ready()
        yield running
