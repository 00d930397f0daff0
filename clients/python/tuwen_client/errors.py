"""What can go wrong between a client and a server: a closed set of errors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from tritonclient.utils import InferenceServerException


class TuwenError(Exception):
    """Base of all. After a call over many items it knows how far the call came.

    Attributes:
        index: position of the item that failed; None where no single item is to blame.
        partial: the rows that were finished, by position: float32 (D,) each.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.index: int | None = None
        self.partial: Mapping[int, npt.NDArray[np.float32]] = {}

    @property
    def done(self) -> list[int]:
        """Positions of the items that were finished."""
        return sorted(self.partial)

    def __str__(self) -> str:
        return self.message if self.index is None else f"item {self.index}: {self.message}"


class InvalidInput(TuwenError):
    """An item cannot be embedded; the sentence says why. Trying again is of no use."""


class ServerUnavailable(TuwenError):
    """No server answers, or it went away. Nothing is wrong with the items."""


class DeadlineExceeded(TuwenError):
    """An item took longer than `timeout_s`."""


class Overloaded(TuwenError):
    """The server's queue is full; try again later, or send less at a time."""


class ModelNotFound(TuwenError):
    """The server does not serve that model; the sentence lists those it does."""


class ModelChanged(TuwenError):
    """The server now embeds with another model than before: its vectors cannot be compared with the earlier ones."""


_BY_STATUS: dict[str, type[TuwenError]] = {
    "INVALID_ARGUMENT": InvalidInput,
    "OUT_OF_RANGE": InvalidInput,
    "UNAVAILABLE": ServerUnavailable,
    "CANCELLED": ServerUnavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "RESOURCE_EXHAUSTED": Overloaded,
    "NOT_FOUND": ModelNotFound,
}


def from_triton(error: InferenceServerException) -> TuwenError:
    """The error of this module that an exception of tritonclient stands for, with the server's sentence."""
    status = (error.status() or "").removeprefix("StatusCode.")
    message = error.message() or "the server gave no reason"
    # Triton 2.51 reports a full queue as UNAVAILABLE; source: its dynamic_batch_scheduler.
    if status == "UNAVAILABLE" and "queue" in message.lower():
        return Overloaded(message)
    if status == "UNAVAILABLE":
        return ServerUnavailable(f"no server answers: {message}")
    if status == "DEADLINE_EXCEEDED":
        return DeadlineExceeded("the server did not answer in time")
    return _BY_STATUS.get(status, TuwenError)(_own_sentence(message))


def _own_sentence(message: str) -> str:
    """Without Triton's wrapping: "in ensemble 'x', <sentence>"."""
    head, comma, rest = message.partition("', ")
    return rest if comma and head.startswith("in ensemble '") else message
