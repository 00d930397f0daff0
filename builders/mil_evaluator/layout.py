"""Operations that move numbers and change none. Source of all: coremltools' MIL operation reference."""

from __future__ import annotations

import numpy as np

from builders.mil_evaluator.operands import Operands, evaluates
from builders.mil_evaluator.types import Array


@evaluates("reshape")
def reshape(given: Operands) -> Array:
    x, shape = given.array("x"), given.integers("shape")
    # 0 keeps the length at its place.
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)])


@evaluates("transpose")
def transpose(given: Operands) -> Array:
    return given.array("x").transpose(given.integers("perm"))


@evaluates("expand_dims")
def expand_dims(given: Operands) -> Array:
    return np.expand_dims(given.array("x"), given.integers("axes"))


@evaluates("squeeze")
def squeeze(given: Operands) -> Array:
    x = given.array("x")
    axes = given.integers("axes") if given.has("axes") else None
    return np.squeeze(x, axes)


@evaluates("concat")
def concat(given: Operands) -> Array:
    given.require(not given.integer("interleave", 0), "with interleave")
    return np.concatenate([np.atleast_1d(value) for value in given.arrays("values")], given.integer("axis"))


@evaluates("split")
def split(given: Operands) -> tuple[Array, ...]:
    x, axis = given.array("x"), given.integer("axis")
    if given.has("split_sizes"):
        return tuple(np.split(x, np.cumsum(given.integers("split_sizes"))[:-1], axis))
    return tuple(np.split(x, given.integer("num_splits"), axis))


@evaluates("slice_by_index")
def slice_by_index(given: Operands) -> Array:
    x = given.array("x")
    nothing = (0,) * x.ndim
    begin, end, stride = given.integers("begin"), given.integers("end"), given.integers("stride", (1,) * x.ndim)
    begin_open, end_open = given.integers("begin_mask", nothing), given.integers("end_mask", nothing)
    squeezed = given.integers("squeeze_mask", nothing)
    where = tuple(
        begin[axis]
        if squeezed[axis]
        else slice(None if begin_open[axis] else begin[axis], None if end_open[axis] else end[axis], stride[axis])
        for axis in range(x.ndim)
    )
    return np.asarray(x[where])


@evaluates("tile")
def tile(given: Operands) -> Array:
    return np.tile(given.array("x"), given.integers("reps"))


@evaluates("shape")
def shape(given: Operands) -> Array:
    return np.array(given.array("x").shape, np.int32)


@evaluates("gather")
def gather(given: Operands) -> Array:
    given.require(given.integer("batch_dims", 0) == 0, "with batch_dims")
    x, indices, axis = given.array("x"), given.array("indices").astype(np.int64), given.integer("axis", 0)
    length = x.shape[axis]
    given.require(bool(((indices >= -length) & (indices < length)).all()), f"with an index outside 0..{length - 1}")
    return np.asarray(x.take(indices, axis))


@evaluates("range_1d")
def range_1d(given: Operands) -> Array:
    return np.arange(given.array("start"), given.array("end"), given.array("step"))
