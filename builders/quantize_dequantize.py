"""A float32 tower as a strongly typed int8 or fp8 graph: explicit Q/DQ pairs before matrix products, the rest float16.

Quantised are the products with weights: activations per tensor, by a scale calibrated on real input; int8 weights per
output channel, fp8 weights per tensor; all symmetric. Attention's own two products, the patch embedding or the
ResNet's first convolution, and the final projection stay in float16: they are a few percent of the work, and what they
lose is not made good by any later layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from builders.feeds import Feed, image_feeds, text_feeds
from builders.parity import open_session
from builders.reduced_precision import cast_graph, check_types, half_nodes, load_graph, save_graph
from builders.towers import SAMPLES_DIR, ExportFailed, TowerKind, sample_captions, sample_pictures
from tuwen.specs import ModelSpec

QuantizedType = Literal["int8", "fp8"]

QUANTIZED_OPSET = 19  # the first whose QuantizeLinear takes float16 and fp8
NUM_CALIBRATION_ITEMS = 128
_BATCH_SIZE = 4
_HALF = np.dtype(np.float16)
_LEAST_SCALE = np.float16(2**-24)  # the least that float16 has: a channel of zeros has a scale, too


@dataclass(frozen=True)
class _Format:
    """A quantised type, its largest number, and whether weights have a scale per output channel."""

    dtype: np.dtype
    largest: float
    per_channel: bool


_FORMATS: dict[QuantizedType, _Format] = {
    "int8": _Format(np.dtype(np.int8), 127.0, per_channel=True),
    "fp8": _Format(np.dtype(ml_dtypes.float8_e4m3fn), 448.0, per_channel=False),
}


def write_quantized(
    onnx_path: Path,
    out_path: Path,
    kind: TowerKind,
    spec: ModelSpec,
    dtype: QuantizedType,
    feeds: Iterable[Feed] | None = None,
) -> None:
    """Write the quantised form of a float32 tower; weights beside it as `NAME.data` when above 2 GiB.

    Args:
        feeds: what the scales of activations are calibrated on; by default `calibration_feeds`.
    Raises:
        ExportFailed: the file is not a float32 tower of ours, or there is nothing to calibrate on.
    """
    if dtype not in get_args(QuantizedType):
        raise ExportFailed(f"precision {dtype}: expected {' or '.join(get_args(QuantizedType))}")
    format = _FORMATS[dtype]
    graph = load_graph(onnx_path)
    check_types(graph, onnx_path)
    half = half_nodes(graph, _HALF)
    products = _weighted_products(graph, half)
    ranges = _calibrate(onnx_path, products, feeds or calibration_feeds(spec, kind))
    weights = {node.name: _quantized_weight(node, format) for node in products}
    activations = {node.name: node.inputs[0].name for node in products}
    cast_graph(graph, _HALF, half)
    graph.opset, graph.import_domains = QUANTIZED_OPSET, None
    pairs: dict[str, gs.Tensor] = {}
    for node in products:
        name = activations[node.name]
        if name not in pairs:
            pairs[name] = _quantize_activation(graph, node.inputs[0], ranges[name], format)
        node.inputs[0] = pairs[name]
        node.inputs[1] = _dequantize_weight(graph, node, *weights[node.name])
    save_graph(graph, out_path)


def calibration_feeds(
    spec: ModelSpec, kind: TowerKind, folder: Path = SAMPLES_DIR, split: str = "valid"
) -> Iterator[Feed]:
    """Pictures or captions of a set of pairs, by default of Emoji-CN's sample, spread over all of it."""
    if kind == "image":
        pictures = sample_pictures(NUM_CALIBRATION_ITEMS, folder, split)
        return image_feeds(pictures, spec.vision.resolution, _BATCH_SIZE)
    captions = sample_captions(NUM_CALIBRATION_ITEMS, folder, split)
    return text_feeds(captions, min(spec.context_length, spec.text.max_positions), _BATCH_SIZE)


def _weighted_products(graph: gs.Graph, half: set[str]) -> list[gs.Node]:
    """The products with constant weights, in order, save the first of pictures and the last."""
    products = [
        node
        for node in graph.nodes
        if node.op in ("MatMul", "Gemm", "Conv") and node.name in half and isinstance(node.inputs[1], gs.Constant)
    ]
    return [node for node in products[:-1] if node.inputs[0].name != "pixel_values"]


def _calibrate(onnx_path: Path, products: list[gs.Node], feeds: Iterable[Feed]) -> dict[str, float]:
    """The largest magnitude of each product's activation.

    Clipping the largest 0.1, 0.01 or 0.001 percent instead was tried on the sample in int8; worst cosine of texts and
    pictures 0.991 and 0.995, 0.9986 and 0.994, 0.9987 and 0.995; with the maximum 0.9989 and 0.996.
    """
    names = list(dict.fromkeys(node.inputs[0].name for node in products))
    graph = load_graph(onnx_path)
    tensors = graph.tensors()
    graph.outputs = [tensors[name] for name in names]
    ranges = dict.fromkeys(names, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        save_graph(graph, Path(folder, onnx_path.name), embed=False)
        session = open_session(Path(folder, onnx_path.name))
        wanted = {each.name for each in session.get_inputs()}
        for feed in feeds:
            values = session.run(names, {name: value for name, value in feed.items() if name in wanted})
            for name, value in zip(names, values, strict=True):
                ranges[name] = max(ranges[name], float(np.abs(value).max(initial=0.0)))
    unseen = [name for name, largest in ranges.items() if not 0 < largest < np.inf]
    if unseen:
        raise ExportFailed(f"{onnx_path.name}: calibration saw no finite number in {unseen[0]}; give it real input")
    return ranges


def _quantized_weight(node: gs.Node, format: _Format) -> tuple[gs.Constant, gs.Constant, int]:
    """A product's weights in the quantised type, their scales in float16, and the axis of output channels."""
    weight = node.inputs[1]
    values = weight.values
    axis = values.ndim - 1 if node.op == "MatMul" or (node.op == "Gemm" and not node.attrs.get("transB")) else 0
    others = tuple(other for other in range(values.ndim) if other != axis)
    largest = np.abs(values).max(axis=others if format.per_channel else None, keepdims=True)
    scale = _scale(largest, format)
    quantized = gs.Constant(f"{weight.name}_{format.dtype.name}", _to_format(values / scale.astype(np.float32), format))
    return (
        quantized,
        gs.Constant(f"{weight.name}_scale", scale.ravel() if format.per_channel else scale.reshape(())),
        axis,
    )


def _dequantize_weight(graph: gs.Graph, node: gs.Node, weight: gs.Constant, scale: gs.Constant, axis: int) -> gs.Tensor:
    output = gs.Variable(f"{weight.name}_dequantized", _HALF, weight.shape)
    zero = gs.Constant(f"{weight.name}_zero", np.zeros(scale.shape, weight.values.dtype))
    attributes = {"axis": axis} if scale.shape else {}
    graph.nodes.append(
        gs.Node("DequantizeLinear", f"{node.name}/dequantize_weight", attributes, [weight, scale, zero], [output])
    )
    return output


def _quantize_activation(graph: gs.Graph, tensor: gs.Tensor, largest: float, format: _Format) -> gs.Tensor:
    scale = gs.Constant(f"{tensor.name}_scale", _scale(np.asarray(largest), format))
    zero = gs.Constant(f"{tensor.name}_zero", np.zeros((), format.dtype))
    quantized = gs.Variable(f"{tensor.name}_quantized", format.dtype, tensor.shape)
    output = gs.Variable(f"{tensor.name}_dequantized", _HALF, tensor.shape)
    graph.nodes.append(gs.Node("QuantizeLinear", f"quantize_{tensor.name}", {}, [tensor, scale, zero], [quantized]))
    graph.nodes.append(gs.Node("DequantizeLinear", f"dequantize_{tensor.name}", {}, [quantized, scale, zero], [output]))
    return output


def _scale(largest: npt.NDArray[np.float32], format: _Format) -> npt.NDArray[np.float16]:
    return np.asarray(np.maximum((largest / format.largest).astype(np.float16), _LEAST_SCALE))


def _to_format(values: npt.NDArray[np.float32], format: _Format) -> npt.NDArray[np.generic]:
    clipped = values.clip(-format.largest, format.largest)
    return (np.rint(clipped) if format.dtype == np.int8 else clipped).astype(format.dtype)
