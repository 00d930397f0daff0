"""The asyncio twin of `Client`: the same items, rows, options and errors, awaited.

async with AsyncClient("localhost:8001") as client:
    rows = await client.embed_text(["戴墨镜的笑脸"])
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from tritonclient.grpc import service_pb2

from tuwen_client.answers import CHUNKS_IN_FLIGHT, Classes, Scores, blame_image, chunks, classes_job, join, scores_job
from tuwen_client.async_flight import Items, Source, ended, fly
from tuwen_client.calls import Call
from tuwen_client.core import (
    Asked,
    Core,
    InvalidHook,
    ProgressHook,
    Sent,
    TruncatedHook,
    add_finished,
    embed_dim_of,
    missing_row,
    names_of_pairs,
    tell_truncated,
)
from tuwen_client.endpoints import Endpoint
from tuwen_client.errors import InvalidInput, ModelNotFound, TuwenError
from tuwen_client.images import ImageLike
from tuwen_client.options import Priority
from tuwen_client.sides import IMAGE, TEXT, Embedded, Job, Row, many_images, many_texts
from tuwen_client.tracing import client_span
from tuwen_client.transport import response_of

Answer = TypeVar("Answer")


class AsyncClient(Core):
    """Embeds Chinese text and images through a Tuwen server, for asyncio. Event loops may share one.

    Items may come from an async iterable as well; a plain one is read in the event loop. What `Client` has as
    properties is awaited here: `await client.model()`, `embed_dim()`, `fingerprint()`.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections, and give back shared memory; safe a second time."""
        await asyncio.to_thread(self._close)

    # --- what is served -------------------------------------------------------------------------------------

    async def is_ready(self) -> bool:
        """Whether a server answers and serves both sides of the model."""
        try:
            questions = self._health_questions(await self.model())
            for endpoint in self._in_turn():
                if await self._is_healthy(endpoint, questions):
                    return True
        except TuwenError:
            return False
        return False

    async def models(self) -> list[str]:
        """As `Client.models`."""
        return names_of_pairs(await self._ask("ModelStatistics", service_pb2.ModelStatisticsRequest()))

    async def model(self) -> str:
        """As `Client.model`."""
        return self._model or self._only_model(await self.models())

    async def embed_dim(self) -> int:
        """As `Client.embed_dim`."""
        if self._embed_dim is None:
            request = service_pb2.ModelMetadataRequest(name=f"{await self.model()}_text")
            try:
                self._embed_dim = embed_dim_of(await self._ask("ModelMetadata", request))
            except ModelNotFound as error:
                raise await self._with_served_models(error) from error
        return self._embed_dim

    async def fingerprint(self) -> int:
        """As `Client.fingerprint`."""
        if self._fingerprint is None:
            await self.embed_text(["图"])
        assert self._fingerprint is not None  # every answer carries one
        return self._fingerprint

    # --- embedding ------------------------------------------------------------------------------------------

    async def embed_text(
        self,
        texts: Items[str],
        on_progress: ProgressHook | None = None,
        on_invalid: InvalidHook | None = None,
        *,
        on_truncated: TruncatedHook | None = None,
        timeout_s: float | None = None,
        priority: Priority | None = None,
    ) -> Row:
        """text_embeds float32 (N, D); args and errors as `Client.embed_text`."""
        asked = self._asked(timeout_s, priority)
        return await self._collect(self._text_rows("embed_text", texts, asked, on_invalid, on_truncated), on_progress)

    async def embed_images(
        self,
        images: Items[ImageLike],
        on_progress: ProgressHook | None = None,
        on_invalid: InvalidHook | None = None,
        *,
        timeout_s: float | None = None,
        priority: Priority | None = None,
    ) -> Row:
        """image_embeds float32 (N, D); args and errors as `Client.embed_images`.

        Files are read, and pictures encoded, in a thread of their own.
        """
        asked = self._asked(timeout_s, priority)
        return await self._collect(self._image_rows("embed_images", images, asked, on_invalid), on_progress)

    def iter_embed_text(
        self,
        texts: Items[str],
        on_invalid: InvalidHook | None = None,
        *,
        on_truncated: TruncatedHook | None = None,
        timeout_s: float | None = None,
        priority: Priority | None = None,
    ) -> AsyncIterator[Row]:
        """One float32 (D,) per text, in order, in constant memory; as `Client.iter_embed_text`."""
        return self._text_rows("iter_embed_text", texts, self._asked(timeout_s, priority), on_invalid, on_truncated)

    def iter_embed_images(
        self,
        images: Items[ImageLike],
        on_invalid: InvalidHook | None = None,
        *,
        timeout_s: float | None = None,
        priority: Priority | None = None,
    ) -> AsyncIterator[Row]:
        """One float32 (D,) per image, in order, in constant memory; as `Client.iter_embed_images`."""
        return self._image_rows("iter_embed_images", images, self._asked(timeout_s, priority), on_invalid)

    async def similarity(self, images: Items[ImageLike], texts: Items[str]) -> Row:
        """Cosine similarity float32 (N_images, N_texts)."""
        return (await self.embed_images(images)) @ (await self.embed_text(texts)).T

    # --- the other served models ----------------------------------------------------------------------------

    async def score(
        self,
        images: Iterable[ImageLike],
        texts: Iterable[str],
        *,
        calibration: str | None = None,
        timeout_s: float | None = None,
        priority: Priority | None = None,
    ) -> Scores:
        """How well each image fits each text; as `Client.score`."""
        job = scores_job(texts, calibration)
        return await self._judged("score", images, job, self._asked(timeout_s, priority, CHUNKS_IN_FLIGHT))

    async def classify(
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
        """Which label each image shows; as `Client.classify`."""
        job = classes_job(labels, classifier, templates, calibration)
        return await self._judged("classify", images, job, self._asked(timeout_s, priority, CHUNKS_IN_FLIGHT))

    # --- requests -------------------------------------------------------------------------------------------

    def _text_rows(
        self,
        operation: str,
        texts: Items[str],
        asked: Asked,
        on_invalid: InvalidHook | None,
        on_truncated: TruncatedHook | None,
    ) -> AsyncGenerator[Row]:
        items: Any = texts if isinstance(texts, AsyncIterable) else many_texts(texts)
        return self._rows(operation, items, TEXT, asked, on_invalid, on_truncated)

    def _image_rows(
        self, operation: str, images: Items[ImageLike], asked: Asked, on_invalid: InvalidHook | None
    ) -> AsyncGenerator[Row]:
        items: Any = images if isinstance(images, AsyncIterable) else many_images(images)
        return self._rows(operation, items, IMAGE, asked, on_invalid)

    async def _collect(self, rows: AsyncGenerator[Row], on_progress: ProgressHook | None) -> Row:
        finished: list[Row] = []
        try:
            async with contextlib.aclosing(rows):
                async for row in rows:
                    finished.append(row)
                    if on_progress:
                        on_progress(len(finished))
        except TuwenError as error:
            add_finished(error, finished)
            raise
        return np.stack(finished) if finished else np.zeros((0, await self.embed_dim()), np.float32)

    async def _rows(
        self,
        operation: str,
        items: Items[object],
        job: Job[Embedded],
        asked: Asked,
        on_invalid: InvalidHook | None,
        on_truncated: TruncatedHook | None = None,
    ) -> AsyncGenerator[Row]:
        async with contextlib.aclosing(self._settled(operation, items, job, asked, on_invalid)) as calls:
            async for call in calls:
                if call.error is not None:
                    yield missing_row(await self.embed_dim())
                    continue
                if on_truncated:
                    tell_truncated(call, on_truncated)
                yield call.answer.row

    async def _judged(self, operation: str, images: Iterable[ImageLike], job: Job[Answer], asked: Asked) -> Any:
        try:
            async with contextlib.aclosing(self._settled(operation, chunks(images), job, asked, None)) as calls:
                return join([call.answer async for call in calls])
        except InvalidInput as error:
            raise blame_image(error) from error.__cause__

    async def _settled(
        self,
        operation: str,
        items: Items[object],
        job: Job[Answer],
        asked: Asked,
        on_invalid: InvalidHook | None,
    ) -> AsyncGenerator[Call]:
        """Calls in order, each with its answer, or with the error that on_invalid was called with."""
        self._check_open()
        model = await self.model()
        events: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(sent: Sent) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(events.put_nowait, sent)

        with client_span(operation, model, self.url) as headers:
            flight = self._flight(job, model, deliver, headers, asked)
            source = Source(items, job, events)
            try:
                async with contextlib.aclosing(fly(flight, source, events)) as calls:
                    async for call in calls:
                        if call.error is not None:
                            await self._tell(flight.failure(call), on_invalid)
                        yield call
            finally:  # on an error, or when the caller stops iterating
                source.cancel()

    async def _tell(self, error: TuwenError, on_invalid: InvalidHook | None) -> None:
        if isinstance(error, ModelNotFound):
            error = await self._with_served_models(error)
        if on_invalid is None or not isinstance(error, InvalidInput):
            raise error
        on_invalid(error)

    async def _with_served_models(self, error: ModelNotFound) -> TuwenError:
        try:
            return self._with_served(error, await self.models())
        except TuwenError as unavailable:  # a server on its way out unloads its models first
            return unavailable

    async def _ask(self, method: str, request: Any) -> Any:
        """The first response of any server."""
        failure: TuwenError | None = None
        for endpoint in self._in_turn():
            try:
                response = response_of(await ended(self._servers[endpoint.number].ask(method, request)))
            except TuwenError as error:
                self._note(endpoint, error)
                failure = error
            else:
                self._note(endpoint, None)
                return response
        assert failure is not None  # there is at least one endpoint
        raise failure

    async def _is_healthy(self, endpoint: Endpoint, questions: Sequence[tuple[str, Any]]) -> bool:
        try:
            answers = [await ended(self._servers[endpoint.number].ask(*one)) for one in questions]
            return all(response_of(answer).ready for answer in answers)
        except TuwenError:
            return False
