"""`tuwen serve` and `tuwen search` as a person runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from tuwen_client import Client

from perf.processes import descendants
from tests.system.conftest import SAMPLE_DATA, Ports, some_ports
from tuwen.data.pairs import PairSet
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton

TUWEN = [sys.executable, "-m", "tuwen.cli"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TUWEN, *arguments], capture_output=True, text=True, timeout=180, check=False)


@contextmanager
def serving(repository: Path, ports: Ports, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """`tuwen serve` in the background, given to the test once it has printed its endpoints."""
    arguments = ["serve", "--repository", str(repository), *port_flags(ports), *flags]
    with subprocess.Popen([*TUWEN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(3)]
            assert lines[0].split() == ["gRPC", f"127.0.0.1:{ports.grpc}"]
            assert lines[1].split() == ["HTTP", f"http://127.0.0.1:{ports.http}"]
            assert lines[2].split() == ["metrics", f"http://127.0.0.1:{ports.metrics}/metrics"]
            yield process
        finally:
            process.kill()


def port_flags(ports: Ports) -> list[str]:
    return [
        "--grpc-port", str(ports.grpc), "--http-port", str(ports.http), "--metrics-port", str(ports.metrics),
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_prints_its_endpoints_and_ends_cleanly(sample_repository: Path, number: signal.Signals) -> None:
    ports = some_ports()
    with serving(sample_repository, ports) as process:
        with Client(f"localhost:{ports.grpc}") as client:
            assert client.embed_text(["猫"]).shape == (1, client.embed_dim)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", ports.grpc)) != 0


def test_serve_starts_anew_when_triton_is_killed(sample_repository: Path) -> None:
    ports = some_ports()
    with serving(sample_repository, ports) as process, Client(f"localhost:{ports.grpc}") as client:
        client.embed_text(["猫"])
        os.kill(_triton_descendants(process.pid)[0], signal.SIGKILL)
        assert process.stderr is not None
        said = next(line for line in process.stderr if "serves again" in line)
        assert "tritonserver was killed by SIGKILL" in said
        assert client.embed_text(["猫"]).shape == (1, client.embed_dim)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_serve_without_restart_ends_with_one_sentence(sample_repository: Path) -> None:
    with serving(sample_repository, some_ports(), "--no-restart") as process:
        os.kill(_triton_descendants(process.pid)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "tritonserver was killed by SIGKILL" in " ".join(errors.split())
    assert "Traceback" not in errors


def _triton_descendants(pid: int) -> list[int]:
    return [found for found, command in descendants(pid).items() if command and command[0].endswith("/tritonserver")]


def test_a_taken_port_is_one_sentence(sample_repository: Path) -> None:
    ports = some_ports()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports.grpc))
        taken.listen()
        result = run("serve", "--repository", str(sample_repository), *port_flags(ports))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.strip() == f"error: port {ports.grpc} is taken: choose another with --grpc-port"


def test_an_empty_repository_is_one_sentence(tmp_path: Path) -> None:
    result = run("serve", "--repository", str(tmp_path))
    assert result.returncode == 1
    assert re.fullmatch(r"error: .*no model in this repository; run `tuwen build .*` first\n", result.stderr)


def test_a_broken_model_is_one_sentence_with_the_reason(sample_repository: Path, tmp_path: Path) -> None:
    import shutil

    repository = tmp_path / "repository"
    shutil.copytree(sample_repository, repository)
    (repository / "tiny_rn_text_tower" / "1" / "model.onnx").write_bytes(b"not a model")
    result = run("serve", "--repository", str(repository), *port_flags(some_ports()))
    assert result.returncode == 1
    sentence = " ".join(result.stderr.split())
    assert "error: model tiny_rn_text_tower does not load" in sentence
    assert "Traceback" not in sentence


def test_search_ranks_a_folder(sample_server: EmbeddedServer, sample_pairs: PairSet, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for index in range(12):
        where = folder if index % 2 else folder / "deeper"
        (where / f"{index}.webp").write_bytes(sample_pairs.image_bytes(sample_pairs.image_ids[index * 100]))
    (folder / "notes.txt").write_text("not a picture")
    (folder / "broken.png").write_bytes(b"not a picture either")
    sheet = tmp_path / "sheet.png"
    arguments = ["--images", str(folder), "--url", sample_server.endpoints.grpc, "--top", "3"]
    result = run("search", "戴墨镜的笑脸", "旗", *arguments, "--json", "--sheet", str(sheet))
    assert result.returncode == 0, result.stderr
    assert "skipped broken.png: image is not a readable picture file" in result.stderr
    found = json.loads(result.stdout)
    assert list(found) == ["戴墨镜的笑脸", "旗"]
    for matches in found.values():
        assert len(matches) == 3
        cosines = [match["cosine"] for match in matches]
        assert cosines == sorted(cosines, reverse=True)
        assert all((folder / match["name"]).is_file() for match in matches)
    assert Image.open(sheet).size[0] > 300


def test_search_finds_what_the_demo_promises(sample_server: EmbeddedServer) -> None:
    """The queries of `make demo`, over a style the sample model never saw."""
    wanted = {"墨镜": "墨镜", "生日蛋糕": "蛋糕", "红色的心": "心", "哭泣的猫": "猫"}
    gallery = str(SAMPLE_DATA / "valid_imgs.tsv")
    arguments = ["--images", gallery, "--url", sample_server.endpoints.grpc, "--json"]
    result = run("search", *wanted, *arguments)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    missed = [query for query, word in wanted.items() if not any(word in match["name"] for match in found[query])]
    assert not missed, found


def test_search_without_a_server_is_one_quick_sentence(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    result = run("search", "猫", "--images", str(tmp_path), "--url", f"localhost:{some_ports().grpc}")
    assert result.returncode == 1
    assert result.stderr.startswith("error: no server answers")


def test_search_in_an_empty_folder_is_one_sentence(tmp_path: Path, sample_server: EmbeddedServer) -> None:
    result = run("search", "猫", "--images", str(tmp_path), "--url", sample_server.endpoints.grpc)
    assert result.returncode == 1
    assert "no picture in it" in result.stderr


def test_two_searches_at_once_do_not_disturb_each_other(sample_server: EmbeddedServer) -> None:
    texts = [f"第{number}个" for number in range(300)]
    rows: list[object] = [None, None]

    def embed(slot: int) -> None:
        with Client(sample_server.endpoints.grpc) as client:
            rows[slot] = client.embed_text(texts if slot else texts[::-1])

    threads = [threading.Thread(target=embed, args=(slot,)) for slot in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    backward, forward = rows
    assert abs(backward[::-1] - forward).max() < 1e-5  # type: ignore[index,operator]
