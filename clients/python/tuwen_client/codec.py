"""Tensors <-> the messages of Triton's inference protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

Array = npt.NDArray[Any]

_LENGTH_BYTES = 4  # before each element of a BYTES tensor, little-endian
_DTYPES = {"FP32": np.float32, "INT64": np.int64, "BOOL": np.bool_}


@dataclass(frozen=True)
class Tensor:
    """An input: `data` as it travels, row by row."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Span:
    """Where a tensor's data lies in a shared memory region that the server knows by name."""

    region: str
    offset: int
    size_bytes: int


def bytes_tensor(name: str, values: Sequence[bytes], shape: tuple[int, ...] | None = None) -> Tensor:
    """A BYTES tensor, of one dimension unless a shape is given."""
    data = b"".join(len(value).to_bytes(_LENGTH_BYTES, "little") + value for value in values)
    return Tensor(name, "BYTES", shape or (len(values),), data)


def infer_request(
    model: str,
    tensors: Sequence[Tensor],
    outputs: Sequence[str],
    priority_level: int,
    timeout_s: float,
    span: Span | None = None,
) -> Any:
    """A ModelInferRequest.

    Args:
        outputs: names of those that are wanted; none named: all there are.
        timeout_s: for how long the answer is of use: the server drops it from a queue after that.
        span: where the first tensor's data lies, if not in the message.
    """
    request = service_pb2.ModelInferRequest(
        model_name=model,
        inputs=[{"name": one.name, "datatype": one.datatype, "shape": one.shape} for one in tensors],
        outputs=[{"name": name} for name in outputs],
        raw_input_contents=[one.data for one in (tensors[1:] if span else tensors)],
    )
    request.parameters["queue_priority"].int64_param = priority_level
    request.parameters["timeout"].int64_param = max(1, round(timeout_s * 1e6))
    if span:
        parameters = request.inputs[0].parameters
        parameters["shared_memory_region"].string_param = span.region
        parameters["shared_memory_offset"].int64_param = span.offset
        parameters["shared_memory_byte_size"].int64_param = span.size_bytes
    return request


def read_outputs(response: Any) -> Mapping[str, Array]:
    """Arrays of a ModelInferResponse, by name; they may be read-only views of it.

    Raises:
        ValueError: data and shapes contradict each other.
    """
    return {
        output.name: _read(output.datatype, tuple(output.shape), data)
        for output, data in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def _read(datatype: str, shape: tuple[int, ...], data: bytes) -> Array:
    if datatype == "BYTES":
        return _read_bytes(data).reshape(shape)
    if datatype not in _DTYPES:
        raise ValueError(f"data type {datatype}, expected one of {', '.join(_DTYPES)}, BYTES")
    return np.frombuffer(data, _DTYPES[datatype]).reshape(shape)


def _read_bytes(data: bytes) -> Array:
    values, at = [], 0
    while at < len(data):
        begin = at + _LENGTH_BYTES
        at = begin + int.from_bytes(data[at:begin], "little")
        values.append(data[begin:at])
    array = np.empty(len(values), np.object_)
    array[:] = values
    return array
