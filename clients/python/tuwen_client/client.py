"""The client: any number of items in, NumPy rows out, in order.

One request carries one item, as the server's contract has it; many are under way at once, and the server's dynamic
batcher makes the batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tuwen_client.errors import InvalidInput, ModelChanged, ModelNotFound, TuwenError, from_triton
from tuwen_client.images import ImageLike, encode_image_file

Row = npt.NDArray[np.float32]
ProgressHook = Callable[[int], None]

# Enough to fill a batch of 32 while the next one queues; see docs/serving.md for the measurement.
DEFAULT_MAX_IN_FLIGHT = 64

# Reconnect at once when a server comes back, instead of after gRPC's default back-off of up to two minutes.
_CHANNEL_ARGS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.primary_user_agent", "tuwen-client"),
]


class Client:
    """Embeds Chinese text and images through a Tuwen server.

    Args:
        url: host:port of the server's gRPC endpoint.
        model: name the model is served under, as `tiny_rn`; by default the only one there is.
        timeout_s: deadline of each item.
        max_in_flight: most items under way at a time.
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
        self._fingerprint: int | None = None
        self._triton = triton.InferenceServerClient(url, channel_args=_CHANNEL_ARGS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._triton.close()

    # --- what is served -------------------------------------------------------------------------------------

    def is_ready(self) -> bool:
        """Whether the server answers and all it was told to load is loaded."""
        try:
            return bool(self._triton.is_server_ready(client_timeout=self.timeout_s))
        except InferenceServerException:
            return False

    def models(self) -> list[str]:
        """Names of the models whose text and image side are both served.

        Raises:
            ServerUnavailable: no server answers.
        """
        try:
            index = self._triton.get_model_repository_index(client_timeout=self.timeout_s)
        except InferenceServerException as error:
            raise from_triton(error) from error
        ready = {entry.name for entry in index.models if entry.state == "READY"}
        return sorted(
            name.removesuffix("_text") for name in ready if name.endswith("_text") and f"{name[:-5]}_image" in ready
        )

    @property
    def model(self) -> str:
        """The model this client embeds with.

        Raises:
            ModelNotFound: none was named, and the server serves none or several.
        """
        if self._model is None:
            served = self.models()
            if len(served) != 1:
                raise ModelNotFound(f"the server at {self.url} serves {served or 'no model'}; name one with model=...")
            self._model = served[0]
        return self._model

    @property
    def embed_dim(self) -> int:
        """D, the length of an embedding."""
        try:
            metadata = self._triton.get_model_metadata(f"{self.model}_text", client_timeout=self.timeout_s)
        except InferenceServerException as error:
            raise self._known(error) from error
        return next(int(output.shape[-1]) for output in metadata.outputs if output.name == "text_embeds")

    @property
    def fingerprint(self) -> int:
        """Identity of weights, tokeniser and preprocessing: store it beside vectors you keep."""
        if self._fingerprint is None:
            self.embed_text(["图"])
        assert self._fingerprint is not None  # every answer carries one
        return self._fingerprint

    # --- embedding ------------------------------------------------------------------------------------------

    def embed_text(self, texts: Iterable[str], on_progress: ProgressHook | None = None) -> Row:
        """text_embeds float32 (N, D), unit length, of N texts.

        Args:
            on_progress: called with the number of items finished, in order.
        Raises:
            InvalidInput: the server refuses a text; `index` says which.
            ServerUnavailable, DeadlineExceeded, Overloaded, ModelNotFound, ModelChanged: see `errors`.
            Each carries what was finished: `done`, `partial`.
        """
        return self._collect(self._text_requests(texts), "text", on_progress)

    def embed_images(self, images: Iterable[ImageLike], on_progress: ProgressHook | None = None) -> Row:
        """image_embeds float32 (N, D), unit length, of N images: paths, bytes, PIL images or uint8 arrays.

        Raises:
            as `embed_text`.
        """
        return self._collect(self._image_requests(images), "image", on_progress)

    def iter_embed_text(self, texts: Iterable[str]) -> Iterator[Row]:
        """One float32 (D,) per text, in order, in constant memory: for inputs without end."""
        return self._rows(self._text_requests(texts), "text", None)

    def iter_embed_images(self, images: Iterable[ImageLike]) -> Iterator[Row]:
        """One float32 (D,) per image, in order, in constant memory: for inputs without end."""
        return self._rows(self._image_requests(images), "image", None)

    def similarity(self, images: Iterable[ImageLike], texts: Iterable[str]) -> Row:
        """Cosine similarity float32 (N_images, N_texts)."""
        return self.embed_images(images) @ self.embed_text(texts).T

    # --- requests -------------------------------------------------------------------------------------------

    def _text_requests(self, texts: Iterable[str]) -> Iterator[triton.InferInput | TuwenError]:
        if isinstance(texts, str):
            raise InvalidInput("texts is one string, expected a list of them: [text]")
        for text in texts:
            if not isinstance(text, str):
                yield InvalidInput(f"a {type(text).__name__} is no text")
                continue
            tensor = triton.InferInput("text", [1, 1], "BYTES")
            # surrogatepass, so that a broken string is refused by the server's sentence and not by a codec here.
            yield tensor.set_data_from_numpy(np.array([[text.encode("utf-8", "surrogatepass")]], dtype=np.object_))

    def _image_requests(self, images: Iterable[ImageLike]) -> Iterator[triton.InferInput | TuwenError]:
        if isinstance(images, (str, bytes)):
            raise InvalidInput("images is one image, expected a list of them: [image]")
        for image in images:
            try:
                encoded = np.frombuffer(encode_image_file(image), dtype=np.uint8)[None]
            except InvalidInput as error:
                yield error
                continue
            if encoded.size == 0:
                yield InvalidInput("image is empty, expected an encoded picture file")
                continue
            tensor = triton.InferInput("image", list(encoded.shape), "UINT8")
            yield tensor.set_data_from_numpy(encoded)

    def _collect(self, requests: Iterator[triton.InferInput | TuwenError], side: str, hook: ProgressHook | None) -> Row:
        finished: dict[int, Row] = {}
        for count, _ in enumerate(self._rows(requests, side, finished), start=1):
            if hook:
                hook(count)
        if not finished:
            return np.zeros((0, self.embed_dim), np.float32)
        return np.stack([finished[index] for index in range(len(finished))])

    def _rows(
        self, requests: Iterator[triton.InferInput | TuwenError], side: str, finished: dict[int, Row] | None
    ) -> Iterator[Row]:
        """Rows in order; each is put into `finished`, too, unless the caller wants constant memory."""
        in_flight: deque[tuple[int, _Call]] = deque()
        try:
            for index, request in enumerate(requests):
                in_flight.append((index, self._send(request, side)))
                if len(in_flight) >= self.max_in_flight:
                    yield self._receive(in_flight, side, finished)
            while in_flight:
                yield self._receive(in_flight, side, finished)
        finally:  # on an error, or when the caller stops iterating
            for _, call in in_flight:
                call.cancel()

    def _send(self, request: triton.InferInput | TuwenError, side: str) -> _Call:
        call = _Call()
        if isinstance(request, TuwenError):
            call.future.set_exception(request)
            return call
        call.context = self._triton.async_infer(
            f"{self.model}_{side}",
            [request],
            callback=partial(_finish, call.future),
            outputs=[triton.InferRequestedOutput(f"{side}_embeds"), triton.InferRequestedOutput("fingerprint")],
            client_timeout=self.timeout_s,
        )
        return call

    def _receive(self, in_flight: deque[tuple[int, _Call]], side: str, finished: dict[int, Row] | None) -> Row:
        index, call = in_flight[0]
        try:
            row = self._read(call.future.result(), side)
        except (InferenceServerException, TuwenError) as error:
            failure = error if isinstance(error, TuwenError) else self._known(error)
            failure.index = index
            arrived = [(later, other.future) for later, other in in_flight if other.future.done()]
            late = {later: self._read(future.result(), side) for later, future in arrived if not future.exception()}
            failure.partial = (finished or {}) | (late if not isinstance(failure, ModelChanged) else {})
            raise failure from error
        in_flight.popleft()
        if finished is not None:
            finished[index] = row
        return row

    def _read(self, result: triton.InferResult, side: str) -> Row:
        fingerprint = int(result.as_numpy("fingerprint").ravel()[0])
        if self._fingerprint is None:
            self._fingerprint = fingerprint
        elif fingerprint != self._fingerprint:
            raise ModelChanged(
                f"the server embeds with model {fingerprint}, this client began with {self._fingerprint}; "
                "embed again with a new client"
            )
        row: Row = result.as_numpy(f"{side}_embeds")[0]
        return row

    def _known(self, error: InferenceServerException) -> TuwenError:
        """The typed error; an unknown model is met with the list of those there are."""
        known = from_triton(error)
        if isinstance(known, ModelNotFound) or "unknown model" in known.message:
            return ModelNotFound(f"the server at {self.url} does not serve {self._model!r}, but {self.models()}")
        return known


class _Call:
    """One request under way."""

    def __init__(self) -> None:
        self.future: Future[triton.InferResult] = Future()
        self.context: Any = None

    def cancel(self) -> None:
        if self.context is not None and not self.future.done():
            self.context.cancel()


def _finish(
    future: Future[triton.InferResult], result: triton.InferResult | None, error: InferenceServerException | None
) -> None:
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
