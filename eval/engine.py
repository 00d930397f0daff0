"""Whatever embeds: PyTorch, ONNX Runtime, a live server. The same data through each, the same numbers out.

The seam of `eval/`: features, retrieval, zero-shot and comparisons know an Engine and nothing of what lies behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float32]
EngineKind = Literal["torch", "onnx", "triton"]


class Unusable(Exception):
    """Why one item cannot be embedded; yielded in its place, not raised, so that the others go on."""


class Engine(Protocol):
    """A model that embeds pictures and Chinese texts. Also a context manager, which lets go of what it holds.

    Attributes:
        kind: what computes.
        model_name: of the architecture, or the name it is served under.
        embed_dim: D.
        fingerprint: identity of weights, tokeniser and preprocessing; equal ones may be compared.
    """

    @property
    def kind(self) -> EngineKind: ...

    @property
    def model_name(self) -> str: ...

    @property
    def embed_dim(self) -> int: ...

    @property
    def fingerprint(self) -> int: ...

    def embed_images(self, encoded: Iterable[bytes]) -> Iterator[Row | Unusable]:
        """image_embeds float32 (D,), unit length, of each picture file, in order, as they are ready."""

    def embed_texts(self, texts: Iterable[str]) -> Iterator[Row | Unusable]:
        """text_embeds float32 (D,), unit length, of each text, in order, as they are ready."""

    def close(self) -> None: ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, *error: object) -> None: ...
