"""Why a request gets no result: an HTTP status, a kind that the page has a heading for, and one sentence."""

from __future__ import annotations

from typing import Literal

from tuwen_client import (
    DeadlineExceeded,
    InvalidInput,
    ModelChanged,
    ModelNotFound,
    Overloaded,
    ServerUnavailable,
    TuwenError,
)

Kind = Literal["refused", "too_large", "not_found", "busy", "not_ready", "no_server", "too_slow", "failed"]

_STATUS: dict[Kind, int] = {
    "refused": 400,
    "not_found": 404,
    "too_large": 413,
    "failed": 502,
    "busy": 503,
    "not_ready": 503,
    "no_server": 503,
    "too_slow": 504,
}
# Seconds after which trying again may help; the page does so by itself.
_RETRY_AFTER_S: dict[Kind, int] = {"busy": 1, "not_ready": 2, "no_server": 3}

_KIND_OF: tuple[tuple[type[TuwenError], Kind], ...] = (
    (InvalidInput, "refused"),
    (Overloaded, "busy"),
    (ServerUnavailable, "no_server"),
    (DeadlineExceeded, "too_slow"),
    (ModelNotFound, "no_server"),
    (ModelChanged, "not_ready"),
)


class Refusal(Exception):
    """What went wrong, for a person to read."""

    def __init__(self, kind: Kind, sentence: str) -> None:
        super().__init__(sentence)
        self.kind, self.sentence = kind, sentence

    @property
    def status(self) -> int:
        """HTTP's."""
        return _STATUS[self.kind]

    @property
    def retry_after_s(self) -> int | None:
        """Seconds to wait before the same is asked again; None where that is of no use."""
        return _RETRY_AFTER_S.get(self.kind)

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


def refusal_of(error: TuwenError) -> Refusal:
    """The client's error, in the server's words."""
    kind: Kind = next((kind for of, kind in _KIND_OF if isinstance(error, of)), "failed")
    return Refusal(kind, error.message)
