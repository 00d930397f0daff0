"""An engine that computes here: files and texts are prepared as the server prepares them, then run in batches.

Order is kept, memory is bounded by two windows of items, and an item that cannot be used costs its own row alone.
"""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from eval.engine import Row, Unusable
from tuwen.errors import InvalidInput
from tuwen.image_transform import preprocess_image
from tuwen.tokenizer import check_text, default_tokenizer, normalize_text

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Rows = npt.NDArray[np.float32]

DEFAULT_BATCH_SIZE = 64
# Texts are sorted by length within a window of so many batches, so that few are padded or kept waiting by a long one.
_TEXT_BATCHES = 16


class LocalEngine(ABC):
    """The half of an engine that PyTorch and ONNX Runtime share: all but the towers."""

    def __init__(self, resolution: int, context_length: int, batch_size: int) -> None:
        if batch_size < 1:
            raise InvalidInput(f"batch size {batch_size}: expected at least 1")
        self._resolution, self._context_length, self._batch_size = resolution, context_length, batch_size
        self._pool = ThreadPoolExecutor(os.cpu_count())

    @abstractmethod
    def _run_images(self, pixel_values: Rows) -> Rows:
        """image_embeds (B, D) of pixel_values (B, 3, R, R)."""

    @abstractmethod
    def _run_texts(self, rows: Sequence[Sequence[int]]) -> Rows:
        """text_embeds (B, D) of B lists of ids, unpadded, of like length."""

    def embed_images(self, encoded: Iterable[bytes]) -> Iterator[Row | Unusable]:
        """As `Engine`."""
        windows = self._prepared(encoded, self._pixel_values, self._batch_size)
        yield from _embedded(windows, lambda batch: self._run_images(np.stack(batch)), self._batch_size)

    def embed_texts(self, texts: Iterable[str]) -> Iterator[Row | Unusable]:
        """As `Engine`."""
        windows = self._prepared(texts, self._input_ids, self._batch_size * _TEXT_BATCHES)
        yield from _embedded(windows, self._run_texts, self._batch_size, length_of=len)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _prepared(
        self, items: Iterable[Item], prepare: Callable[[Item], Prepared], size: int
    ) -> Iterator[list[Prepared | Unusable]]:
        """Windows of `size` items, each prepared on all cores while the window before it is computed."""
        source = iter(items)

        def start() -> list[Future[Prepared | Unusable]]:
            return [self._pool.submit(_usable, prepare, item) for item in itertools.islice(source, size)]

        window = start()
        while window:
            following = start()
            yield [one.result() for one in window]
            window = following

    def _pixel_values(self, encoded: bytes) -> Rows:
        return preprocess_image(encoded, self._resolution)

    def _input_ids(self, text: str) -> list[int]:
        # The server's own checks and sentences; surrogatepass, so that half a surrogate pair is refused by them.
        checked = check_text(text.encode("utf-8", "surrogatepass"))
        return default_tokenizer().encode_ids(normalize_text(checked), self._context_length)


def _usable(prepare: Callable[[Any], Prepared], item: Any) -> Prepared | Unusable:
    try:
        return prepare(item)
    except InvalidInput as error:
        return Unusable(str(error))


def _embedded(
    windows: Iterable[Sequence[Prepared | Unusable]],
    run: Callable[[list[Prepared]], Rows],
    batch_size: int,
    length_of: Callable[[Any], int] | None = None,
) -> Iterator[Row | Unusable]:
    """A row, or why there is none, of each item of each window, in order; batches of like length within a window."""
    for window in windows:
        answers: dict[int, Row | Unusable] = {i: one for i, one in enumerate(window) if isinstance(one, Unusable)}
        usable = [(i, one) for i, one in enumerate(window) if not isinstance(one, Unusable)]
        if length_of is not None:
            usable.sort(key=lambda pair: length_of(pair[1]))
        for start in range(0, len(usable), batch_size):
            batch = usable[start : start + batch_size]
            rows = run([one for _, one in batch])
            # Copies, so that a row that is kept does not keep its whole batch.
            answers.update((i, row.copy()) for (i, _), row in zip(batch, rows, strict=True))
        for index in range(len(window)):
            yield answers[index]
