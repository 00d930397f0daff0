"""The routes: page, JSON API, pictures and health."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from tuwen_web.guard import Guard
from tuwen_web.labels import choose
from tuwen_web.pages import DEFAULT_LIMIT, EXAMPLES, Asked, Pages, picture_address
from tuwen_web.refusals import Refusal
from tuwen_web.searcher import MAX_LIMIT, Found, Searcher
from tuwen_web.thumbnails import MEDIA_TYPE, Size, Thumbnails, etag_of, version_of
from tuwen_web.uploads import Uploads

_STATIC_DIR = Path(__file__).parent / "static"

# Of a picture: opened on its own it is a document that may do nothing.
_PICTURE_HEADERS = {"content-security-policy": "default-src 'none'; sandbox", "content-disposition": "inline"}
_FOR_GOOD = "private, max-age=31536000, immutable"
_ASK_AGAIN = "private, no-cache"


def make_app(searcher: Searcher, hosts: Collection[str] | None, examples: Sequence[str] = EXAMPLES) -> ASGIApp:
    """The whole site over one searcher.

    Args:
        hosts: names that a request may be addressed to; None for any.
    """
    site = _Site(searcher, Pages(searcher, examples))
    app = Starlette(
        routes=[
            Route("/", site.page, methods=["GET", "POST"]),
            Route("/api/search", site.search, methods=["GET", "POST"]),
            Route("/pictures/{index:int}", site.picture),
            Route("/healthz", site.health),
            Mount("/static", StaticFiles(directory=_STATIC_DIR)),
        ],
        exception_handlers={Refusal: _refused},
    )
    # Around all of it: Starlette's own answer to a bug is made outside of what is listed as middleware.
    return Guard(app, None if hosts is None else frozenset(hosts))


class _Site:
    def __init__(self, searcher: Searcher, pages: Pages) -> None:
        self._searcher, self._pages = searcher, pages
        self._uploads, self._thumbnails = Uploads(), Thumbnails()

    async def page(self, request: Request) -> Response:
        """GET: a form, and what it found; POST: what is like the picture in the body."""
        language = request.query_params.get("lang")
        labels = choose(language, request.headers.get("accept-language", ""))
        has_chosen, is_upload = language in ("zh", "en"), request.method == "POST"
        asked = Asked(labels, has_chosen, DEFAULT_LIMIT, is_upload=is_upload)
        try:
            similar = _number(request, "similar")
            limit = _limit(request)
            asked = Asked(labels, has_chosen, limit, _query(request), similar, is_upload)
            is_blank = not (asked.query or is_upload or similar is not None)
            found = None if is_blank else await self._find(request)
        except Refusal as refusal:
            html = self._pages.render(asked, None, refusal)
            return HTMLResponse(html, refusal.status, refusal.headers | {"cache-control": "no-store"})
        return HTMLResponse(self._pages.render(asked, found), headers={"cache-control": "no-store"})

    async def search(self, request: Request) -> Response:
        """The same as JSON."""
        return JSONResponse(self._as_json(await self._find(request)), headers={"cache-control": "no-store"})

    async def picture(self, request: Request) -> Response:
        """One of the collection, small or large."""
        index = request.path_params["index"]
        picture = self._searcher.picture(index)
        asked_size = request.query_params.get("size", "small")
        if asked_size not in ("small", "large"):
            raise Refusal("refused", f"size is {asked_size!r}, expected 'small' or 'large'")
        size: Size = "large" if asked_size == "large" else "small"
        is_current = request.query_params.get("v") == version_of(picture)
        headers = _PICTURE_HEADERS | {"cache-control": _FOR_GOOD if is_current else _ASK_AGAIN}
        etag = etag_of(picture, size)
        if etag in {one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")}:
            return Response(status_code=304, headers=headers | {"etag": etag})
        made = await self._thumbnails.get(picture, size)
        return Response(made.encoded, headers=headers | {"etag": made.etag}, media_type=MEDIA_TYPE)

    async def health(self, request: Request) -> Response:
        """200 where a search would be answered, else 503."""
        gallery, (done, total) = self._searcher.gallery, self._searcher.embedded
        is_ready = await self._searcher.is_ready()
        state: dict[str, Any] = {"ready": is_ready, "pictures": self._searcher.num_pictures}
        if gallery is not None:
            state |= {"searchable": len(gallery.indices), "model": gallery.model}
            state |= {"fingerprint": str(gallery.fingerprint)}
        if not is_ready:
            waiting = self._searcher.trouble or f"{done} of {total} vectors are there"
            state["reason"] = waiting if gallery is None else "the model server is not ready"
        return JSONResponse(state, 200 if is_ready else 503, {"cache-control": "no-store"})

    async def _find(self, request: Request) -> Found:
        limit = _limit(request)
        if request.method == "POST":
            async with self._uploads.picture(request) as encoded:
                return await self._searcher.search_image(encoded, limit)
        similar = _number(request, "similar")
        if similar is not None:
            return await self._searcher.search_similar(similar, limit)
        return await self._searcher.search_text(_query(request), limit)

    def _as_json(self, found: Found) -> dict[str, Any]:
        results = []
        for index, cosine in found.matches:
            picture = self._searcher.picture(index)
            address = picture_address(index, version_of(picture))
            results.append({"index": index, "name": picture.name, "cosine": round(cosine, 6), "picture": address})
        return {
            "model": found.model,
            # As text: it has 63 bits, and a number of JavaScript 53.
            "fingerprint": str(found.fingerprint),
            "results": results,
            "tags": [{"name": name, "cosine": round(cosine, 6)} for name, cosine in found.tags],
            "truncated": found.is_truncated,
            "embed_ms": None if found.embed_ms is None else round(found.embed_ms, 2),
            "rank_ms": round(found.rank_ms, 2),
        }


def _query(request: Request) -> str:
    return request.query_params.get("q", "").strip()


def _limit(request: Request) -> int:
    limit = _number(request, "limit")
    if limit is None:
        return DEFAULT_LIMIT
    if not 1 <= limit <= MAX_LIMIT:
        raise Refusal("refused", f"limit is {limit}, expected 1 to {MAX_LIMIT}")
    return limit


def _number(request: Request, name: str) -> int | None:
    """A whole number of the query string; None where it is not given."""
    text = request.query_params.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise Refusal("refused", f"{name} is {text[:20]!r}, expected a whole number")
    return int(text)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse({"error": error.sentence, "kind": error.kind}, error.status, error.headers)
