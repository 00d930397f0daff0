"""Every gRPC status becomes the right error, with the server's own sentence."""

from __future__ import annotations

import pytest
from tuwen_client import (
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    ServerUnavailable,
    TuwenError,
)
from tuwen_client.errors import from_status


@pytest.mark.parametrize(
    ("status", "message", "kind", "shown"),
    [
        ("INVALID_ARGUMENT", "text is empty", InvalidInput, "text is empty"),
        ("INVALID_ARGUMENT", "in ensemble 'a_text', text is empty", InvalidInput, "text is empty"),
        ("UNAVAILABLE", "failed to connect to all addresses", ServerUnavailable, "no server answers: failed"),
        ("UNAVAILABLE", "Exceeds maximum queue size", Overloaded, "Exceeds maximum queue size"),
        ("RESOURCE_EXHAUSTED", "too much", Overloaded, "too much"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExceeded, "did not answer in time"),
        ("NOT_FOUND", "unknown model", ModelNotFound, "unknown model"),
        ("UNAVAILABLE", "Request timeout expired", Overloaded, "Request timeout expired"),
        ("INTERNAL", "Stub process 'tokenize_text_0_0' is not healthy.", ServerUnavailable, "Stub process"),
        (
            "INTERNAL",
            "in ensemble 'a', Server is stopping, scheduler for model has stopped accepting new inference requests",
            ServerUnavailable,
            "Server is stopping",
        ),
        (
            "UNAVAILABLE",
            "text: a part of the server is being replaced; send it again",
            ServerUnavailable,
            "text: a part",
        ),
        (
            "NOT_FOUND",
            "Request for unknown model: 'a_text' has no available versions",
            ServerUnavailable,
            "Request for",
        ),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'x'", TuwenError, "restricted"),
        ("INTERNAL", "the server made a mistake", TuwenError, "a mistake"),
    ],
)
def test_a_status_becomes_its_error(status: str, message: str, kind: type[TuwenError], shown: str) -> None:
    error = from_status(status, message)
    assert type(error) is kind
    assert shown in str(error)
    assert str(error).startswith("no server answers") == message.startswith("failed to connect")


def test_an_error_says_which_item_and_which_are_done() -> None:
    error = InvalidInput("text is empty")
    error.index, error.partial = 4, {2: None, 0: None}  # type: ignore[dict-item]
    assert str(error) == "item 4: text is empty"
    assert error.done == [0, 2]
