"""The client: any number of items in, NumPy rows out, in order.

One request carries one item, as the server's contract has it; many are under way at once, and the server's dynamic
batcher makes the batches.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tuwen_client.errors import DeadlineExceeded, InvalidInput, ModelChanged, ModelNotFound, TuwenError, from_triton
from tuwen_client.images import ImageLike
from tuwen_client.sides import IMAGE, TEXT, Side, many_images, many_texts

Row = npt.NDArray[np.float32]
ProgressHook = Callable[[int], None]
InvalidHook = Callable[[InvalidInput], None]
Answer = TypeVar("Answer")

# Two full batches of the server's 32: one computes while the next one queues. `python -m perf.client_window` measures.
DEFAULT_MAX_IN_FLIGHT = 64

_CHANNEL_ARGS = [
    # A server that comes back is found again within 0.3 s, instead of gRPC's default back-off of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 300),
    # In spite of its name also the time that one attempt to connect may take: a far or busy server needs it.
    ("grpc.min_reconnect_backoff_ms", 5000),
    # A host that vanishes without a word is noticed after 20 s, measured; grpcio 1.85 heeds the ping's own timeout,
    # not keepalive's, which older ones know alone. Triton 2.51 allows these pings: a silent call of 45 s survived.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.primary_user_agent", "tuwen-client"),
]


class Client:
    """Embeds Chinese text and images through a Tuwen server. Threads may share one.

    Args:
        url: host:port of the server's gRPC endpoint.
        model: name the model is served under, as `tiny_rn`; by default the only one there is.
        timeout_s: deadline of each item, from when it is sent.
        max_in_flight: most items under way at a time, in each call.
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        model: str | None = None,
        timeout_s: float = 30.0,
        max_in_flight: int = DEFAULT_MAX_IN_FLIGHT,
    ) -> None:
        if max_in_flight < 1:
            raise InvalidInput(f"max_in_flight is {max_in_flight}, expected at least 1")
        if timeout_s <= 0:
            raise InvalidInput(f"timeout_s is {timeout_s}, expected more than 0")
        self.url, self.timeout_s, self.max_in_flight = url, timeout_s, max_in_flight
        self._model = model
        self._embed_dim: int | None = None
        self._fingerprint: int | None = None
        self._triton = triton.InferenceServerClient(url, channel_args=_CHANNEL_ARGS)
        self._is_closed = False
        # tritonclient keeps the call it is making in an attribute: two threads at once would swap their answers.
        self._sending = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; safe a second time."""
        with self._sending:
            self._is_closed = True
            self._triton.close()

    # --- what is served -------------------------------------------------------------------------------------

    def is_ready(self) -> bool:
        """Whether the server answers and serves both sides of the model."""
        try:
            return bool(self._ask(self._triton.is_server_ready)) and all(
                self._ask(self._triton.is_model_ready, f"{self.model}_{side.name}") for side in (TEXT, IMAGE)
            )
        except TuwenError:
            return False

    def models(self) -> list[str]:
        """Names of the models whose text and image side are both served.

        Raises:
            ServerUnavailable: no server answers.
        """
        self._check_open()
        try:
            # The index of models would say the same, but belongs to a protocol that wants the admin token.
            statistics = self._triton.get_inference_statistics(client_timeout=self.timeout_s)
        except InferenceServerException as error:
            raise from_triton(error) from error
        ready = {entry.name for entry in statistics.model_stats}
        names = (name.removesuffix("_text") for name in ready if name.endswith("_text"))
        return sorted(name for name in names if f"{name}_image" in ready)

    @property
    def model(self) -> str:
        """The model this client embeds with.

        Raises:
            ModelNotFound: none was named, and the server serves none or several.
        """
        if self._model is None:
            served = self.models()
            if len(served) != 1:
                listed = ", ".join(served) or "no model"
                raise ModelNotFound(f"the server at {self.url} serves {listed}; name one with model=...")
            self._model = served[0]
        return self._model

    @property
    def embed_dim(self) -> int:
        """D, the length of an embedding."""
        if self._embed_dim is None:
            metadata = self._ask(self._triton.get_model_metadata, f"{self.model}_text")
            shapes = {output.name: output.shape for output in metadata.outputs}
            self._embed_dim = int(shapes[TEXT.output][-1])
        return self._embed_dim

    @property
    def fingerprint(self) -> int:
        """Identity of weights, tokeniser and preprocessing: store it beside vectors you keep."""
        if self._fingerprint is None:
            self.embed_text(["图"])
        assert self._fingerprint is not None  # every answer carries one
        return self._fingerprint

    # --- embedding ------------------------------------------------------------------------------------------

    def embed_text(
        self, texts: Iterable[str], on_progress: ProgressHook | None = None, on_invalid: InvalidHook | None = None
    ) -> Row:
        """text_embeds float32 (N, D), unit length, of N texts.

        Args:
            on_progress: called with the number of items finished, in order.
            on_invalid: called with the error of each item that is refused, whose row is then NaN; without it the
                first one is raised.
        Raises:
            InvalidInput: a text is refused; `index` says which.
            ServerUnavailable, DeadlineExceeded, Overloaded, ModelNotFound, ModelChanged: see `errors`.
            Each carries what was finished: `done`, `partial`.
        """
        return self._collect(self._rows(many_texts(texts), TEXT, on_invalid), on_progress)

    def embed_images(
        self,
        images: Iterable[ImageLike],
        on_progress: ProgressHook | None = None,
        on_invalid: InvalidHook | None = None,
    ) -> Row:
        """image_embeds float32 (N, D), unit length, of N images: paths, bytes, PIL images or uint8 arrays.

        Args and raises:
            as `embed_text`.
        """
        return self._collect(self._rows(many_images(images), IMAGE, on_invalid), on_progress)

    def iter_embed_text(self, texts: Iterable[str], on_invalid: InvalidHook | None = None) -> Iterator[Row]:
        """One float32 (D,) per text, in order, in constant memory: for inputs without end."""
        return self._rows(many_texts(texts), TEXT, on_invalid)

    def iter_embed_images(self, images: Iterable[ImageLike], on_invalid: InvalidHook | None = None) -> Iterator[Row]:
        """One float32 (D,) per image, in order, in constant memory: for inputs without end."""
        return self._rows(many_images(images), IMAGE, on_invalid)

    def similarity(self, images: Iterable[ImageLike], texts: Iterable[str]) -> Row:
        """Cosine similarity float32 (N_images, N_texts)."""
        return self.embed_images(images) @ self.embed_text(texts).T

    # --- requests -------------------------------------------------------------------------------------------

    def _collect(self, rows: Iterator[Row], on_progress: ProgressHook | None) -> Row:
        finished: list[Row] = []
        try:
            for row in rows:
                finished.append(row)
                if on_progress:
                    on_progress(len(finished))
        except TuwenError as error:
            before = {index: row for index, row in enumerate(finished) if not np.isnan(row[0])}
            error.partial = before | dict(error.partial)
            raise
        return np.stack(finished) if finished else np.zeros((0, self.embed_dim), np.float32)

    def _rows(self, items: Iterator[object], side: Side, on_invalid: InvalidHook | None) -> Iterator[Row]:
        window: deque[_Call] = deque()
        try:
            for index, item in enumerate(items):
                window.append(self._send(index, item, side))
                if len(window) >= self.max_in_flight:
                    yield self._receive(window, side, on_invalid)
            while window:
                yield self._receive(window, side, on_invalid)
        finally:  # on an error, or when the caller stops iterating
            for call in window:
                call.cancel()

    def _send(self, index: int, item: object, side: Side) -> _Call:
        call = _Call(index, item)
        model = f"{self.model}_{side.name}"
        try:
            tensor = side.make_input(item)
        except InvalidInput as error:
            call.answer.set_exception(error)
            return call
        with self._sending:
            self._check_open()
            call.context = self._triton.async_infer(
                model,
                [tensor],
                callback=partial(_finish, call.answer),
                outputs=[triton.InferRequestedOutput(side.output), triton.InferRequestedOutput("fingerprint")],
                client_timeout=self.timeout_s,
            )
        return call

    def _receive(self, window: deque[_Call], side: Side, on_invalid: InvalidHook | None) -> Row:
        """The row of the oldest call, which leaves the window."""
        try:
            row = self._read(window[0].answer.result(), side)
        except (InferenceServerException, TuwenError) as error:
            call = window.popleft()
            failure = error if isinstance(error, TuwenError) else self._typed(error)
            failure.index, failure.item = call.index, side.describe(call.item)
            if on_invalid and isinstance(failure, InvalidInput):
                on_invalid(failure)
                return np.full(self.embed_dim, np.nan, np.float32)
            failure.partial = self._arrived(window, side)
            raise failure from (None if failure is error else error)
        window.popleft()
        return row

    def _arrived(self, window: deque[_Call], side: Side) -> dict[int, Row]:
        """Rows that overtook the failed one, without those of another model."""
        rows = {}
        for call in window:
            if call.answer.done() and not call.answer.exception():
                with contextlib.suppress(ModelChanged):
                    rows[call.index] = self._read(call.answer.result(), side)
        return rows

    def _read(self, result: triton.InferResult, side: Side) -> Row:
        fingerprint = int(result.as_numpy("fingerprint").ravel()[0])
        with self._sending:
            if self._fingerprint is None:
                self._fingerprint = fingerprint
        if fingerprint != self._fingerprint:
            raise ModelChanged(
                f"the server embeds with model {fingerprint}, this client began with {self._fingerprint}; "
                "embed again with a new client"
            )
        # A copy: what tritonclient returns is a read-only view of the message.
        row: Row = result.as_numpy(side.output)[0].copy()
        return row

    def _ask(self, method: Callable[..., Any], *args: str) -> Any:
        """Call one of tritonclient's other methods, with the deadline, and with our errors."""
        self._check_open()
        try:
            return method(*args, client_timeout=self.timeout_s)
        except InferenceServerException as error:
            raise self._typed(error) from error

    def _check_open(self) -> None:
        if self._is_closed:
            raise TuwenError(f"this client of {self.url} is closed; make a new one")

    def _typed(self, error: InferenceServerException) -> TuwenError:
        """The typed error; a missed deadline names it, an unknown model is met with the list of those there are."""
        failure = from_triton(error)
        if isinstance(failure, DeadlineExceeded):
            return DeadlineExceeded(f"{failure.message}; timeout_s is {self.timeout_s:g}")
        if not isinstance(failure, ModelNotFound):
            return failure
        try:
            served = ", ".join(self.models()) or "no model"
        except TuwenError as unavailable:  # a server on its way out unloads its models first
            return unavailable
        return ModelNotFound(f"{failure.message}; the server at {self.url} serves {served}")


@dataclass
class _Call:
    """One request under way, or refused before it was sent."""

    index: int
    item: object
    answer: Future[triton.InferResult] = field(default_factory=Future)
    context: Any = None  # of tritonclient, which does not export its type

    def cancel(self) -> None:
        if self.context is not None and not self.answer.done():
            self.context.cancel()


def _finish(
    answer: Future[triton.InferResult], result: triton.InferResult | None, error: InferenceServerException | None
) -> None:
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(result)
