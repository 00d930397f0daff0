"""What a low-precision tower computes, measured on the CPU: parity with PyTorch, magnitudes, and where it overflows.

ONNX Runtime has hardly any float16 kernels for the CPU and none for bfloat16: it would run whole chains of operators in
float32. So a twin of the graph is run instead, in float32, that rounds each weight and each operator's output. It is
what a GPU does that multiplies in the low precision and adds up in float32.
"""

from __future__ import annotations

import gc
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from builders.feeds import Feed
from builders.parity import NUM_REAL, Parity, measure_parity, open_session
from builders.reduced_precision import DTYPES, FLOAT32, MOVES, load_graph, save_graph
from builders.towers import TowerKind
from tuwen.model import ChineseCLIP

MIN_HALF_COSINE = 0.9995


@dataclass(frozen=True)
class Activation:
    """What one node computed: the largest magnitude, nan if it holds a NaN; and whether in a low precision."""

    node: str
    op: str
    largest: float
    is_half: bool


def measure_half_parity(
    model: ChineseCLIP, kind: TowerKind, half_path: Path, fingerprint: int, num_real: int = NUM_REAL
) -> Parity:
    """Low precision against PyTorch's float32; the bound is MIN_HALF_COSINE.

    Raises:
        ExportFailed: the file does not load, or does not carry `fingerprint`.
    """
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder, half_path.name)
        write_twin(half_path, twin)
        gc.collect()  # as in load_graph
        return measure_parity(model, kind, twin, fingerprint, num_real, optimise=False)


def write_twin(half_path: Path, out_path: Path) -> None:
    """Write the float32 twin of a low-precision graph, weights beside it; of a float32 graph, the graph itself."""
    graph = load_graph(half_path)
    _to_twin(graph)
    save_graph(graph, out_path, embed=False)


def first_overflow(onnx_path: Path, feed: Feed) -> str | None:
    """The first node, in the order of computation, that makes an infinity or NaN of this input; None if none does.

    Args:
        onnx_path: a tower of any precision that `write_half` writes, or float32.
    """
    for activation in measure_activations(onnx_path, feed):
        if not math.isfinite(activation.largest):
            return f"{activation.node} ({activation.op})"
    return None


def measure_activations(onnx_path: Path, feed: Feed) -> list[Activation]:
    """The largest magnitude that each node of floats computes of this input, in the order of computation."""
    with tempfile.TemporaryDirectory() as folder:
        tapped_path = Path(folder, onnx_path.name)
        nodes = _write_tapped(onnx_path, tapped_path)
        gc.collect()  # as in load_graph: the session holds the weights once more
        results = open_session(tapped_path, optimise=False).run(None, dict(feed))
    found = zip(nodes, results[::2], results[1::2], strict=True)
    # The largest passes over NaN, the sum does not.
    return [replace(node, largest=math.nan if math.isnan(total) else float(best)) for node, best, total in found]


def _write_tapped(onnx_path: Path, out_path: Path) -> list[Activation]:
    """Write a twin that tells two numbers of each node of floats; the nodes in that order, not measured yet."""
    graph = load_graph(onnx_path).toposort()
    tapped = [(node, node.outputs[0]) for node in graph.nodes if node.op not in MOVES and _is_float(node.outputs[0])]
    nodes = [Activation(node.name, node.op, math.nan, _half_type(tensor) is not None) for node, tensor in tapped]
    _to_twin(graph)
    for _, tensor in tapped:
        _tap(graph, tensor)
    graph.outputs = graph.outputs[-2 * len(tapped) :]
    save_graph(graph, out_path, embed=False)
    return nodes


def _tap(graph: gs.Graph, tensor: gs.Tensor) -> None:
    """Two more outputs: the largest magnitude of a tensor and the sum of its magnitudes."""
    magnitudes = gs.Variable(f"{tensor.name}_magnitudes", FLOAT32)
    graph.nodes.append(gs.Node("Abs", f"abs_{tensor.name}", {}, [tensor], [magnitudes]))
    for op in ("ReduceMax", "ReduceSum"):
        output = gs.Variable(f"{tensor.name}_{op}", FLOAT32, [])
        graph.nodes.append(gs.Node(op, f"{op}_{tensor.name}", {"keepdims": 0}, [magnitudes], [output]))
        graph.outputs.append(output)


def _to_twin(graph: gs.Graph) -> None:
    """Make float32 of a low-precision graph in place, its roundings as casts there and back."""
    constants: dict[str, gs.Constant] = {}  # one may serve several nodes
    for node in list(graph.nodes):
        for index, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant) and _half_type(tensor):
                if tensor.name not in constants:
                    constants[tensor.name] = gs.Constant(tensor.name, tensor.values.astype(np.float32))
                node.inputs[index] = constants[tensor.name]
        for tensor in node.outputs:
            half = _half_type(tensor)
            if half is None:
                continue
            tensor.dtype = FLOAT32
            # What only moves numbers rounds nothing.
            if node.op not in MOVES:
                _round_output(graph, node, tensor, half)


def _round_output(graph: gs.Graph, node: gs.Node, tensor: gs.Tensor, half: int) -> None:
    exact, rounded = gs.Variable(f"{tensor.name}_exact", FLOAT32), gs.Variable(f"{tensor.name}_rounded", half)
    node.outputs = [exact]
    if node.op == "Cast":
        node.attrs["to"] = onnx.TensorProto.FLOAT
    graph.nodes.append(gs.Node("Cast", f"round_{tensor.name}", {"to": half}, [exact], [rounded]))
    graph.nodes.append(gs.Node("Cast", f"widen_{tensor.name}", {"to": onnx.TensorProto.FLOAT}, [rounded], [tensor]))


def _half_type(tensor: gs.Tensor) -> int | None:
    """ONNX's number of its low-precision type; None for any other. numpy knows no bfloat16, so that is a number."""
    if tensor.is_empty() or tensor.dtype is None:
        return None
    if tensor.dtype == onnx.TensorProto.BFLOAT16 or tensor.dtype == DTYPES["bf16"]:
        return int(onnx.TensorProto.BFLOAT16)
    return int(onnx.TensorProto.FLOAT16) if tensor.dtype == DTYPES["fp16"] else None


def _is_float(tensor: gs.Tensor) -> bool:
    return tensor.dtype == FLOAT32 or _half_type(tensor) is not None
