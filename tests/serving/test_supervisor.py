"""What dies or hangs under `tuwen serve` is replaced; what it cannot mend it gives up with a sentence."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from test_server import infer, make_server, model_process, wait_until
from tiny_models import SLEEPER_PY, WEIGHT, io, write_model, write_pipeline
from tritonclient.utils import InferenceServerException

from tuwen.serving.control import ControlFailed
from tuwen.serving.health import probe_inputs
from tuwen.serving.model_processes import model_of
from tuwen.serving.ports import free_ports
from tuwen.serving.server import EmbeddedServer, ServerError
from tuwen.serving.supervisor import Supervisor

pytestmark = pytest.mark.triton

# Answers one `texts` by calling `sleeper`, as the similarity model calls the ensembles.
CALLER_PY = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    async def execute(self, requests):
        time_input = pb_utils.Tensor("x", np.ones(1, np.float32))
        for _ in range(2):
            call = pb_utils.InferenceRequest(model_name="c_text", requested_output_names=["x"], inputs=[time_input])
            response = await call.async_exec()
            if response.has_error():
                return [pb_utils.InferenceResponse(error=response.error())]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("x", np.ones(1, np.float32))])]
"""


@dataclass
class Supervised:
    """A supervisor running in a thread."""

    supervisor: Supervisor
    events: list[str] = field(default_factory=list)
    failure: Exception | None = None

    @property
    def server(self) -> EmbeddedServer:
        return self.supervisor.server


@contextmanager
def supervised(repository: Path, models: list[str] | None = None, **options: float) -> Iterator[Supervised]:
    ports = dict(zip(("grpc_port", "http_port", "metrics_port"), free_ports(3), strict=True))
    events: list[str] = []
    supervisor = Supervisor(
        lambda: make_server(repository, models=models, **ports, admin_token="a-token-of-the-tests"),
        on_event=events.append,
        **options,  # type: ignore[arg-type]
    )
    held = Supervised(supervisor, events)

    def run() -> None:
        try:
            supervisor.run()
        except ServerError as error:
            held.failure = error

    supervisor.start()
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield held
    finally:
        supervisor.request_stop()
        thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_pipeline(tmp_path / "repository")
    return tmp_path / "repository"


def ask(held: Supervised) -> np.ndarray | None:
    """The pipeline's answer to one image of three bytes; None while it cannot be had."""
    try:
        return infer(held.server, "pipeline", {"image": np.full((1, 3), 2, np.uint8)})["y"]
    except InferenceServerException:
        return None


EXPECTED = np.array([[3, 6, 1, 0]], np.float32) @ WEIGHT


def is_right(held: Supervised) -> Callable[[], bool]:
    return lambda: (answer := ask(held)) is not None and np.array_equal(answer, EXPECTED)


def test_a_dead_model_process_is_replaced_while_the_rest_goes_on(repository: Path) -> None:
    with supervised(repository) as held:
        pid = held.server.pid
        for instance in ("tower_0_0", "sizes_0_0", "tower_0_0"):
            assert wait_until(is_right(held))
            time.sleep(0.6)  # the watch has seen it alive
            os.kill(model_process(held.server, f"{instance}$|{instance} "), signal.SIGKILL)
            count = len(held.events)
            assert wait_until(lambda count=count: len(held.events) > count)
            assert held.events[-1].startswith(f"the process of model instance {instance} died")
            assert wait_until(is_right(held))
        assert held.server.pid == pid, "the server itself was not started anew"
    assert held.failure is None


QUEUED_PY = """
import json, time
import triton_python_backend_utils as pb_utils
from tuwen.serving.queued_model import QueuedModel

class TritonPythonModel:
    def initialize(self, args):
        self.queued = QueuedModel(json.loads(args["model_config"]), self.answer, workers=1, max_rows=1)

    def execute(self, requests):
        self.queued.submit(requests)

    def answer(self, requests):
        time.sleep(1.0)
        return [pb_utils.InferenceResponse([pb_utils.get_input_tensor_by_name(one, "x")]) for one in requests]

    def finalize(self):
        self.queued.close()
"""
BOUNDS = "".join(
    f'parameters {{ key: "{name}.{priority}" value {{ string_value: "{value}" }} }}\n'
    for name, value in (("max_queue_size", 2), ("max_wait_s", 9))
    for priority in ("interactive", "bulk")
)


@pytest.fixture
def queued_repository(tmp_path: Path) -> Path:
    tensors = io("input", "x", "TYPE_FP32", "1") + io("output", "x", "TYPE_FP32", "1")
    config = "max_batch_size: 8 dynamic_batching {}\n" + tensors + BOUNDS
    write_model(tmp_path / "queued", "queued", config, QUEUED_PY)
    return tmp_path / "queued"


def test_a_full_queue_refuses_at_once_and_a_stop_answers_what_waits(queued_repository: Path) -> None:
    x = {"x": np.ones((1, 1), np.float32)}
    with make_server(queued_repository, models=["queued"]) as server, ThreadPoolExecutor(6) as pool:
        waiting = []
        for _ in range(3):  # one is worked on, two wait
            waiting.append(pool.submit(infer, server, "queued", x))
            time.sleep(0.1)
        started = time.monotonic()
        with pytest.raises(InferenceServerException, match="Exceeds maximum queue size") as raised:
            infer(server, "queued", x)
        assert raised.value.status() == "StatusCode.UNAVAILABLE"
        assert time.monotonic() - started < 0.5
        server.stop()
        assert [each.result()["x"].item() for each in waiting] == [1, 1, 1]


def test_requests_that_died_with_their_process_are_told_so(queued_repository: Path) -> None:
    """Triton would leave them without an answer, so the server is started anew."""
    with supervised(queued_repository, models=["queued"]) as held, ThreadPoolExecutor(2) as pool:
        assert infer(held.server, "queued", {"x": np.ones((1, 1), np.float32)})["x"] == 1
        waiting = pool.submit(infer, held.server, "queued", {"x": np.ones((1, 1), np.float32)})
        time.sleep(0.6)
        os.kill(model_process(held.server, "queued_0_0"), signal.SIGKILL)
        with pytest.raises(InferenceServerException):
            waiting.result(timeout=15)
        assert wait_until(lambda: bool(held.events), 20)
        assert "died with the requests that waited in it" in held.events[0]
        assert infer(held.server, "queued", {"x": np.ones((1, 1), np.float32)})["x"] == 1


def test_a_dead_server_is_started_anew_on_its_ports(repository: Path) -> None:
    with supervised(repository) as held:
        assert wait_until(is_right(held))
        before, endpoints = held.server.pid, held.server.endpoints
        assert before is not None
        os.kill(before, signal.SIGKILL)
        assert wait_until(lambda: bool(held.events), 20)
        assert "killed by SIGKILL" in held.events[0]
        assert "serves again" in held.events[0]
        assert (held.server.pid, held.server.endpoints) != (before, None)
        assert held.server.endpoints == endpoints
        assert wait_until(is_right(held))


def test_a_server_that_hangs_is_started_anew_and_one_that_only_pauses_is_not(repository: Path) -> None:
    with supervised(repository, hang_timeout_s=3.0, probe_interval_s=0.5) as held:
        assert wait_until(is_right(held))
        pid = held.server.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(pid, signal.SIGCONT)
        assert wait_until(is_right(held))
        time.sleep(1)
        assert (held.events, held.server.pid) == ([], pid)
        os.kill(pid, signal.SIGSTOP)
        assert wait_until(lambda: bool(held.events), 20)
        assert "no answer within 3 s" in held.events[0]
        assert wait_until(is_right(held))


def test_a_model_that_hangs_is_noticed_though_triton_calls_it_ready(repository: Path) -> None:
    with supervised(repository, hang_timeout_s=3.0, probe_interval_s=0.5) as held:
        assert wait_until(is_right(held))
        os.kill(model_process(held.server, "tower_0_0"), signal.SIGSTOP)
        assert wait_until(lambda: bool(held.events), 20)
        assert "model pipeline" in held.events[0]
        assert wait_until(is_right(held))


def test_what_dies_again_and_again_is_given_up(repository: Path) -> None:
    with supervised(repository, max_repairs=1) as held:
        for _ in range(2):
            assert wait_until(is_right(held))
            assert held.server.pid is not None
            os.kill(held.server.pid, signal.SIGKILL)
            assert wait_until(lambda: bool(held.events) or held.failure is not None, 20)
            wait_until(lambda: held.failure is not None, 2)
    assert held.failure is not None
    assert "given up after 1 repairs" in str(held.failure)
    assert len(held.events) == 1


def test_a_stop_lets_models_that_call_others_finish(tmp_path: Path) -> None:
    """Two calls of one second each are under way; without draining the second one meets a server that stops."""
    tensors = io("input", "x", "TYPE_FP32", "1") + io("output", "x", "TYPE_FP32", "1")
    for side in ("text", "image"):
        write_model(tmp_path, f"c_{side}", tensors, SLEEPER_PY.format(at_start=0))
    serves = 'parameters { key: "serves" value { string_value: "c" } }\n'
    write_model(tmp_path, "caller", tensors + serves, CALLER_PY)
    with make_server(tmp_path, models=["caller"]) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(infer, server, "caller", {"x": np.ones(1, np.float32)})
        time.sleep(0.5)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        time.sleep(0.3)
        with pytest.raises(InferenceServerException, match=r"no available versions|connect"):
            infer(server, "caller", {"x": np.ones(1, np.float32)})
        assert answer.result()["x"] == 1
        stopping.join()


def test_loading_needs_the_token(repository: Path) -> None:
    with make_server(repository) as server:
        stranger = type(server.control)("127.0.0.1", server._ports["--http-port"], "not-the-token-at-all")
        with pytest.raises(ControlFailed, match="restricted"):
            stranger.unload(["pipeline"], 1)
        server.control.unload(["pipeline"], 10)
        server.control.load("pipeline", 10)
        assert server.control.input_names("pipeline", 5) == {"image"}


def test_names_of_instances_and_probes() -> None:
    assert model_of("vit_b_16_text_tower_0_1") == "vit_b_16_text_tower"
    assert model_of("(unknown)") is None
    assert probe_inputs({"x"}) is None
    (first,), (second,) = probe_inputs({"text"}) or [], probe_inputs({"text"}) or []
    assert first["data"] != second["data"], "an answer from the cache would prove nothing"
    assert {one["name"] for one in probe_inputs({"images", "labels", "classifier", "calibration"}) or []} == {
        "images",
        "labels",
    }
