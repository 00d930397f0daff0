"""A picture in the body of a request, read no further than it may be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from tuwen_web.refusals import Refusal

MAX_UPLOAD_BYTES = 16 << 20  # a camera's JPEG; the server takes twice that
MAX_UPLOADS = 8  # at a time: 128 MiB in all
_TIMEOUT_S = 30.0


class Uploads:
    """A bounded number of pictures in memory at a time."""

    def __init__(self) -> None:
        self._under_way = 0

    @asynccontextmanager
    async def picture(self, request: Request) -> AsyncIterator[bytes]:
        """The body, which counts until the block ends.

        Raises:
            Refusal: it is larger than may be, too slow, or there is none; or there are too many already.
        """
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > MAX_UPLOAD_BYTES:
            raise _too_large()
        if self._under_way >= MAX_UPLOADS:
            raise Refusal("busy", f"{MAX_UPLOADS} pictures are being searched, try again in a moment")
        self._under_way += 1
        try:
            yield await _in_time(request)
        finally:
            self._under_way -= 1


async def _in_time(request: Request) -> bytes:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return await _read(request)
    except TimeoutError:
        raise Refusal("too_slow", f"the picture took more than {_TIMEOUT_S:g} s to arrive") from None
    except ClientDisconnect:
        raise Refusal("refused", "the connection closed before the picture was there") from None


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_UPLOAD_BYTES:
            raise _too_large()
    if not body:
        raise Refusal("refused", "there is no picture in the request")
    return bytes(body)


def _too_large() -> Refusal:
    return Refusal("too_large", f"the picture is larger than {MAX_UPLOAD_BYTES >> 20} MiB, the limit")
