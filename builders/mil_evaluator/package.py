"""A saved `.mlpackage`: its parts on disk, its constants unpacked once, and its program run step by step."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from builders.mil_evaluator import compressed, elementwise, layers, layout  # noqa: F401  # they fill the table
from builders.mil_evaluator.description import Description, parse_description
from builders.mil_evaluator.errors import UnusablePackage
from builders.mil_evaluator.operands import Operands, Value, function_of
from builders.mil_evaluator.program import BlobReference, Name, Operation, Program, parse_program
from builders.mil_evaluator.types import Array, rounded
from builders.mil_evaluator.weights import WeightFile
from builders.mil_evaluator.wire import Message

# What NumPy and Python raise where the numbers of a damaged program do not fit each other.
DAMAGE = (ValueError, TypeError, LookupError, OverflowError, MemoryError, AttributeError)


class Package:
    """A package that is ready to run; safe to share between threads."""

    def __init__(self, name: str, description: Description, program: Program, weights: WeightFile | None) -> None:
        """
        Raises:
            UnusablePackage: an operation is unknown, or a weight damaged.
        """
        self.name, self.description, self.program = name, description, program
        self._weights = weights
        self._constants: dict[str, Value] = {}
        for operation in program.operations:
            if operation.kind == "const":
                self._constants[operation.name] = self._constant(operation)
            elif operation.kind.startswith("constexpr_"):
                self._constants.update(self._evaluate(operation, self._constants))
            else:
                function_of(operation.kind)  # an unknown one is refused before anything runs
        self._steps = [each for each in program.operations if each.name not in self._constants]
        self._last_use = self._last_uses()

    @property
    def operations(self) -> Counter[str]:
        """How often each kind of operation occurs; constants aside."""
        return Counter(each.kind for each in self.program.operations if each.kind != "const")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for one call; a picture goes in as uint8 (height, width, 3) RGB.

        Raises:
            UnusablePackage: a name, type or shape is not what the package asks for, or a step contradicts the
                program's own types.
        """
        if set(feeds) != set(self.description.inputs):
            raise UnusablePackage(f"{self.name}: given {sorted(feeds)}, expected {sorted(self.description.inputs)}")
        values: dict[str, Value] = {}
        for name, feature in self.description.inputs.items():
            if name not in self.program.inputs:
                raise UnusablePackage(f"{self.name}: the program has no input {name}")
            values[name] = rounded(feature.to_tensor(feeds[name]), self.program.inputs[name].dtype)
        for index, operation in enumerate(self._steps):
            values.update(self._evaluate(operation, values))
            for name in self._last_use[index]:
                values.pop(name, None)
        if missing := set(self.program.outputs) - set(values):
            raise UnusablePackage(f"{self.name}: no step makes {', '.join(missing)}")
        return {name: np.asarray(values[name]) for name in self.program.outputs}

    def _evaluate(self, operation: Operation, values: Mapping[str, Value]) -> dict[str, Value]:
        """The outputs of one step, in the types the program gives them."""
        given = {
            parameter: tuple(self._value(argument, values, operation) for argument in arguments)
            for parameter, arguments in operation.arguments.items()
        }
        try:
            results = function_of(operation.kind)(Operands(operation.kind, given, operation.outputs[0][1]))
        except DAMAGE as error:
            raise UnusablePackage(f"{self.name}: {operation.kind} {operation.name} cannot be run: {error}") from None
        found: dict[str, Value] = {}
        tensors = results if isinstance(results, tuple) else (results,)
        if len(tensors) != len(operation.outputs):
            raise UnusablePackage(f"{self.name}: {operation.kind} {operation.name} has {len(tensors)} outputs")
        for (name, type), result in zip(operation.outputs, tensors, strict=True):
            if not type.fits(np.shape(result)):
                shape = list(np.shape(result))
                raise UnusablePackage(f"{self.name}: {operation.kind} {name} gives {shape}, the program says {type}")
            found[name] = rounded(result, type.dtype)
        return found

    def _value(self, argument: object, values: Mapping[str, Value], operation: Operation) -> Value:
        if isinstance(argument, Name):
            name = argument.name
            if name in values:
                return values[name]
            if name in self._constants:
                return self._constants[name]
            raise UnusablePackage(f"{self.name}: {operation.kind} {operation.name} reads {name} before it is there")
        if isinstance(argument, BlobReference):
            return self._blob(argument)
        assert isinstance(argument, (np.ndarray, str))
        return argument

    def _constant(self, operation: Operation) -> Value:
        return self._value(operation.arguments.get("val", ("",))[0], {}, operation)

    def _blob(self, reference: BlobReference) -> Array:
        if self._weights is None:
            raise UnusablePackage(f"{self.name}: weights/weight.bin is missing")
        return reference.read(self._weights)

    def _last_uses(self) -> list[list[str]]:
        """After each step, the values that no later one reads: a tower's activations do not all fit in memory."""
        last: dict[str, int] = {}
        for index, operation in enumerate(self._steps):
            for name, _ in operation.outputs:
                last[name] = index
            for argument in (one for several in operation.arguments.values() for one in several):
                if isinstance(argument, Name):
                    last[argument.name] = index
        let_go: list[list[str]] = [[] for _ in self._steps]
        for name, index in last.items():
            if name not in self.program.outputs:
                let_go[index].append(name)
        return let_go


def load_package(path: Path) -> Package:
    """
    Raises:
        UnusablePackage: no package, damaged, or with an operation that the evaluator does not know.
    """
    model_path = _model_path(path)
    try:
        model = Message.parse(memoryview(model_path.read_bytes()))
    except OSError as error:
        raise UnusablePackage(f"{path.name}: {error}") from None
    weights_path = model_path.parent / "weights" / "weight.bin"
    try:
        weights = WeightFile(weights_path) if weights_path.exists() else None
        return Package(path.name, parse_description(model), parse_program(model), weights)
    except UnusablePackage as error:
        raise UnusablePackage(f"{path.name}: {error}") from None
    except DAMAGE as error:
        raise UnusablePackage(f"{path.name}: is damaged: {type(error).__name__}: {error}") from None


def _model_path(path: Path) -> Path:
    """Where the manifest says the model lies."""
    try:
        manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
        return path / "Data" / str(manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UnusablePackage(f"{path.name}: no Core ML package: {type(error).__name__}: {error}") from None
