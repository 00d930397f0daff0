"""A float32 tower as a strongly typed float16 or bfloat16 graph: each tensor has the type it is computed in.

What is on the list of HALF_OPS runs in the low precision, everything else in float32 between casts: LayerNorm,
softmax, the attention mask, means, the final normalisation. Inputs and outputs keep their names and types.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Literal, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from builders.onnx_export import save_proto
from builders.towers import ExportFailed

HalfType = Literal["fp16", "bf16"]
DTYPES: dict[HalfType, np.dtype] = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
BF16_OPSET = 22  # the first whose Conv and AveragePool take bfloat16; nothing else a tower holds changed since 18
FLOAT32 = np.dtype(np.float32)

# Sums inside of these are accumulated in float32 by the GPU's own kernels.
_ARITHMETIC = {"MatMul", "Gemm", "Conv", "Add", "Mul", "Div", "Erf", "Sigmoid", "Relu", "AveragePool"}
MOVES = {"Gather", "GatherND", "Reshape", "Transpose", "Concat", "Slice", "Squeeze", "Unsqueeze", "Expand", "Identity"}
HALF_OPS = frozenset(_ARITHMETIC | MOVES)


def write_half(onnx_path: Path, out_path: Path, dtype: HalfType) -> None:
    """Write the low-precision form of a tower; weights beside it as `NAME.data` when above 2 GiB.

    Raises:
        ExportFailed: the file is not a float32 tower of ours.
    """
    if dtype not in get_args(HalfType):
        raise ExportFailed(f"precision {dtype}: expected {' or '.join(get_args(HalfType))}")
    graph = load_graph(onnx_path)
    check_types(graph, onnx_path)
    cast_graph(graph, DTYPES[dtype], half_nodes(graph, DTYPES[dtype]))
    if dtype == "bf16":
        graph.opset = BF16_OPSET
        graph.import_domains = None
    save_graph(graph, out_path)


def load_graph(onnx_path: Path) -> gs.Graph:
    gc.collect()  # a graph's nodes and tensors are cycles: without it, gigabytes of the last one's weights stay
    G_LOGGER.severity = G_LOGGER.ERROR  # it warns that numpy has no bfloat16; ml_dtypes has
    return gs.import_onnx(onnx.load(onnx_path))


def save_graph(graph: gs.Graph, path: Path, embed: bool = True) -> None:
    proto = gs.export_onnx(graph.cleanup(remove_unused_graph_inputs=False).toposort())
    proto.producer_name = "tuwen"
    save_proto(proto, path, embed)


def is_float(tensor: gs.Tensor) -> bool:
    return not tensor.is_empty() and tensor.dtype == FLOAT32


def half_nodes(graph: gs.Graph, dtype: np.dtype) -> set[str]:
    """Names of the nodes that may run in `dtype`; every other node of floats stays in float32."""
    normalised = _downstream([node for node in graph.nodes if node.op == "ReduceL2"])
    outputs = {tensor.name for tensor in graph.outputs}
    return {
        node.name
        for node in graph.nodes
        if node.op in HALF_OPS
        and any(is_float(tensor) for tensor in node.outputs)
        and node.name not in normalised
        and not any(tensor.name in outputs for tensor in node.outputs)
        and not _feeds_softmax(node)
        and all(fits(tensor.values, dtype) for tensor in node.inputs if _is_float_constant(tensor))
    }


def cast_graph(graph: gs.Graph, dtype: np.dtype, half: set[str]) -> None:
    """Give the nodes named in `half` the type `dtype`, in place; a cast stands wherever the type changes."""
    casts: dict[tuple[str, np.dtype], gs.Tensor] = {}
    nodes = list(graph.nodes)
    for node in nodes:
        if node.name in half:
            for tensor in node.outputs:
                tensor.dtype = dtype
    for node in nodes:
        wanted = dtype if node.name in half else FLOAT32
        for index, tensor in enumerate(node.inputs):
            if tensor.is_empty() or tensor.dtype not in (FLOAT32, dtype) or tensor.dtype == wanted:
                continue
            if (tensor.name, wanted) not in casts:
                casts[tensor.name, wanted] = _cast(graph, tensor, wanted)
            node.inputs[index] = casts[tensor.name, wanted]


def fits(values: npt.NDArray[np.float32], dtype: np.dtype) -> bool:
    """Whether the type holds them: nothing overflows, and a number that stands alone, as an epsilon does, is not 0."""
    with np.errstate(over="ignore"):
        cast = values.astype(dtype).astype(np.float32)
    vanishes = values.size == 1 and bool((cast == 0).all() and (values != 0).all())
    return bool(np.isfinite(cast).all()) and not vanishes


def _cast(graph: gs.Graph, tensor: gs.Tensor, dtype: np.dtype) -> gs.Tensor:
    name = f"{tensor.name}_{dtype.name}"
    if isinstance(tensor, gs.Constant):
        with np.errstate(over="ignore"):  # who chose the nodes chose this
            return gs.Constant(name, tensor.values.astype(dtype))
    cast = gs.Variable(name, dtype, tensor.shape)
    maker = tensor.inputs[0].name if tensor.inputs else tensor.name  # an overflow in the cast is that of its layer
    to = int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
    graph.nodes.append(gs.Node("Cast", f"{maker}/to_{dtype.name}", {"to": to}, [tensor], [cast]))
    return cast


def _is_float_constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and is_float(tensor)


def _feeds_softmax(node: gs.Node) -> bool:
    """The sum of scores and mask: it belongs to the softmax."""
    return node.op == "Add" and any(user.op == "Softmax" for tensor in node.outputs for user in tensor.outputs)


def _downstream(nodes: list[gs.Node]) -> set[str]:
    """Names of these nodes, and of all that use what they compute."""
    found: set[str] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node.name not in found:
            found.add(node.name)
            pending += [user for tensor in node.outputs for user in tensor.outputs]
    return found


def check_types(graph: gs.Graph, onnx_path: Path) -> None:
    """Casting by type needs one for each tensor, and a name for each node."""
    names = [node.name for node in graph.nodes]
    if len(set(names)) != len(names) or "" in names:
        raise ExportFailed(f"{onnx_path.name}: two nodes share a name, or one has none; export the tower again")
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.dtype is None:
                raise ExportFailed(f"{onnx_path.name}: tensor {tensor.name} has no type; export the tower again")
            if tensor.dtype in DTYPES.values():
                raise ExportFailed(f"{onnx_path.name}: tensor {tensor.name} is {tensor.dtype} already, not float32")
