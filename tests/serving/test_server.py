"""The embedded server, for real: tiny models in a temporary repository, answers through gRPC, and how it fails."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pytriton", reason="needs pip install 'tuwen[serve]'")
pytest.importorskip("onnx")
grpcclient = pytest.importorskip("tritonclient.grpc")

from tiny_models import (  # noqa: E402
    BATCHED,
    BROKEN_PY,
    SLEEPER_PY,
    TABLE,
    WEIGHT,
    io,
    make_tower,
    parameter,
    write_model,
    write_others,
    write_pipeline,
)
from tritonclient.utils import InferenceServerException  # noqa: E402

from tuwen.serving.ports import free_ports  # noqa: E402
from tuwen.serving.server import EmbeddedServer, ServerError  # noqa: E402

pytestmark = pytest.mark.triton


def make_server(repository: Path, **options: object) -> EmbeddedServer:
    ports = zip(("grpc_port", "http_port", "metrics_port"), free_ports(3), strict=True)
    return EmbeddedServer(repository, **(dict(ports) | options))  # type: ignore[arg-type]


def infer(server: EmbeddedServer, model: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = {
        np.dtype("float32"): "FP32",
        np.dtype("int64"): "INT64",
        np.dtype("uint8"): "UINT8",
        np.dtype("O"): "BYTES",
    }
    tensors = []
    for name, array in inputs.items():
        tensors.append(grpcclient.InferInput(name, list(array.shape), names[array.dtype]))
        tensors[-1].set_data_from_numpy(array)
    with grpcclient.InferenceServerClient(server.endpoints.grpc) as client:
        result = client.infer(model, tensors)
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def infer_together(server: EmbeddedServer, model: str, name: str, arrays: list[np.ndarray]) -> list[object]:
    """Answers, or the error of a request, in order; sent at once, so that the batcher sees them together."""

    def one(array: np.ndarray) -> object:
        try:
            return next(iter(infer(server, model, {name: array}).values()))
        except InferenceServerException as error:
            return error

    with ThreadPoolExecutor(len(arrays)) as pool:
        return list(pool.map(one, arrays))


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def own_segments() -> set[Path]:
    return set(Path("/dev/shm").glob(f"tuwen_{os.getpid()}_*"))


def model_process(server: EmbeddedServer, instance: str) -> int:
    found = subprocess.run(["pgrep", "-P", str(server.pid), "-f", instance], capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.fixture(autouse=True)
def keep_logs_of_failures_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model_repository")
    write_pipeline(path)
    write_others(path)
    return path


@pytest.fixture(scope="module")
def served(repository: Path) -> Iterator[EmbeddedServer]:
    with make_server(repository, models=["pipeline", "wide", "embedding", "loose", "ragged", "mixed"]) as server:
        yield server


@pytest.fixture
def pipeline_repository(tmp_path: Path) -> Path:
    write_pipeline(tmp_path / "repository")
    return tmp_path / "repository"


def test_ensemble_of_ragged_images_keeps_each_request_its_own(served: EmbeddedServer) -> None:
    images = [np.full((1, size), size, dtype=np.uint8) for size in (1, 5, 2, 9, 9, 3)]
    answers = infer_together(served, "pipeline", "image", images)
    sizes = infer_together(served, "sizes", "image", images)
    for image, answer, size in zip(images, answers, sizes, strict=True):
        assert size[0, :2].tolist() == [image.size, image.sum()]
        # The third number is how many requests came at once, which this answer does not know.
        seen = (answer - np.array([image.size, image.sum()]) @ WEIGHT[:2]) / WEIGHT[2]
        assert seen.min() == seen.max() >= 1
    assert max(size[0, 2] for size in sizes) > 1, "the dynamic batcher made no batch of different lengths"


def test_a_batch_of_one_is_a_row_of_a_batch_of_many(served: EmbeddedServer) -> None:
    x = np.random.default_rng(0).integers(-9, 9, (8, 4)).astype(np.float32)
    whole = infer(served, "tower", {"x": x})["y"]
    rows = infer_together(served, "tower", "x", [row[None] for row in x])
    assert np.array_equal(whole, x @ WEIGHT)
    assert np.array_equal(np.concatenate(rows), whole)  # whole numbers: exact


def test_a_bad_value_fails_alone_in_its_batch(served: EmbeddedServer) -> None:
    ids = [0, 3, 99, 9, 1]
    answers = infer_together(served, "embedding", "ids", [np.array([[i]], dtype=np.int64) for i in ids])
    with grpcclient.InferenceServerClient(served.endpoints.grpc) as client:
        stats = client.get_inference_statistics("embedding").model_stats[0]
    assert stats.execution_count < len(ids), "the requests were never one batch"
    for row, answer in zip(ids, answers, strict=True):
        if row == 99:
            assert isinstance(answer, InferenceServerException)
            assert answer.status() == "StatusCode.INVALID_ARGUMENT"
            assert "out of data bounds" in answer.message()
        else:
            assert np.array_equal(answer, TABLE[None, [row]])


def test_requests_of_any_length_are_laid_end_to_end(served: EmbeddedServer) -> None:
    """One batch of them all, by Triton's ragged batching: each gets its own sum, and all hear of the longest."""
    requests = [np.full((1, length), length, np.float32) for length in (4, 1, 7, 2)]
    answers = infer_together(served, "ragged", "x", requests)
    assert [answer.tolist() for answer in answers] == [[[16, 7]], [[1, 7]], [[49, 7]], [[4, 7]]]


def test_a_wrong_shape_fails_alone(served: EmbeddedServer) -> None:
    answers = infer_together(served, "loose", "x", [np.ones((1, width), np.float32) for width in (4, 5, 4)])
    assert isinstance(answers[1], InferenceServerException)
    assert all(np.array_equal(answers[i], WEIGHT.sum(axis=0, keepdims=True)) for i in (0, 2))


def test_text_and_int64_without_batches(served: EmbeddedServer) -> None:
    texts = np.array(["图文", ""], dtype=np.object_)
    answer = infer(served, "mixed", {"texts": texts, "ids": np.array([1, 2**40])})
    assert [text.decode() for text in answer["same"]] == ["图文", ""]
    assert answer["sum"].tolist() == [2, 2**41]
    with pytest.raises(InferenceServerException, match="not UTF-8"):
        infer(served, "mixed", {"texts": np.array([b"\xff", b""], dtype=np.object_), "ids": np.array([1, 2])})


def test_options_of_the_configuration_are_honoured(served: EmbeddedServer) -> None:
    def num_threads(instance: str) -> int:
        status = Path(f"/proc/{model_process(served, instance)}/status").read_text()
        return int(status.partition("Threads:")[2].split()[0])

    assert num_threads("wide_0_0") - num_threads("tower_0_0") == 2  # three threads against one
    assert "tower: parameter colour has no effect" in served.log_path.read_text()


def test_every_part_is_ready_and_metrics_answer(served: EmbeddedServer) -> None:
    with grpcclient.InferenceServerClient(served.endpoints.grpc) as client:
        assert all(client.is_model_ready(name) for name in ("pipeline", "sizes", "tower", "mixed"))
    assert served.is_alive


def test_the_profile_is_loaded(pipeline_repository: Path) -> None:
    configs_dir = pipeline_repository / "tower" / "configs"
    configs_dir.mkdir()
    text = (configs_dir.parent / "config.pbtxt").read_text()
    (configs_dir / "busy.pbtxt").write_text(text.replace("200000", "1234"))
    with (
        make_server(pipeline_repository, model_config_name="busy") as server,
        grpcclient.InferenceServerClient(server.endpoints.grpc) as client,
    ):
        assert client.get_model_config("tower").config.dynamic_batching.max_queue_delay_microseconds == 1234
        assert client.get_model_config("sizes").config.dynamic_batching.max_queue_delay_microseconds == 200000


def test_stop_finishes_in_flight_requests_and_leaves_nothing(tmp_path: Path) -> None:
    config = io("input", "x", "TYPE_FP32", "1") + io("output", "x", "TYPE_FP32", "1")
    write_model(tmp_path / "repository", "sleeper", config, SLEEPER_PY.format(at_start=0))
    before = own_segments()
    server = make_server(tmp_path / "repository", models=["sleeper"])
    server.start()
    pid = server.pid
    assert own_segments() > before
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(infer, server, "sleeper", {"x": np.ones(1, np.float32)})
        time.sleep(0.3)
        started_at = time.monotonic()
        server.stop()
        assert answer.result()["x"] == 1
    # 1 s of request, and Triton looks once a second whether its models are gone.
    assert time.monotonic() - started_at < 6
    assert not has_processes(pid)
    assert own_segments() == before
    assert not server.is_alive
    assert not server.log_path.exists()
    server.stop()
    server.wait()


def test_a_killed_server_is_noticed(pipeline_repository: Path) -> None:
    before = own_segments()
    server = make_server(pipeline_repository)
    server.start()
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(ServerError, match=r"killed by SIGKILL.*Started Metrics Service") as caught:
        server.wait()
    assert wait_until(lambda: not has_processes(server.pid))
    assert own_segments() == before
    server.stop()
    assert server.log_path.exists()
    assert str(server.log_path) in str(caught.value)


def test_a_dead_model_process_is_noticed(pipeline_repository: Path, tmp_path: Path) -> None:
    with make_server(pipeline_repository, log_path=tmp_path / "logs" / "triton.log") as server:
        time.sleep(1.5)  # the watch has seen it alive
        os.kill(model_process(server, "tower_0_0"), signal.SIGKILL)
        with pytest.raises(ServerError, match="model instance tower_0_0 died"):
            server.wait()
        assert not server.is_alive
        started_at = time.monotonic()
    assert time.monotonic() - started_at < 3
    assert wait_until(lambda: not has_processes(server.pid))
    assert (tmp_path / "logs" / "triton.log").exists()


def test_the_server_ends_with_the_process_that_started_it(pipeline_repository: Path) -> None:
    server = make_server(pipeline_repository)
    ports = [f"{flag[2:].replace('-', '_')}={port}" for flag, port in server._ports.items()]
    script = f"""
import pathlib, time
from tuwen.serving.server import EmbeddedServer
server = EmbeddedServer(pathlib.Path({str(pipeline_repository)!r}), {", ".join(ports)})
server.start()
print(server.pid, flush=True)
time.sleep(60)
"""
    environment = os.environ | {"TMPDIR": str(pipeline_repository.parent)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert has_processes(pid)
        parent.kill()
    assert wait_until(lambda: not has_processes(pid))
    assert not list(Path("/dev/shm").glob(f"tuwen_{parent.pid}_*"))


@pytest.mark.parametrize(
    ("name", "write", "sentence"),
    [
        ("bad_onnx", lambda path: (path / "1" / "model.onnx").write_text("hello"), r"is not a model that ONNX Runtime"),
        (
            "bad_option",
            lambda path: (path / "config.pbtxt").write_text(
                (path / "config.pbtxt").read_text() + parameter("execution_mode", "2")
            ),
            r"^model bad_option does not load: execution_mode is '2', expected one of 0, 1 \(Triton's log",
        ),
        (
            "bad_shape",
            lambda path: (path / "config.pbtxt").write_text(
                (path / "config.pbtxt").read_text().replace("dims: [4]", "dims: [5]")
            ),
            r"input x is \[-1, 5\] in config.pbtxt with its batch but \[-1, 4\] in \S+model.onnx",
        ),
    ],
)
def test_a_model_that_does_not_load_is_one_sentence(
    tmp_path: Path, name: str, write: Callable[[Path], object], sentence: str
) -> None:
    tower_io = io("input", "x", "TYPE_FP32", "4") + io("output", "y", "TYPE_FP32", "3")
    write_model(tmp_path, name, BATCHED + tower_io, make_tower())
    write(tmp_path / name)
    server = make_server(tmp_path, models=[name])
    with pytest.raises(ServerError, match=sentence) as caught:
        server.start()
    assert "\n" not in str(caught.value)
    assert server.log_path.exists()
    assert wait_until(lambda: not has_processes(server.pid))


def test_an_exception_in_initialize_is_told_with_its_place(pipeline_repository: Path) -> None:
    (pipeline_repository / "sizes" / "1" / "model.py").write_text(BROKEN_PY, encoding="utf-8")
    expected = r"model sizes does not load: ValueError: 词表: 3 tokens, expected 21128 \(\S+/sizes/1/model.py, line 4\)"
    with pytest.raises(ServerError, match=expected):
        make_server(pipeline_repository).start()


def test_a_slow_start_is_given_up(tmp_path: Path) -> None:
    config = io("input", "x", "TYPE_FP32", "1") + io("output", "x", "TYPE_FP32", "1")
    write_model(tmp_path, "sleeper", config, SLEEPER_PY.format(at_start=30))
    server = make_server(tmp_path, models=["sleeper"], startup_timeout_s=1.0)
    with pytest.raises(ServerError, match="not ready after 1 s"):
        server.start()
    assert wait_until(lambda: not has_processes(server.pid))


def test_a_taken_port_is_named_with_its_flag(pipeline_repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=rf"^port {port} is taken: choose another with --http-port$"):
            make_server(pipeline_repository, http_port=port).start()
    with pytest.raises(ServerError, match=r"--grpc-port and --metrics-port are both 9999"):
        make_server(pipeline_repository, grpc_port=9999, metrics_port=9999).start()
    with pytest.raises(ServerError, match=r"cannot listen on 192\.0\.2\.1"):  # TEST-NET: never ours
        make_server(pipeline_repository, host="192.0.2.1").start()


def test_nothing_to_serve_says_how_to_build(pipeline_repository: Path, tmp_path: Path) -> None:
    (pipeline_repository / "tower" / "1" / "model.onnx").unlink()
    for repository, models, sentence in [
        (tmp_path / "absent", None, r"no such model repository; run `tuwen build --checkpoint"),
        (tmp_path, None, r"no model in this repository; run `tuwen build"),
        (pipeline_repository, None, r"no ensemble is built yet; run `tuwen build"),
        (pipeline_repository, ["pipeline"], r"model pipeline is not built, \S+tower/1/model.onnx is missing"),
        (pipeline_repository, ["nope"], r"no model nope; there are pipeline, sizes, tower"),
    ]:
        with pytest.raises(ServerError, match=sentence):
            make_server(repository, models=models).start()
