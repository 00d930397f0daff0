"""A live server through its client, many items under way at once: what users get."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

from tuwen_client import Client, InvalidInput, Tls
from tuwen_client.client import DEFAULT_MAX_IN_FLIGHT

from eval.engine import EngineKind, Row, Unusable

# An evaluation is in no hurry: a full window of a large model's pictures on two cores takes longer than the client's
# default of 30 s.
TIMEOUT_S = 180.0


class TritonEngine:
    """An Engine over gRPC; see `eval.engine`. The client's errors are raised, but for what is wrong with one item."""

    def __init__(
        self,
        url: str = "localhost:8001",
        model: str | None = None,
        token: str | None = None,
        tls: Tls | None = None,
        max_in_flight: int = DEFAULT_MAX_IN_FLIGHT,
    ) -> None:
        """Nothing is sent before it is needed.

        Args:
            url: host:port of a server, or several with commas between.
            model: by default the only one that is served.
        """
        self._client = Client(url, model, TIMEOUT_S, max_in_flight, token=token, tls=tls)

    @property
    def kind(self) -> EngineKind:
        return "triton"

    @property
    def model_name(self) -> str:
        return self._client.model

    @property
    def embed_dim(self) -> int:
        return self._client.embed_dim

    @property
    def fingerprint(self) -> int:
        return self._client.fingerprint

    def embed_images(self, encoded: Iterable[bytes]) -> Iterator[Row | Unusable]:
        """As `Engine`."""
        return _rows(self._client.iter_embed_images, encoded)

    def embed_texts(self, texts: Iterable[str]) -> Iterator[Row | Unusable]:
        """As `Engine`."""
        return _rows(self._client.iter_embed_text, texts)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _rows(iterate: Callable[..., Iterator[Row]], items: Iterable[Any]) -> Iterator[Row | Unusable]:
    refused: dict[int | None, str] = {}

    def note(error: InvalidInput) -> None:
        refused[error.index] = error.message

    for index, row in enumerate(iterate(items, note)):
        yield Unusable(refused.pop(index)) if index in refused else row
