"""The embedded onnxruntime backend without a server: what its configuration's options become, and what it refuses."""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ort = pytest.importorskip("onnxruntime")
MODEL_PY = Path(__file__).parents[2] / "tuwen" / "serving" / "embedded_backends" / "onnxruntime" / "model.py"


class RefusedError(Exception):
    pass


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with the little of Triton's own module that loading a model touches."""
    warnings: list[str] = []
    pb_utils = types.SimpleNamespace(
        TritonModelException=RefusedError, Logger=types.SimpleNamespace(log_warn=warnings.append), warnings=warnings
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb_utils)
    spec = importlib.util.spec_from_file_location("onnxruntime_backend", MODEL_PY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(level: int | None = None, **parameters: str) -> dict[str, Any]:
    graph = {} if level is None else {"graph": {"level": level}}
    return {
        "name": "tower",
        "optimization": graph,
        "parameters": {key.replace("__", "."): {"string_value": value} for key, value in parameters.items()},
    }


@pytest.mark.parametrize(
    ("parameters", "option", "value"),
    [
        ({"intra_op_thread_count": "3"}, "intra_op_num_threads", 3),
        ({"inter_op_thread_count": "2"}, "inter_op_num_threads", 2),
        ({"execution_mode": "1"}, "execution_mode", ort.ExecutionMode.ORT_PARALLEL),
        ({"enable_mem_arena": "0"}, "enable_cpu_mem_arena", False),
        ({"enable_mem_pattern": "False"}, "enable_mem_pattern", False),
        ({}, "graph_optimization_level", ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
        ({"level": -1}, "graph_optimization_level", ort.GraphOptimizationLevel.ORT_ENABLE_BASIC),
        ({"level": 1}, "graph_optimization_level", ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED),
        ({"level": 2}, "graph_optimization_level", ort.GraphOptimizationLevel.ORT_DISABLE_ALL),
    ],
)
def test_an_option_reaches_the_session(backend: Any, parameters: dict[str, Any], option: str, value: object) -> None:
    options, _ = backend._read_options(config(**parameters))
    assert getattr(options, option) == value


def test_entries_reach_the_session_and_the_run(backend: Any) -> None:
    device, shrink = "session.use_device_allocator_for_initializers", "memory.enable_memory_arena_shrinkage"
    options, run_options = backend._read_options(
        config(session__use_device_allocator_for_initializers="1", memory__enable_memory_arena_shrinkage="cpu:0")
    )
    assert options.get_session_config_entry(device) == "1"
    assert run_options.get_run_config_entry(shrink) == "cpu:0"


def test_threads_stop_spinning_between_runs_unless_told_otherwise(backend: Any) -> None:
    stopping = "session.force_spinning_stop"
    options, _ = backend._read_options(config())
    assert options.get_session_config_entry(stopping) == "1"
    options, _ = backend._read_options(config(session__force_spinning_stop="0", session__intra_op__allow_spinning="0"))
    assert options.get_session_config_entry(stopping) == "0"
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_a_client_hears_of_no_path(backend: Any) -> None:
    said = "Non-zero status code, /onnxruntime_src/core/x.cc:81 failed: 'C:/models/a.onnx' (a/b.onnx) idx=99"
    assert backend._PATH.sub("…", said) == "Non-zero status code, … failed: '…' (…) idx=99"


def test_an_unknown_option_is_a_warning(backend: Any) -> None:
    backend._read_options(config(colour="blue", gpu_mem_limit="1"))
    assert [warning.split()[2] for warning in backend.pb_utils.warnings] == ["colour", "gpu_mem_limit"]


def test_a_queues_parameters_have_an_effect_with_a_queue_alone(backend: Any) -> None:
    backend._read_options(config(batches_at_once="2", max_queue_size__bulk="9", max_wait_s__bulk="9"))
    assert backend.pb_utils.warnings == []
    backend._read_options(config(batches_at_once="2"))
    assert [warning.split()[2] for warning in backend.pb_utils.warnings] == ["batches_at_once"]


@pytest.mark.parametrize(
    ("cores", "parameters", "sessions", "workers"),
    [
        (1, {"batches_at_once": "2"}, [], 1),
        (2, {}, [], 1),
        (2, {"batches_at_once": "1"}, [], 1),
        (2, {"batches_at_once": "2"}, [1], 2),
        (16, {"batches_at_once": "2"}, [8], 2),
        (16, {"batches_at_once": "3", "intra_op_thread_count": "0"}, [5], 3),
        (16, {"batches_at_once": "4", "intra_op_thread_count": "2"}, [1], 2),
    ],
)
def test_batches_at_once_share_the_threads(
    backend: Any,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    parameters: dict[str, str],
    sessions: list[int],
    workers: int,
) -> None:
    opened: list[int] = []
    queues: list[int] = []
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(backend, "_open", lambda _, options: opened.append(options.intra_op_num_threads))
    monkeypatch.setattr(backend, "QueuedModel", lambda *arguments: queues.append(arguments[2]))
    backend.TritonPythonModel()._queue(config(**parameters) | {"max_batch_size": 32}, Path("model.onnx"))
    assert (opened, queues) == (sessions, [workers])


@pytest.mark.parametrize("text", ["0", "-1", "many", ""])
def test_batches_at_once_is_a_number(backend: Any, text: str) -> None:
    with pytest.raises(RefusedError, match=f"batches_at_once is '{text}', expected a number, 1 or more"):
        backend._batches_at_once(config(batches_at_once=text))


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"intra_op_thread_count": "-1"}, "intra_op_thread_count is '-1', expected a number, 0 or more"),
        ({"execution_mode": "parallel"}, "execution_mode is 'parallel', expected one of 0, 1"),
        ({"enable_mem_arena": "maybe"}, "enable_mem_arena is 'maybe', expected one of 1, true, on, 0, false, off"),
        ({"level": 7}, "optimization.graph.level is 7, expected one of -1, 0, 1, 2"),
    ],
)
def test_a_bad_value_is_refused(backend: Any, parameters: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RefusedError, match=sentence):
        backend._read_options(config(**parameters))


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        ({"name": "z"}, r"config.pbtxt has inputs \['z'\], m.onnx has \['x'\]"),
        ({"data_type": "TYPE_FP16"}, r"input x is TYPE_FP16 in config.pbtxt but tensor\(float\) in m.onnx"),
        ({"dims": ["3", "5"]}, r"input x is \[-1, 3, 5\] in config.pbtxt with its batch but \[-1, 3, 4\] in m.onnx"),
        ({"dims": ["3", "-1"]}, r"input x is \[-1, 3, -1\]"),
        ({"dims": ["12"]}, r"input x is \[-1, 12\]"),
        ({}, None),
        ({"dims": ["12"], "reshape": {"shape": ["3", "4"]}}, None),
    ],
)
def test_tensors_must_agree_with_the_graph(backend: Any, tensor: dict[str, Any], sentence: str | None) -> None:
    told = {"input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["3", "4"]} | tensor]}
    graph = [types.SimpleNamespace(name="x", type="tensor(float)", shape=["batch", 3, 4])]
    if sentence is None:
        backend._check_tensors(Path("m.onnx"), "input", told, graph, True)
    else:
        with pytest.raises(RefusedError, match=sentence):
            backend._check_tensors(Path("m.onnx"), "input", told, graph, True)
