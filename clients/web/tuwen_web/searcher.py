"""Queries to matches. Beside it, a task keeps the gallery: embeds it, waits for a server that is away, and embeds it
again when the server's model has become another."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from tuwen_client import AsyncClient, ModelChanged, TuwenError
from tuwen_client.search import Picture

from tuwen_web.gallery import Gallery, Rows
from tuwen_web.indexing import Collection, NothingToSearch, ProgressHook, make_gallery
from tuwen_web.refusals import Refusal, refusal_of
from tuwen_web.store import VectorStore

log = logging.getLogger(__name__)

MAX_QUERY_CHARACTERS = 256  # the model reads 52 tokens; a query is far from it
MAX_LIMIT = 192
# Searches under way at a time, those that wait in the server's queue included: a person does not wait for more.
MAX_SEARCHES = 64

_NUM_TAGS = 6
_TEXT_TIMEOUT_S = 5.0
_IMAGE_TIMEOUT_S = 15.0  # a picture at the limit of 64 million pixels takes seconds to decode
_READY_TIMEOUT_S = 3.0
_RETRY_INDEX_S = 3.0


@dataclass(frozen=True)
class Found:
    """An answer.

    Attributes:
        matches: index of a picture, and its cosine to the query, best first.
        tags: names that fit a picture best, with cosine; none for a text.
        is_truncated: whether the query was longer than the model reads.
        embed_ms: what the server took; None where the vector was there.
        rank_ms: what comparing it with every picture took.
    """

    model: str
    fingerprint: int
    matches: Sequence[tuple[int, float]]
    tags: Sequence[tuple[str, float]]
    is_truncated: bool
    embed_ms: float | None
    rank_ms: float


class Searcher:
    """Searches a collection through one server."""

    def __init__(
        self,
        collection: Collection,
        make_client: Callable[[], AsyncClient],
        store: VectorStore,
        progress: Callable[[], AbstractContextManager[ProgressHook]],
    ) -> None:
        """Nothing is sent before `keep_indexed` runs.

        Args:
            make_client: called for each try at embedding the collection: a client holds on to one model.
            progress: what shows each of them on the terminal.
        """
        self._collection, self._make_client, self._store, self._progress = collection, make_client, store, progress
        self._served: tuple[AsyncClient, Gallery] | None = None
        self._outdated = asyncio.Event()
        self._searches = 0
        self.embedded = (0, 0)  # vectors there are, and will be
        self.trouble = ""  # why there is no gallery yet

    # --- the gallery ----------------------------------------------------------------------------------------

    async def keep_indexed(self) -> None:
        """Until cancelled.

        Raises:
            NothingToSearch: not one picture can be embedded.
        """
        try:
            while True:
                self._outdated.clear()
                await self._index()
                await self._outdated.wait()
                log.warning("the server's model is another now: all is embedded again")
        finally:
            if self._served:
                await self._served[0].close()

    async def _index(self) -> None:
        while True:
            client = self._make_client()
            started_at = time.monotonic()
            try:
                with self._progress() as report:
                    gallery = await self._embed_all(client, report)
            except NothingToSearch:
                await client.close()
                raise
            except TuwenError as error:
                await client.close()
                if error.message != self.trouble:
                    log.warning("%s; trying again every %g s", error.message, _RETRY_INDEX_S)
                self.trouble = error.message
                await asyncio.sleep(_RETRY_INDEX_S)
                continue
            except asyncio.CancelledError:
                await client.close()
                raise
            before, self._served, self.trouble = self._served, (client, gallery), ""
            if before:
                await before[0].close()
            took_s = time.monotonic() - started_at
            log.info("ready: %d pictures, model %s, in %.1f s", len(gallery.indices), gallery.model, took_s)
            return

    async def _embed_all(self, client: AsyncClient, report: ProgressHook) -> Gallery:
        def on_progress(done: int, total: int) -> None:
            self.embedded = (done, total)
            report(done, total)

        def on_refused(name: str, reason: str) -> None:
            log.warning("skipped %s: %s", name, reason)

        return await make_gallery(client, self._collection, self._store, on_progress, on_refused)

    # --- queries --------------------------------------------------------------------------------------------

    @property
    def gallery(self) -> Gallery | None:
        """None until the collection is embedded."""
        return self._served[1] if self._served else None

    @property
    def num_pictures(self) -> int:
        """Of the collection, those included that were refused."""
        return len(self._collection.pictures)

    def picture(self, index: int) -> Picture:
        """One of the collection.

        Raises:
            Refusal: there is no such.
        """
        if not 0 <= index < self.num_pictures:
            raise Refusal("not_found", f"there is no picture {index}, they are numbered 0 to {self.num_pictures - 1}")
        return self._collection.pictures[index]

    async def is_ready(self) -> bool:
        """Whether a search would be answered now: the collection is embedded, and the server serves its model."""
        if self._served is None or self._outdated.is_set():
            return False
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                return await self._served[0].is_ready()
        except (TimeoutError, TuwenError):
            return False

    async def search_text(self, query: str, limit: int) -> Found:
        """The pictures that a phrase describes.

        Raises:
            Refusal: no search, and why.
        """
        if not query:
            raise Refusal("refused", "the query is empty")
        if len(query) > MAX_QUERY_CHARACTERS:
            raise Refusal("refused", f"the query has {len(query)} characters, the limit is {MAX_QUERY_CHARACTERS}")
        cut: list[int] = []
        with self._one_more():
            client, gallery = self._now()
            embedding = client.embed_text(
                [query], on_truncated=cut.append, timeout_s=_TEXT_TIMEOUT_S, priority="interactive"
            )
            vector, embed_ms = await self._timed(embedding)
            return await _ranked(gallery, vector, limit, embed_ms, num_tags=0, is_truncated=bool(cut))

    async def search_image(self, encoded: bytes, limit: int) -> Found:
        """The pictures that look like one, and the names that fit it.

        Raises:
            Refusal: no search, and why.
        """
        with self._one_more():
            client, gallery = self._now()
            embedding = client.embed_images([encoded], timeout_s=_IMAGE_TIMEOUT_S, priority="interactive")
            vector, embed_ms = await self._timed(embedding)
            return await _ranked(gallery, vector, limit, embed_ms, _NUM_TAGS)

    async def search_similar(self, index: int, limit: int) -> Found:
        """The pictures that look like one of the collection, itself first; the server is not asked.

        Raises:
            Refusal: no search, and why.
        """
        self.picture(index)
        with self._one_more():
            _, gallery = self._now()
            vector = gallery.vector_of(index)
            if vector is None:
                raise Refusal("not_found", f"picture {index} could not be embedded")
            return await _ranked(gallery, vector, limit, None, _NUM_TAGS)

    def _now(self) -> tuple[AsyncClient, Gallery]:
        if self._served is None:
            done, total = self.embedded
            raise Refusal("not_ready", self.trouble or f"the pictures are being embedded, {done} of {total} so far")
        return self._served

    async def _timed(self, embedding: Awaitable[Rows]) -> tuple[Rows, float]:
        started_at = time.perf_counter()
        try:
            (vector,) = await embedding
        except TuwenError as error:
            if isinstance(error, ModelChanged):
                self._outdated.set()
            raise refusal_of(error) from error
        return vector, (time.perf_counter() - started_at) * 1000

    @contextmanager
    def _one_more(self) -> Iterator[None]:
        if self._searches >= MAX_SEARCHES:
            raise Refusal("busy", f"{MAX_SEARCHES} searches are under way, try again in a moment")
        self._searches += 1
        try:
            yield
        finally:
            self._searches -= 1


async def _ranked(
    gallery: Gallery, vector: Rows, limit: int, embed_ms: float | None, num_tags: int, is_truncated: bool = False
) -> Found:
    """In a thread: it takes longer the more pictures there are, and others are answered meanwhile."""
    started_at = time.perf_counter()
    matches = await asyncio.to_thread(gallery.nearest, vector, limit)
    tags = gallery.nearest_tags(vector, num_tags) if num_tags else []
    rank_ms = (time.perf_counter() - started_at) * 1000
    return Found(gallery.model, gallery.fingerprint, matches, tags, is_truncated, embed_ms, rank_ms)
