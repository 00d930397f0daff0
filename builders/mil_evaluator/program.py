"""A `.mlmodel` of an ML program -> its inputs, operations and outputs, as plain values.

Field numbers are those of coremltools' Model.proto, FeatureTypes.proto and MIL.proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from builders.mil_evaluator.errors import UnusablePackage
from builders.mil_evaluator.types import DATA_TYPES, Array, TensorType, as_computed, stored_dtype
from builders.mil_evaluator.weights import WeightFile
from builders.mil_evaluator.wire import Message

_ML_PROGRAM = 502
_IMMEDIATE_INTEGERS = (2, 5)  # RepeatedInts, RepeatedLongInts


@dataclass(frozen=True)
class BlobReference:
    """A value that lies in weight.bin."""

    offset: int
    type: TensorType

    def read(self, weights: WeightFile) -> Array:
        return weights.read(self.offset, self.type.dtype, self.type.dims)  # type: ignore[arg-type]  # _constant checks


# What an argument of an operation is: a value, or the name of an earlier output.
@dataclass(frozen=True)
class Name:
    name: str


Constant = Array | str | BlobReference
Argument = Constant | Name


@dataclass(frozen=True)
class Operation:
    """One step.

    Attributes:
        arguments: by parameter; several values only where the parameter is a tuple, such as concat's.
    """

    kind: str
    arguments: Mapping[str, tuple[Argument, ...]]
    outputs: tuple[tuple[str, TensorType], ...]

    @property
    def name(self) -> str:
        return self.outputs[0][0] if self.outputs else self.kind


@dataclass(frozen=True)
class Program:
    """The function `main`: what goes in, what is done, what comes out."""

    inputs: Mapping[str, TensorType]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


def parse_program(model: Message) -> Program:
    """
    Raises:
        UnusablePackage: no ML program of one function `main`, or a part of it is not understood.
    """
    if not model.has(_ML_PROGRAM):
        raise UnusablePackage("the model holds no ML program")
    functions = model.message(_ML_PROGRAM).map(2)
    if "main" not in functions:
        raise UnusablePackage(f"the program has functions {', '.join(functions)}, expected main")
    main = functions["main"]
    blocks, opset = main.map(3), main.text(2)
    if opset not in blocks:
        raise UnusablePackage(f"the program has no block for its own operation set {opset}")
    block = blocks[opset]
    return Program(
        inputs={each.text(1): _tensor_type(each.message(2)) for each in main.messages(1)},
        operations=tuple(_operation(each) for each in block.messages(3)),
        outputs=tuple(block.texts(2)),
    )


def _operation(message: Message) -> Operation:
    if message.has(4):
        raise UnusablePackage(f"operation {message.text(1)} has blocks of its own, which the evaluator does not know")
    arguments = {name: tuple(map(_argument, each.messages(1))) for name, each in message.map(2).items()}
    # A constant's value, and the operands of iOS 16's compressed weights, are attributes; others have only a name.
    attributes = {name: (_constant(value),) for name, value in message.map(5).items() if name != "name"}
    outputs = tuple((each.text(1), _tensor_type(each.message(2))) for each in message.messages(3))
    return Operation(message.text(1), attributes | arguments, outputs)


def _argument(binding: Message) -> Argument:
    return Name(binding.text(1)) if binding.has(1) else _constant(binding.message(2))


def _constant(value: Message) -> Constant:
    type = _tensor_type(value.message(2))
    if any(size is None for size in type.dims):
        raise UnusablePackage(f"a constant of type {type} has no fixed shape")
    if value.has(5):
        return BlobReference(value.message(5).integer(2), type)
    tensor = value.message(3).message(1)
    if type.dtype == "string":
        return (tensor.message(4).texts(1) or [""])[0]
    return _immediate(tensor, type)


def _immediate(tensor: Message, type: TensorType) -> Array:
    """Numbers that stand in the model itself; those of narrow types as their bytes."""
    dtype, shape = stored_dtype(type.dtype), [size or 0 for size in type.dims]
    values: Any
    if tensor.has(7):
        values = np.frombuffer(bytes(tensor.message(7).raw(1)), dtype)
    elif tensor.has(1):
        values = np.frombuffer(tensor.message(1).packed_bytes(1), np.float32)
    elif tensor.has(3):
        values = tensor.message(3).packed_integers(1)
    else:
        kind = next((number for number in _IMMEDIATE_INTEGERS if tensor.has(number)), _IMMEDIATE_INTEGERS[0])
        values = tensor.message(kind).packed_integers(1)
    array = np.asarray(values).astype(dtype)
    if array.size != np.prod(shape, dtype=np.int64):
        raise UnusablePackage(f"a constant of type {type} has {array.size} elements")
    return as_computed(array.reshape(shape))


def _tensor_type(message: Message) -> TensorType:
    if not message.has(1):
        raise UnusablePackage("a value is no tensor, which the evaluator does not know")
    tensor = message.message(1)
    dtype = DATA_TYPES.get(tensor.integer(1))
    if dtype is None:
        raise UnusablePackage(f"values of data type {tensor.integer(1)} are unknown to the evaluator")
    dims = (each.message(1).integer(1) if each.has(1) else None for each in tensor.messages(3))
    return TensorType(dtype, tuple(dims))
