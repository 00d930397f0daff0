"""What an operation is given, and the table of those the evaluator knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from builders.mil_evaluator.errors import UnusablePackage
from builders.mil_evaluator.types import Array, TensorType

Value = Array | str


@dataclass(frozen=True)
class Operands:
    """The values of one operation by parameter; half precision as float32.

    Attributes:
        output: the type of its first output.
    """

    kind: str
    values: Mapping[str, tuple[Value, ...]]
    output: TensorType

    def has(self, name: str) -> bool:
        return name in self.values

    def arrays(self, name: str) -> list[Array]:
        """Of a parameter that is a tuple.

        Raises:
            UnusablePackage: it is missing, or a text.
        """
        found = self.values.get(name, ())
        arrays = [value for value in found if isinstance(value, np.ndarray)]
        if not arrays or len(arrays) != len(found):
            raise UnusablePackage(f"operation {self.kind} has no numbers for its parameter {name}")
        return arrays

    def array(self, name: str) -> Array:
        return self.arrays(name)[0]

    def integers(self, name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        if default is not None and not self.has(name):
            return default
        return tuple(int(value) for value in self.array(name).reshape(-1))

    def integer(self, name: str, default: int | None = None) -> int:
        return self.integers(name, None if default is None else (default,))[0]

    def number(self, name: str) -> np.float32:
        return np.float32(self.array(name).reshape(-1)[0])

    def text(self, name: str, default: str) -> str:
        value = self.values.get(name, (default,))[0]
        return value if isinstance(value, str) else default

    def require(self, holds: bool, what: str) -> None:
        """Raises UnusablePackage: the operation is asked for what the evaluator does not do."""
        if not holds:
            raise UnusablePackage(f"the evaluator does not know operation {self.kind} {what}")


Evaluate = Callable[[Operands], Array | tuple[Array, ...]]
_KNOWN: dict[str, Evaluate] = {}


def evaluates(*kinds: str) -> Callable[[Evaluate], Evaluate]:
    """Marks a function as what computes operations of these kinds."""

    def register(function: Evaluate) -> Evaluate:
        for kind in kinds:
            _KNOWN[kind] = function
        return function

    return register


def known_operations() -> frozenset[str]:
    return frozenset(_KNOWN)


def function_of(kind: str) -> Evaluate:
    """
    Raises:
        UnusablePackage: the evaluator does not know that kind.
    """
    if kind not in _KNOWN:
        raise UnusablePackage(f"the evaluator does not know operation {kind}")
    return _KNOWN[kind]
