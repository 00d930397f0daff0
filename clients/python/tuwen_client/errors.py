"""What can go wrong between a client and a server: a closed set of errors.

Every one carries the sentence of whoever found the fault and, after a call over many items, how far the call came.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt


class TuwenError(Exception):
    """Base of all; raised as itself where a server answers with a fault of its own.

    Attributes:
        message: the sentence alone.
        index: position of the item that failed; None where no single item is to blame.
        item: what that item was, in a few words: a path, the head of a text, a picture's size.
        partial: the rows that were finished, by position: float32 (D,) each. From an iterator, those that it
            had not yet handed out.
    """

    # Whether the item is worth a word in the sentence: it is not where any other would have failed as well.
    blames_item: ClassVar[bool] = True

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.index: int | None = None
        self.item: str | None = None
        self.partial: Mapping[int, npt.NDArray[np.float32]] = {}

    @property
    def done(self) -> list[int]:
        """Positions of the rows in `partial`."""
        return sorted(self.partial)

    def __str__(self) -> str:
        if self.index is None or not self.blames_item:
            return self.message
        item = f" ({self.item})" if self.item and self.item not in self.message else ""
        return f"item {self.index}: {self.message}{item}"


class InvalidInput(TuwenError):
    """An item cannot be embedded; the sentence says why. Trying again is of no use."""


class ServerUnavailable(TuwenError):
    """No server answers, or it went away. Nothing is wrong with the items."""

    blames_item = False


class DeadlineExceeded(TuwenError):
    """An item took longer than `timeout_s`, the time it waited for its turn in the server included."""


class Overloaded(TuwenError):
    """The server's queue is full; try again later, or send less at a time."""

    blames_item = False


class ModelNotFound(TuwenError):
    """The server does not serve that model; the sentence lists those it does."""

    blames_item = False


class ModelChanged(TuwenError):
    """The server now embeds with another model than before: its vectors cannot be compared with the earlier ones."""

    blames_item = False


_BY_STATUS: dict[str, type[TuwenError]] = {
    "INVALID_ARGUMENT": InvalidInput,
    "OUT_OF_RANGE": InvalidInput,
    "UNAVAILABLE": ServerUnavailable,
    "UNIMPLEMENTED": ServerUnavailable,  # something answers, but no Triton
    "CANCELLED": ServerUnavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "RESOURCE_EXHAUSTED": Overloaded,
    "NOT_FOUND": ModelNotFound,
}

# Where Triton 2.51's status says less than its sentence: a full queue comes as UNAVAILABLE, a dead model process as
# INTERNAL, a server that shuts down under either.
_BY_SENTENCE: tuple[tuple[str, type[TuwenError]], ...] = (
    ("Exceeds maximum queue size", Overloaded),
    ("Request timeout expired", Overloaded),
    ("is not healthy", ServerUnavailable),
    ("Server is stopping", ServerUnavailable),
    ("stopped accepting new inference requests", ServerUnavailable),
    ("no available versions", ServerUnavailable),
    ("is not ready", ServerUnavailable),
    ("Server not ready", ServerUnavailable),
    ("; send it again", ServerUnavailable),
    ("This protocol is restricted", TuwenError),
)

# Triton's wrapping of a model's own sentence: "in ensemble 'x', [request id: <id_unknown>] <sentence>".
_WRAPPING = re.compile(r"^(?:in ensemble '[^']*', )*(?:\[request id: [^\]]*\] )?")


def from_status(status: str, message: str) -> TuwenError:
    """The error of this module that a gRPC status stands for, with the server's sentence.

    Args:
        status: the code's name, as UNAVAILABLE.
        message: the status's details.
    """
    message = message or "the server gave no reason"
    sentence = _WRAPPING.sub("", message)
    for words, kind in _BY_SENTENCE:
        if words in message:
            return kind(sentence)
    kind = _BY_STATUS.get(status, TuwenError)
    if kind is DeadlineExceeded:
        return DeadlineExceeded("the server did not answer in time")
    if kind is ServerUnavailable and sentence == message:  # gRPC's own words: no server said this
        return ServerUnavailable(f"no server answers: {message}")
    return kind(sentence)
