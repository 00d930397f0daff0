"""Weights that are stored small: a palette and indices into it, or integers with a scale.

iOS 16 has an operation for each, one palette or scale an axis; iOS 18's work by blocks of any shape.
Source of all: coremltools' MIL operation reference.
"""

from __future__ import annotations

import numpy as np

from builders.mil_evaluator.operands import Operands, evaluates
from builders.mil_evaluator.types import Array
from builders.mil_evaluator.weights import unpack_bits


@evaluates("constexpr_lut_to_dense")
def lut_to_dense(given: Operands) -> Array:
    indices, palette = given.array("indices"), given.array("lut")
    if given.has("shape"):  # iOS 16 and 17: one palette, the indices end to end in bytes
        shape = given.integers("shape")
        bits = len(palette).bit_length() - 1
        return np.asarray(palette[unpack_bits(indices, bits, int(np.prod(shape)))].reshape(shape))
    *groups, size, vector = palette.shape
    given.require(vector == 1, f"with vectors of {vector}")
    if len(groups) != indices.ndim:
        given.require(False, f"with a palette of rank {palette.ndim} for {indices.ndim} dimensions")
    group_of = np.zeros((1,) * indices.ndim, np.int64)
    for axis, number in enumerate(groups):
        place = np.arange(indices.shape[axis]) // (indices.shape[axis] // number)
        group_of = group_of * number + np.expand_dims(place, [other for other in range(indices.ndim) if other != axis])
    return np.asarray(palette.reshape(-1)[group_of * size + indices])


@evaluates("constexpr_affine_dequantize")
def affine_dequantize(given: Operands) -> Array:
    quantized, axis = given.array("quantized_data"), given.integer("axis")

    def along_axis(values: Array) -> Array:
        return (
            values if values.ndim == 0 else values.reshape([-1 if one == axis else 1 for one in range(quantized.ndim)])
        )

    scale, zero_point = along_axis(given.array("scale")), along_axis(given.array("zero_point"))
    return scale * (quantized.astype(np.float32) - zero_point.astype(np.float32))


@evaluates("constexpr_blockwise_shift_scale")
def blockwise_shift_scale(given: Operands) -> Array:
    data = given.array("data").astype(np.float32)
    if given.has("offset"):
        data -= _spread(given.array("offset").astype(np.float32), data.shape)
    return data * _spread(given.array("scale"), data.shape)


def _spread(blocks: Array, shape: tuple[int, ...]) -> Array:
    """One number a block -> one a place, or 1 where NumPy broadcasts."""
    for axis, size in enumerate(shape):
        if blocks.shape[axis] != 1:
            blocks = blocks.repeat(size // blocks.shape[axis], axis)
    return blocks
