"""The types a MIL program gives its values, and what each is in NumPy.

Source: coremltools, mlmodel/format/MIL.proto, and for the blob file mlmodel/src/MILBlob.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from builders.mil_evaluator.errors import UnusablePackage

Array = npt.NDArray[Any]

# Numbers of MILSpec.DataType.
DATA_TYPES = {
    1: "bool", 2: "string", 10: "fp16", 11: "fp32", 12: "fp64", 21: "int8", 22: "int16", 23: "int32", 24: "int64",
    25: "int4", 31: "uint8", 32: "uint16", 33: "uint32", 34: "uint64", 35: "uint4", 36: "uint2", 37: "uint1",
    38: "uint6", 39: "uint3",
}  # fmt: skip

# Unsigned integers of less than a byte: several lie in one, the first in the low bits.
PACKED_BITS = {"uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}

_STORED = {
    "bool": np.bool_, "fp16": np.float16, "fp32": np.float32, "fp64": np.float64, "int8": np.int8, "int16": np.int16,
    "int32": np.int32, "int64": np.int64, "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32,
    "uint64": np.uint64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorType:
    """A type and a shape; None is a length that differs from call to call. A scalar has no lengths."""

    dtype: str
    dims: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {['?' if size is None else size for size in self.dims]}".replace("'", "")

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.dims) and all(
            expected in (None, size) for expected, size in zip(self.dims, shape, strict=True)
        )


def stored_dtype(dtype: str) -> np.dtype[Any]:
    """How values of that type lie in a file.

    Raises:
        UnusablePackage: no numbers, or not one to an element.
    """
    if dtype not in _STORED:
        raise UnusablePackage(f"the evaluator does not know values of type {dtype}")
    return np.dtype(_STORED[dtype])


def as_computed(values: Array) -> Array:
    """Half precision is computed with in float32; see `rounded`."""
    return values.astype(np.float32) if values.dtype == np.float16 else values


def rounded(values: Array, dtype: str) -> Array:
    """`values` as the type holds them: half precision is rounded to, and kept as float32."""
    if dtype != "fp16":
        return np.asarray(values).astype(stored_dtype(dtype), copy=False)
    with np.errstate(over="ignore"):  # beyond 65504 lies infinity, as on the device; the gate sees it
        return np.asarray(values, np.float32).astype(np.float16).astype(np.float32)
