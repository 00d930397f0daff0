"""Tiny models, ONNX and Python, written into a model repository for the server's tests."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)  # small whole numbers: float32 sums are exact in any order
TABLE = np.arange(20, dtype=np.float32).reshape(10, 2)
TYPES = {"TYPE_FP32": TensorProto.FLOAT, "TYPE_INT64": TensorProto.INT64, "TYPE_STRING": TensorProto.STRING}
BATCHED = "max_batch_size: 16 dynamic_batching { max_queue_delay_microseconds: 200000 }"

# [size, sum, requests seen at once] of each encoded image.
SIZES_PY = """
import numpy as np
import triton_python_backend_utils as pb_utils
from tuwen.errors import TuwenError  # the checkout or the installed package, wherever the server runs

class TritonPythonModel:
    def execute(self, requests):
        images = [pb_utils.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        rows = [np.array([[image.size, image.sum(), len(requests), 0]], dtype=np.float32) for image in images]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("x", row)]) for row in rows]
"""
SLEEPER_PY = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        time.sleep({at_start})

    def execute(self, requests):
        time.sleep(1.0)
        return [pb_utils.InferenceResponse([pb_utils.get_input_tensor_by_name(requests[0], "x")])]
"""
BROKEN_PY = """
class TritonPythonModel:
    def initialize(self, args):
        raise ValueError("词表: 3 tokens, expected 21128")
"""


def io(kind: str, name: str, data_type: str, dims: str, more: str = "") -> str:
    return f'{kind} [{{ name: "{name}" data_type: {data_type} dims: [{dims}] {more} }}]\n'


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'


def write_model(repository: Path, name: str, config: str, artifact: str | onnx.ModelProto) -> None:
    backend, filename = ("python", "model.py") if isinstance(artifact, str) else ("onnxruntime", "model.onnx")
    version_dir = repository / name / "1"
    version_dir.mkdir(parents=True)
    if isinstance(artifact, str):
        (version_dir / filename).write_text(artifact, encoding="utf-8")
    else:
        onnx.save(artifact, version_dir / filename)
    text = f'name: "{name}"\nbackend: "{backend}"\ninstance_group [{{ kind: KIND_CPU count: 1 }}]\n{config}'
    (repository / name / "config.pbtxt").write_text(text, encoding="utf-8")


def make_onnx(nodes: list, inputs: dict, outputs: dict, initializers: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Inputs and outputs: name -> (Triton type, shape)."""
    tensors = [
        [helper.make_tensor_value_info(name, TYPES[kind], shape) for name, (kind, shape) in group.items()]
        for group in (inputs, outputs)
    ]
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in initializers.items()]
    graph = helper.make_graph(nodes, "tiny", *tensors, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def make_tower(features: int | str = 4) -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    return make_onnx(
        [node], {"x": ("TYPE_FP32", ["batch", features])}, {"y": ("TYPE_FP32", ["batch", 3])}, {"weight": WEIGHT}
    )


def write_pipeline(repository: Path) -> None:
    """`pipeline`: sizes (python, ragged) -> tower (ONNX)."""
    image = io("input", "image", "TYPE_UINT8", "-1", "allow_ragged_batch: true")
    write_model(repository, "sizes", BATCHED + image + io("output", "x", "TYPE_FP32", "4"), SIZES_PY)
    tower_io = io("input", "x", "TYPE_FP32", "4") + io("output", "y", "TYPE_FP32", "3")
    options = parameter("intra_op_thread_count", "1") + parameter("colour", "blue")
    write_model(repository, "tower", BATCHED + tower_io + options, make_tower())
    config = f"""name: "pipeline" platform: "ensemble" max_batch_size: 16
    {image} {io("output", "y", "TYPE_FP32", "3")}
    ensemble_scheduling {{ step [
      {{ model_name: "sizes" model_version: -1
         input_map {{ key: "image" value: "image" }} output_map {{ key: "x" value: "t" }} }},
      {{ model_name: "tower" model_version: -1
         input_map {{ key: "x" value: "t" }} output_map {{ key: "y" value: "y" }} }}
    ] }}"""
    (repository / "pipeline" / "1").mkdir(parents=True)
    (repository / "pipeline" / "config.pbtxt").write_text(config)


def write_others(repository: Path) -> None:
    """`wide` (three threads), `embedding`, `loose` (any width), `ragged`, `mixed` (text and ids, unbatched)."""
    tower_io = io("input", "x", "TYPE_FP32", "4") + io("output", "y", "TYPE_FP32", "3")
    write_model(repository, "wide", BATCHED + tower_io + parameter("intra_op_thread_count", "3"), make_tower())
    write_model(
        repository,
        "embedding",
        BATCHED + io("input", "ids", "TYPE_INT64", "1") + io("output", "rows", "TYPE_FP32", "1, 2"),
        make_onnx(
            [helper.make_node("Gather", ["table", "ids"], ["rows"])],
            {"ids": ("TYPE_INT64", ["batch", 1])},
            {"rows": ("TYPE_FP32", ["batch", 1, 2])},
            {"table": TABLE},
        ),
    )
    loose_io = io("input", "x", "TYPE_FP32", "-1") + io("output", "y", "TYPE_FP32", "3")
    write_model(repository, "loose", BATCHED + loose_io, make_tower("features"))
    write_ragged(repository)
    texts, ids = ("TYPE_STRING", [2]), ("TYPE_INT64", [2])
    write_model(
        repository,
        "mixed",
        "max_batch_size: 0\n"
        + "".join(io("input", name, kind, "2") for name, kind in [("texts", "TYPE_STRING"), ("ids", "TYPE_INT64")])
        + "".join(io("output", name, kind, "2") for name, kind in [("same", "TYPE_STRING"), ("sum", "TYPE_INT64")]),
        make_onnx(
            [helper.make_node("Identity", ["texts"], ["same"]), helper.make_node("Add", ["ids", "ids"], ["sum"])],
            {"texts": texts, "ids": ids},
            {"same": texts, "sum": ids},
            {},
        ),
    )


def write_ragged(repository: Path) -> None:
    """`ragged`: requests of any length laid end to end -> the sum of each, and how long the longest is."""
    kinds = {"offsets": "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO", "longest": "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE"}
    batch_inputs = "".join(
        f'batch_input [{{ kind: {kind} target_name: "{name}" data_type: TYPE_INT32 source_input: "x" }}]\n'
        for name, kind in kinds.items()
    )
    tensors = io("input", "x", "TYPE_FP32", "-1", "allow_ragged_batch: true") + io("output", "y", "TYPE_FP32", "2")
    nodes = [
        helper.make_node("CumSum", ["x", "zero"], ["sums"]),
        helper.make_node("Concat", ["nothing", "sums"], ["sums_before"], axis=0),
        helper.make_node("Gather", ["sums_before", "offsets"], ["at_offsets"]),
        helper.make_node("Slice", ["at_offsets", "one", "end"], ["at_ends"]),
        helper.make_node("Slice", ["at_offsets", "start", "minus_one"], ["at_starts"]),
        helper.make_node("Sub", ["at_ends", "at_starts"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "one"], ["total"]),
        helper.make_node("Shape", ["longest"], ["length"]),
        helper.make_node("Cast", ["length"], ["length_fp32"], to=TensorProto.FLOAT),
        helper.make_node("Shape", ["total"], ["column"]),
        helper.make_node("Expand", ["length_fp32", "column"], ["lengths"]),
        helper.make_node("Concat", ["total", "lengths"], ["y"], axis=1),
    ]
    constants = {"zero": 0, "one": [1], "start": [0], "minus_one": [-1], "end": [2**31]}
    initializers = {name: np.array(value, np.int64) for name, value in constants.items()}
    graph = make_onnx(
        nodes,
        {"x": ("TYPE_FP32", ["total_length"])},
        {"y": ("TYPE_FP32", ["batch", 2])},
        initializers | {"nothing": np.zeros(1, np.float32)},
    )
    for name, size in (("offsets", "batch_plus_one"), ("longest", "length")):
        graph.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT32, [size]))
    write_model(repository, "ragged", BATCHED + tensors + batch_inputs, graph)
