"""Operations that work number by number. Source of all: coremltools' MIL operation reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from builders.mil_evaluator.operands import Operands, evaluates
from builders.mil_evaluator.types import Array

_BINARY: dict[str, Callable[[Array, Array], Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "maximum": np.maximum, "minimum": np.minimum,
    "equal": np.equal, "not_equal": np.not_equal, "greater_equal": np.greater_equal,
}  # fmt: skip

# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: within 1.5e-7.
_ERF_P = 0.3275911
_ERF_COEFFICIENTS = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


@evaluates(*_BINARY)
def binary(given: Operands) -> Array:
    result: Array = _BINARY[given.kind](given.array("x"), given.array("y"))
    return result


@evaluates("real_div")
def real_div(given: Operands) -> Array:
    x, y = given.array("x"), given.array("y")
    given.require(np.issubdtype(x.dtype, np.floating), "of integers")
    with np.errstate(divide="ignore", invalid="ignore"):  # the gate sees what is not finite
        return x / y


@evaluates("select")
def select(given: Operands) -> Array:
    return np.where(given.array("cond"), given.array("a"), given.array("b"))


@evaluates("cast")
def cast(given: Operands) -> Array:
    x = given.array("x")
    # To an integer is towards zero, and the program's output type does the rest.
    return np.trunc(x) if "int" in given.output.dtype and np.issubdtype(x.dtype, np.floating) else x


@evaluates("relu")
def relu(given: Operands) -> Array:
    x = given.array("x")
    return np.maximum(x, x.dtype.type(0))


@evaluates("sigmoid")
def sigmoid(given: Operands) -> Array:
    with np.errstate(over="ignore"):  # exp of a large number is infinity, and its inverse 0
        result: Array = 1 / (1 + np.exp(-given.array("x")))
    return result


@evaluates("gelu")
def gelu(given: Operands) -> Array:
    mode = given.text("mode", "EXACT")
    given.require(mode == "EXACT", f"in mode {mode}")
    x = given.array("x")
    result: Array = x * (0.5 + 0.5 * erf(x * np.float32(0.5**0.5)))
    return result


def erf(x: Array) -> Array:
    """The error function in float32; NumPy has none."""
    magnitude = np.abs(x)
    t = 1 / (1 + np.float32(_ERF_P) * magnitude)
    sum = np.zeros_like(t)
    for coefficient in reversed(_ERF_COEFFICIENTS):
        sum = (sum + np.float32(coefficient)) * t
    return np.copysign(1 - sum * np.exp(-magnitude * magnitude), x)
