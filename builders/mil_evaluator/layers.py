"""Operations that add up products: matrices, convolutions, norms, attention. In float32 whatever the program says;
what goes in is already rounded, and what comes out will be. Source of all: coremltools' MIL operation reference."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from builders.mil_evaluator.operands import Operands, evaluates
from builders.mil_evaluator.types import Array


@evaluates("linear")
def linear(given: Operands) -> Array:
    product = given.array("x") @ given.array("weight").T
    if given.has("bias"):
        product += given.array("bias")
    return product


@evaluates("matmul")
def matmul(given: Operands) -> Array:
    x, y = given.array("x"), given.array("y")
    x = x.swapaxes(-1, -2) if given.integer("transpose_x", 0) else x
    y = y.swapaxes(-1, -2) if given.integer("transpose_y", 0) else y
    result: Array = x @ y
    return result


@evaluates("conv")
def conv(given: Operands) -> Array:
    given.require(given.integer("groups", 1) == 1, "with groups")
    given.require(set(given.integers("dilations", (1, 1))) == {1}, "with dilations")
    x, weight = given.array("x"), given.array("weight")
    given.require(x.ndim == 4, f"over {x.ndim - 2} dimensions")
    out_channels, in_channels, height, width = weight.shape
    top, bottom, left, right = _padding(given)
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    # (B, C, H', W', height, width): a view; the columns of all patches are what is copied.
    windows = _windows(x, (height, width), given.integers("strides", (1, 1)))
    batch, _, rows, columns = windows.shape[:4]
    patches = windows.transpose(0, 1, 4, 5, 2, 3).reshape(batch, in_channels * height * width, rows * columns)
    result: Array = weight.reshape(out_channels, -1) @ patches
    if given.has("bias"):
        result += given.array("bias")[:, None]
    return result.reshape(batch, out_channels, rows, columns)


@evaluates("avg_pool")
def avg_pool(given: Operands) -> Array:
    given.require(not any(_padding(given)), "with padding")
    given.require(not given.integer("ceil_mode", 0), "with ceil_mode")
    kernel = given.integers("kernel_sizes")
    windows = _windows(given.array("x"), kernel, given.integers("strides", (1, 1)))
    result: Array = windows.mean((-2, -1), dtype=np.float32)
    return result


def _windows(x: Array, kernel: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """(B, C, H', W', *kernel): a view of what the kernel covers at each step."""
    every: Array = sliding_window_view(x, kernel, axis=(2, 3))  # type: ignore[call-overload]  # numpy 1.26 types one axis
    return every[:, :, :: strides[0], :: strides[1]]


def _padding(given: Operands) -> tuple[int, ...]:
    """Top, bottom, left, right."""
    kind = given.text("pad_type", "valid")
    given.require(kind in ("valid", "custom"), f"with padding {kind}")
    return given.integers("pad") if kind == "custom" else (0, 0, 0, 0)


@evaluates("layer_norm")
def layer_norm(given: Operands) -> Array:
    x, axes = given.array("x"), given.integers("axes")
    centred = x - x.mean(axes, keepdims=True)
    variance = np.square(centred).mean(axes, keepdims=True)
    result: Array = centred / np.sqrt(variance + given.number("epsilon"))
    if given.has("gamma"):
        result *= given.array("gamma")
    if given.has("beta"):
        result += given.array("beta")
    return result


@evaluates("softmax")
def softmax(given: Operands) -> Array:
    return _softmax(given.array("x"), given.integer("axis", -1))


@evaluates("reduce_mean")
def reduce_mean(given: Operands) -> Array:
    return np.asarray(given.array("x").mean(given.integers("axes"), keepdims=bool(given.integer("keep_dims", 0))))


@evaluates("reduce_l2_norm")
def reduce_l2_norm(given: Operands) -> Array:
    squares = np.square(given.array("x")).sum(given.integers("axes"), keepdims=bool(given.integer("keep_dims", 0)))
    return np.sqrt(squares)


@evaluates("scaled_dot_product_attention")
def scaled_dot_product_attention(given: Operands) -> Array:
    query, key, value = given.array("query"), given.array("key"), given.array("value")
    scores = query @ key.swapaxes(-1, -2) * np.float32(query.shape[-1] ** -0.5)
    if given.has("attn_mask"):
        mask = given.array("attn_mask")
        scores = np.where(mask, scores, np.float32(-np.inf)) if mask.dtype == np.bool_ else scores + mask
    result: Array = _softmax(scores, -1) @ value
    return result


def _softmax(x: Array, axis: int) -> Array:
    powers = np.exp(x - x.max(axis, keepdims=True))
    result: Array = powers / powers.sum(axis, keepdims=True)
    return result
