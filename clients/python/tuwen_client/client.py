"""The client: any number of items in, NumPy rows out, in order.

One request carries one item, as the server's contract has it; many are under way at once, and the server's dynamic
batcher makes the batches.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Generator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from tritonclient.grpc import service_pb2

from tuwen_client.answers import CHUNKS_IN_FLIGHT, Classes, Scores, blame_image, chunks, classes_job, join, scores_job
from tuwen_client.calls import Call
from tuwen_client.core import (
    DEFAULT_MAX_IN_FLIGHT,
    Asked,
    Core,
    Flight,
    InvalidHook,
    ProgressHook,
    Sent,
    TruncatedHook,
    add_finished,
    embed_dim_of,
    missing_row,
    names_of_pairs,
    now,
    tell_truncated,
)
from tuwen_client.endpoints import Endpoint
from tuwen_client.errors import InvalidInput, ModelNotFound, TuwenError
from tuwen_client.images import ImageLike
from tuwen_client.options import Priority
from tuwen_client.sides import IMAGE, TEXT, Embedded, Job, Row, many_images, many_texts
from tuwen_client.tracing import client_span
from tuwen_client.transport import response_of

__all__ = ["DEFAULT_MAX_IN_FLIGHT", "Client", "InvalidHook", "ProgressHook", "Row", "TruncatedHook"]

Answer = TypeVar("Answer")
_END = object()


class Client(Core):
    """Embeds Chinese text and images through a Tuwen server. Threads may share one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, and give back shared memory; safe a second time."""
        self._close()

    # --- what is served -------------------------------------------------------------------------------------

    def is_ready(self) -> bool:
        """Whether a server answers and serves both sides of the model."""
        try:
            questions = self._health_questions(self.model)
            return any(self._is_healthy(endpoint, questions) for endpoint in self._in_turn())
        except TuwenError:
            return False

    def models(self) -> list[str]:
        """Names of the models whose text and image side are both served.

        Raises:
            ServerUnavailable: no server answers.
        """
        # The index of models would say the same, but belongs to a protocol that wants the admin token.
        return names_of_pairs(self._ask("ModelStatistics", service_pb2.ModelStatisticsRequest()))

    @property
    def model(self) -> str:
        """The model this client embeds with.

        Raises:
            ModelNotFound: none was named, and the server serves none or several.
        """
        return self._model or self._only_model(self.models())

    @property
    def embed_dim(self) -> int:
        """D, the length of an embedding."""
        if self._embed_dim is None:
            request = service_pb2.ModelMetadataRequest(name=f"{self.model}_text")
            try:
                self._embed_dim = embed_dim_of(self._ask("ModelMetadata", request))
            except ModelNotFound as error:
                raise self._with_served_models(error) from error
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
        self,
        texts: Iterable[str],
        on_progress: ProgressHook | None = None,
        on_invalid: InvalidHook | None = None,
        *,
        on_truncated: TruncatedHook | None = None,
        timeout_s: float | None = None,
        priority: Priority | None = None,
    ) -> Row:
        """text_embeds float32 (N, D), unit length, of N texts.

        Args:
            on_progress: called with the number of items finished, in order.
            on_invalid: called with the error of each item that is refused, whose row is then NaN; without it the
                first one is raised.
            on_truncated: called with the position of each text that was too long to be embedded whole.
            timeout_s: deadline of each item; default: the client's.
            priority: "interactive" or "bulk"; default: the client's.
        Raises:
            InvalidInput: a text is refused; `index` says which.
            ServerUnavailable, DeadlineExceeded, Overloaded, ModelNotFound, ModelChanged: see `errors`.
            Each carries what was finished: `done`, `partial`.
        """
        asked = self._asked(timeout_s, priority)
        return self._collect(self._text_rows("embed_text", texts, asked, on_invalid, on_truncated), on_progress)

    def embed_images(
        self,
        images: Iterable[ImageLike],
        on_progress: ProgressHook | None = None,
        on_invalid: InvalidHook | None = None,
        *,
        timeout_s: float | None = None,
        priority: Priority | None = None,
    ) -> Row:
        """image_embeds float32 (N, D), unit length, of N images: paths, bytes, PIL images or uint8 arrays.

        Args and raises:
            as `embed_text`.
        """
        asked = self._asked(timeout_s, priority)
        return self._collect(self._rows("embed_images", many_images(images), IMAGE, asked, on_invalid), on_progress)

    def iter_embed_text(
        self,
        texts: Iterable[str],
        on_invalid: InvalidHook | None = None,
        *,
        on_truncated: TruncatedHook | None = None,
        timeout_s: float | None = None,
        priority: Priority | None = None,
    ) -> Iterator[Row]:
        """One float32 (D,) per text, in order, in constant memory: for inputs without end.

        At most `max_in_flight` texts are taken before their rows are asked for. Args and raises: as `embed_text`.
        """
        return self._text_rows("iter_embed_text", texts, self._asked(timeout_s, priority), on_invalid, on_truncated)

    def iter_embed_images(
        self,
        images: Iterable[ImageLike],
        on_invalid: InvalidHook | None = None,
        *,
        timeout_s: float | None = None,
        priority: Priority | None = None,
    ) -> Iterator[Row]:
        """One float32 (D,) per image, in order, in constant memory: for inputs without end.

        At most `max_in_flight` images are taken before their rows are asked for. Args and raises: as `embed_text`.
        """
        asked = self._asked(timeout_s, priority)
        return self._rows("iter_embed_images", many_images(images), IMAGE, asked, on_invalid)

    def similarity(self, images: Iterable[ImageLike], texts: Iterable[str]) -> Row:
        """Cosine similarity float32 (N_images, N_texts)."""
        return self.embed_images(images) @ self.embed_text(texts).T

    # --- the other served models ----------------------------------------------------------------------------

    def score(
        self,
        images: Iterable[ImageLike],
        texts: Iterable[str],
        *,
        calibration: str | None = None,
        timeout_s: float | None = None,
        priority: Priority | None = None,
    ) -> Scores:
        """How well each image fits each text, judged by the server's similarity model.

        Args:
            texts: at most 4,096; any number of images.
            calibration: name of a calibration that the server stores: adds relevance and no_match.
            timeout_s: deadline of each 64 images, which are sent together.
            priority: as in `embed_text`.
        Raises:
            TuwenError: as `embed_text`; there are no partial rows.
        """
        job = scores_job(texts, calibration)
        return self._judged("score", images, job, self._asked(timeout_s, priority, CHUNKS_IN_FLIGHT))

    def classify(
        self,
        images: Iterable[ImageLike],
        labels: Iterable[str] | None = None,
        *,
        classifier: str | None = None,
        templates: Iterable[str] | None = None,
        calibration: str | None = None,
        timeout_s: float | None = None,
        priority: Priority | None = None,
    ) -> Classes:
        """Which label each image shows, judged by the server's zero-shot model.

        Args:
            labels: what to tell apart; or instead
            classifier: name of a classifier that the server stores.
            templates: prompts with {} where a label goes, averaged; default: the server's.
            calibration, timeout_s, priority: as in `score`.
        Raises:
            TuwenError: as `embed_text`; there are no partial rows.
        """
        job = classes_job(labels, classifier, templates, calibration)
        return self._judged("classify", images, job, self._asked(timeout_s, priority, CHUNKS_IN_FLIGHT))

    # --- requests -------------------------------------------------------------------------------------------

    def _text_rows(
        self,
        operation: str,
        texts: Iterable[str],
        asked: Asked,
        on_invalid: InvalidHook | None,
        on_truncated: TruncatedHook | None,
    ) -> Iterator[Row]:
        return self._rows(operation, many_texts(texts), TEXT, asked, on_invalid, on_truncated)

    def _collect(self, rows: Iterator[Row], on_progress: ProgressHook | None) -> Row:
        finished: list[Row] = []
        try:
            for row in rows:
                finished.append(row)
                if on_progress:
                    on_progress(len(finished))
        except TuwenError as error:
            add_finished(error, finished)
            raise
        return np.stack(finished) if finished else np.zeros((0, self.embed_dim), np.float32)

    def _rows(
        self,
        operation: str,
        items: Iterable[object],
        job: Job[Embedded],
        asked: Asked,
        on_invalid: InvalidHook | None,
        on_truncated: TruncatedHook | None = None,
    ) -> Iterator[Row]:
        with contextlib.closing(self._settled(operation, items, job, asked, on_invalid)) as calls:
            for call in calls:
                if call.error is not None:
                    yield missing_row(self.embed_dim)
                    continue
                if on_truncated:
                    tell_truncated(call, on_truncated)
                yield call.answer.row

    def _judged(self, operation: str, images: Iterable[ImageLike], job: Job[Answer], asked: Asked) -> Any:
        try:
            return join([call.answer for call in self._settled(operation, chunks(images), job, asked, None)])
        except InvalidInput as error:
            raise blame_image(error) from error.__cause__

    def _settled(
        self,
        operation: str,
        items: Iterable[object],
        job: Job[Answer],
        asked: Asked,
        on_invalid: InvalidHook | None,
    ) -> Generator[Call]:
        """Calls in order, each with its answer, or with the error that on_invalid was called with."""
        ended: queue.SimpleQueue[Sent] = queue.SimpleQueue()
        self._check_open()
        model = self.model
        with client_span(operation, model, self.url) as headers:
            flight = self._flight(job, model, ended.put, headers, asked)
            for call in _fly(flight, enumerate(items), ended):
                if call.error is not None:
                    self._tell(flight.failure(call), on_invalid)
                yield call

    def _tell(self, error: TuwenError, on_invalid: InvalidHook | None) -> None:
        if isinstance(error, ModelNotFound):
            error = self._with_served_models(error)
        if on_invalid is None or not isinstance(error, InvalidInput):
            raise error
        on_invalid(error)

    def _with_served_models(self, error: ModelNotFound) -> TuwenError:
        try:
            return self._with_served(error, self.models())
        except TuwenError as unavailable:  # a server on its way out unloads its models first
            return unavailable

    def _ask(self, method: str, request: Any) -> Any:
        """The first response of any server."""
        failure: TuwenError | None = None
        for endpoint in self._in_turn():
            try:
                response = response_of(self._servers[endpoint.number].ask(method, request))
            except TuwenError as error:
                self._note(endpoint, error)
                failure = error
            else:
                self._note(endpoint, None)
                return response
        assert failure is not None  # there is at least one endpoint
        raise failure

    def _is_healthy(self, endpoint: Endpoint, questions: Sequence[tuple[str, Any]]) -> bool:
        try:
            return all(response_of(self._servers[endpoint.number].ask(*one)).ready for one in questions)
        except TuwenError:
            return False


def _fly(flight: Flight[Any], source: Iterator[tuple[int, object]], ended: queue.SimpleQueue[Sent]) -> Iterator[Call]:
    """Settled calls from the front of the window, which is kept full."""
    window = flight.window
    is_exhausted = False
    while window or not is_exhausted:
        if window.has_result:
            yield window.pop()
            continue
        if window.has_room and not is_exhausted:
            index, item = next(source, (-1, _END))
            is_exhausted = item is _END
            if not is_exhausted:
                window.add(index, item, flight.packed(item), now())
        elif window:
            _wait(flight, ended)
        _send_due(flight)
        with contextlib.suppress(queue.Empty):
            while True:
                flight.take(ended.get_nowait())
        window.expire(now())


def _wait(flight: Flight[Any], ended: queue.SimpleQueue[Sent]) -> None:
    """Until a request ends, another is due, or one has taken too long."""
    with contextlib.suppress(queue.Empty):
        flight.take(ended.get(timeout=flight.window.wait_s(now())))


def _send_due(flight: Flight[Any]) -> None:
    while (attempt := flight.window.next_attempt(now())) is not None:
        if not flight.must_prepare(attempt) or flight.prepare(attempt):
            flight.send(attempt)
