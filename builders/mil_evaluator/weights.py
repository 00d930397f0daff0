"""weight.bin: blobs, each behind 64 bytes that say its type, its size and where it lies.

Source: coremltools, mlmodel/src/MILBlob/Blob/StorageFormat.hpp, version 2.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from builders.mil_evaluator.errors import UnusablePackage
from builders.mil_evaluator.types import PACKED_BITS, Array, as_computed, stored_dtype
from builders.mil_evaluator.wire import little_endian

_VERSION = 2
_SENTINEL = 0xDEADBEEF
_METADATA_BYTES = 64
# Numbers of BlobDataType.
_BLOB_TYPES = {
    1: "fp16", 2: "fp32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1", 10: "uint2",
    11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip


class WeightFile:
    """The blobs of a package, read where they lie."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UnusablePackage: missing, empty or of another version.
        """
        self._name = f"{path.parent.name}/{path.name}"
        try:
            with open(path, "rb") as file:
                self._data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise UnusablePackage(f"{self._name} cannot be read: {error}") from None
        _, version = little_endian(self._slice(0, 8), "II")
        if version != _VERSION:
            raise UnusablePackage(f"{self._name}: version {version}, expected {_VERSION}")

    def read(self, offset: int, dtype: str, shape: tuple[int, ...]) -> Array:
        """The blob whose metadata is at `offset`; half precision as float32, packed integers as uint8.

        Raises:
            UnusablePackage: there is none, or it is of another type or size than the program says.
        """
        sentinel, kind, size_bytes, start = little_endian(self._slice(offset, 24), "IIQQ")
        if sentinel != _SENTINEL:
            raise UnusablePackage(f"{self._name}: no blob at {offset}, the file is damaged")
        if _BLOB_TYPES.get(kind) != dtype:
            raise UnusablePackage(f"{self._name}: the blob at {offset} is {_BLOB_TYPES.get(kind)}, expected {dtype}")
        count = int(np.prod(shape, dtype=np.int64))
        bits = PACKED_BITS.get(dtype) or 8 * stored_dtype(dtype).itemsize
        if size_bytes != -(-count * bits // 8):
            raise UnusablePackage(f"{self._name}: the blob at {offset} has {size_bytes} bytes, expected {list(shape)}")
        data = self._slice(start, size_bytes)
        if dtype in PACKED_BITS:
            return unpack_bits(np.frombuffer(data, np.uint8), bits, count).reshape(shape)
        return as_computed(np.frombuffer(data, stored_dtype(dtype)).reshape(shape))

    def _slice(self, start: int, size: int) -> memoryview:
        if start + size > len(self._data):
            raise UnusablePackage(f"{self._name} ends at {len(self._data)} bytes, expected {start + size} or more")
        return self._data[start : start + size]


def unpack_bits(packed: Array, bits: int, count: int) -> Array:
    """uint8 (count,) of integers of `bits` each, laid end to end from the lowest bit of the first byte."""
    if bits == 8:
        return packed[:count]
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return ((packed[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)[:count]
    single = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    return np.packbits(single, axis=1, bitorder="little").reshape(count)
