"""Triton Python-based backend `onnxruntime`: runs the model.onnx of every model that says backend: "onnxruntime".

Tensors in, tensors out, under their ONNX names. It stands in for Triton's C++ backend, which the wheel nvidia-pytriton
lacks, and reads the same config.pbtxt; `tuwen serve` copies it into the server's backend folder.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from tuwen.serving.queued_model import QueuedModel, is_queued
from tuwen.serving.responses import refusal, response_of

Feed = dict[str, Any]  # tensor name -> numpy array

# source: triton onnxruntime_backend README, "Model Config Options"
_GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
# ONNX Runtime tells where in its own source, or in which file, something failed; that is for the log.
_PATH = re.compile(r"[^\s'\"(]*/[^\s'\")]*")
_BOOLS = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
_MODES = {"0": ort.ExecutionMode.ORT_SEQUENTIAL, "1": ort.ExecutionMode.ORT_PARALLEL}
_SAME_NAME_TYPES = ("bool", "string", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
_TRITON_TYPES = {
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    **{f"tensor({name})": f"TYPE_{name.upper()}" for name in _SAME_NAME_TYPES},
}


# Ours; the C++ backend does not read them.
_AT_ONCE = "batches_at_once"
_QUEUE_PARAMETERS = ("max_queue_size.", "max_wait_s.", _AT_ONCE)
# ONNX Runtime's own names; the C++ backend does not read them.
_SPINNING, _STOP_SPINNING = "session.intra_op.allow_spinning", "session.force_spinning_stop"

# Sizes of the batch's requests -> the tensor. Source: triton docs, "Ragged Batching"; the C++ backend makes the same.
_BATCH_INPUTS: dict[str, Callable[[list[int]], Any]] = {
    "BATCH_ELEMENT_COUNT": lambda sizes: np.array(sizes, np.int32),
    "BATCH_ACCUMULATED_ELEMENT_COUNT": lambda sizes: np.cumsum(sizes, dtype=np.int32),
    "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO": lambda sizes: np.cumsum([0, *sizes], dtype=np.int32),
    "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE": lambda sizes: np.zeros(max(sizes), np.int32),
}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        version_dir = Path(args["model_repository"]) / args["model_version"]
        path = version_dir / (config["default_model_filename"] or "model.onnx")
        if not path.exists():
            raise pb_utils.TritonModelException(f"{path} does not exist")
        options, self._run_options = _read_options(config)
        self._session = _open(path, options)
        self._is_batching = config["max_batch_size"] > 0
        self._batch_inputs = {
            name: _BATCH_INPUTS[_supported_kind(each)]
            for each in config.get("batch_input", [])
            for name in each["target_name"]
        }
        self._ragged = {tensor["name"] for tensor in config["input"] if tensor.get("allow_ragged_batch")}
        made = self._batch_inputs.keys()
        _check_tensors(
            path, "input", config, [t for t in self._session.get_inputs() if t.name not in made], self._is_batching
        )
        _check_tensors(path, "output", config, self._session.get_outputs(), self._is_batching)
        self._input_names = [tensor["name"] for tensor in config["input"]]
        self._string_inputs = {tensor["name"] for tensor in config["input"] if tensor["data_type"] == "TYPE_STRING"}
        self._queued = self._queue(config, path) if is_queued(config) else None

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Responses, or None where they come later: a model whose parameters bound a queue keeps that queue here."""
        if self._queued is None:
            return self._answer(requests)
        self._queued.submit(requests)
        return None

    def finalize(self) -> None:
        if self._queued is not None:
            self._queued.close()

    def _queue(self, config: dict[str, Any], path: Path) -> QueuedModel:
        """With one worker; or with several that each run a batch on their part of the threads, as the parameter says.

        Threads that share a batch wait for the slowest of them at every layer, the more so the more else the cores have
        to do (docs/performance.md has what that costs). A batch that comes alone is still run by all threads, which
        takes a session of its own, and the weights twice.
        """
        options, _ = _read_options(config)
        threads = options.intra_op_num_threads or len(os.sched_getaffinity(0))
        at_once = min(_batches_at_once(config), threads)
        if at_once == 1:
            return QueuedModel(config, self._answer, 1, config["max_batch_size"])
        options.intra_op_num_threads = threads // at_once
        answer_beside = partial(self._answer, session=_open(path, options))
        return QueuedModel(config, self._answer, at_once, config["max_batch_size"], answer_beside)

    def _answer(self, requests: list[Any], session: ort.InferenceSession | None = None) -> list[Any]:
        """One response per request, in order; requests of equal item shape run as one batch."""
        responses: list[Any] = [None] * len(requests)
        batches: dict[Any, list[tuple[int, Feed]]] = defaultdict(list)
        for index, request in enumerate(requests):
            try:
                feed = self._read_inputs(request)
            except UnicodeDecodeError as error:
                responses[index] = refusal(f"a text is not UTF-8: {error}", pb_utils.TritonError.INVALID_ARG)
                continue
            shapes = self._batch_key(feed) if self._is_batching else index
            batches[shapes, tuple(sorted(request.requested_output_names()))].append((index, feed))
        for (_, output_names), batch in batches.items():
            answers = self._run(session or self._session, [feed for _, feed in batch], list(output_names))
            for (index, _), answer in zip(batch, answers, strict=True):
                responses[index] = answer
        return responses

    def _read_inputs(self, request: Any) -> Feed:
        feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._input_names}
        for name in self._string_inputs:  # Triton holds bytes, ONNX Runtime wants str
            texts = [text.decode() for text in feed[name].ravel()]
            feed[name] = np.array(texts, dtype=np.object_).reshape(feed[name].shape)
        return feed

    def _batch_key(self, feed: Feed) -> Any:
        """Requests of equal key may run as one batch: ragged inputs of any length may."""
        return tuple(array.shape[1:] for name, array in feed.items() if name not in self._ragged)

    def _join(self, feeds: list[Feed]) -> Feed:
        """One batch: inputs stacked, ragged ones end to end, and what `batch_input` derives from their sizes."""
        first = feeds[0]
        feed = {
            name: np.concatenate([each[name].ravel() if name in self._ragged else each[name] for each in feeds])
            for name in first
            if len(feeds) > 1 or name in self._ragged
        }
        for name, derive in self._batch_inputs.items():
            sizes = [each[source].size for each in feeds for source in self._ragged]
            feed[name] = derive(sizes)
        return first | feed

    def _run(self, session: ort.InferenceSession, feeds: list[Feed], output_names: list[str]) -> list[Any]:
        """Responses to one batch; when it fails each request runs again alone, so that only the bad one fails."""
        feed = self._join(feeds)
        lengths = [len(next(iter(each.values()))) for each in feeds] if self._is_batching else []
        try:
            outputs = session.run(output_names, feed, self._run_options)
            if self._is_batching and any(len(output) != sum(lengths) for output in outputs):
                raise ValueError(f"the outputs have {[len(o) for o in outputs]} rows for a batch of {sum(lengths)}")
        except Exception as error:
            if len(feeds) > 1:
                return [response for each in feeds for response in self._run(session, [each], output_names)]
            is_invalid = isinstance(error, InvalidArgument)
            code = pb_utils.TritonError.INVALID_ARG if is_invalid else pb_utils.TritonError.INTERNAL
            if not is_invalid:
                pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
            return [refusal(_PATH.sub("…", str(error)), code)]
        if len(feeds) == 1:
            return [_named(output_names, outputs)]
        ends = np.cumsum(lengths)[:-1]
        rows = zip(*(np.split(output, ends) for output in outputs), strict=True)  # views, no copies
        return [_named(output_names, arrays) for arrays in rows]


def _open(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise pb_utils.TritonModelException(f"{path} is not a model that ONNX Runtime runs: {error}") from error


def _batches_at_once(config: dict[str, Any]) -> int:
    text = config["parameters"].get(_AT_ONCE, {}).get("string_value", "1").strip()
    if not text.isdecimal() or int(text) == 0:
        raise pb_utils.TritonModelException(f"{_AT_ONCE} is {text!r}, expected a number, 1 or more")
    return int(text)


def _supported_kind(batch_input: dict[str, Any]) -> str:
    kind, sources, data_type = batch_input["kind"], batch_input["source_input"], batch_input["data_type"]
    if kind not in _BATCH_INPUTS or len(sources) != 1 or data_type != "TYPE_INT32":
        raise pb_utils.TritonModelException(
            f"batch_input {kind} of {sources} as {data_type}: expected one source, TYPE_INT32, and a kind of "
            f"{', '.join(_BATCH_INPUTS)}"
        )
    return str(kind)


def _named(names: list[str], arrays: Iterable[Any]) -> Any:
    return response_of(dict(zip(names, arrays, strict=True)))


def _read_options(config: dict[str, Any]) -> tuple[ort.SessionOptions, ort.RunOptions]:
    """The session's and each run's options from `optimization` and `parameters`."""
    options, run_options = ort.SessionOptions(), ort.RunOptions()
    # As many as by default, but said: by default they are also bound to cores, those of every model to the same ones.
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    # Threads that wait for each other within a run spin; between two runs that would take a core from those who work.
    options.add_session_config_entry(_STOP_SPINNING, "1")
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    options.graph_optimization_level = _choose("optimization.graph.level", level, _GRAPH_LEVELS)
    # source: triton onnxruntime_backend README, "Model Config Options"
    setters: dict[str, Callable[[str, str], None]] = {
        "intra_op_thread_count": lambda key, text: setattr(options, "intra_op_num_threads", _count(key, text)),
        "inter_op_thread_count": lambda key, text: setattr(options, "inter_op_num_threads", _count(key, text)),
        "execution_mode": lambda key, text: setattr(options, "execution_mode", _choose(key, text, _MODES)),
        "enable_mem_arena": lambda key, text: setattr(options, "enable_cpu_mem_arena", _choose(key, text, _BOOLS)),
        "enable_mem_pattern": lambda key, text: setattr(options, "enable_mem_pattern", _choose(key, text, _BOOLS)),
        "session.use_device_allocator_for_initializers": options.add_session_config_entry,
        _SPINNING: options.add_session_config_entry,
        _STOP_SPINNING: options.add_session_config_entry,
        "memory.enable_memory_arena_shrinkage": run_options.add_run_config_entry,
    }
    for key, value in config.get("parameters", {}).items():
        if is_queued(config) and key.startswith(_QUEUE_PARAMETERS):
            continue
        if key in setters:
            setters[key](key, value["string_value"].strip().lower())
        else:
            pb_utils.Logger.log_warn(f"{config['name']}: parameter {key} has no effect in this onnxruntime backend")
    return options, run_options


def _count(key: str, text: str) -> int:
    if not text.isdecimal():
        raise pb_utils.TritonModelException(f"parameter {key} is {text!r}, expected a number, 0 or more")
    return int(text)


def _choose(key: str, value: Any, choices: dict[Any, Any]) -> Any:
    if value not in choices:
        raise pb_utils.TritonModelException(f"{key} is {value!r}, expected one of {', '.join(map(str, choices))}")
    return choices[value]


def _check_tensors(path: Path, kind: str, config: dict[str, Any], tensors: list[Any], is_batching: bool) -> None:
    """Refuse a configuration that promises other tensors than the graph has; a served output may be left out."""
    graph = {tensor.name: tensor for tensor in tensors}
    names = {tensor["name"] for tensor in config[kind]}
    if not names or names - graph.keys() or (kind == "input" and graph.keys() - names):
        raise pb_utils.TritonModelException(f"config.pbtxt has {kind}s {sorted(names)}, {path} has {sorted(graph)}")
    for tensor in config[kind]:
        name, found = tensor["name"], graph[tensor["name"]]
        if _TRITON_TYPES.get(found.type) != tensor["data_type"]:
            told = f"{tensor['data_type']} in config.pbtxt but {found.type} in {path}"
            raise pb_utils.TritonModelException(f"{kind} {name} is {told}")
        dims = [int(dim) for dim in tensor.get("reshape", {}).get("shape", tensor["dims"])]
        # A ragged input has no batch dimension: its requests are laid end to end.
        told_shape = [-1, *dims] if is_batching and not tensor.get("allow_ragged_batch") else dims
        # A named or unknown dimension of the graph takes any size; a fixed one takes its own alone.
        shape = [dim if isinstance(dim, int) else -1 for dim in found.shape]
        if len(shape) != len(told_shape) or any(d not in (-1, t) for d, t in zip(shape, told_shape, strict=True)):
            told = f"{told_shape} in config.pbtxt{' with its batch' if is_batching else ''} but {shape} in {path}"
            raise pb_utils.TritonModelException(f"{kind} {name} is {told}")
