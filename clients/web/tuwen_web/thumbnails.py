"""A picture of the collection as the browser gets it: decoded here and encoded anew, so that nothing but pixels of the
file reaches the page."""

from __future__ import annotations

import asyncio
import io
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageOps
from tuwen_client.search import Picture

from tuwen_web.refusals import Refusal
from tuwen_web.store import picture_key

Size = Literal["small", "large"]

MEDIA_TYPE = "image/webp"

_LONGER_SIDE: dict[Size, int] = {"small": 360, "large": 1600}  # small: a tile at twice its size, for sharp displays
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # those the server embeds
MAX_PIXELS = 64 * 10**6  # its limit, too
_CACHE_BYTES = 64 << 20
_AT_A_TIME = 2  # decoding is the work of one processor each
_MAX_WAITING = 512  # a few pages of results at the largest limit


@dataclass(frozen=True)
class Thumbnail:
    """A WebP file, and what tells it from another."""

    encoded: bytes
    etag: str


class Thumbnails:
    """Makes them, few at a time, and keeps the last ones."""

    def __init__(self) -> None:
        # GIF and WebP decoders allocate as they open, after Pillow's own check, which allows twice this number.
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
        self._kept: OrderedDict[str, Thumbnail] = OrderedDict()
        self._kept_bytes = 0
        self._turn = asyncio.Semaphore(_AT_A_TIME)
        self._waiting = 0

    async def get(self, picture: Picture, size: Size) -> Thumbnail:
        """One of a picture.

        Raises:
            Refusal: it cannot be decoded, or too many wait for theirs.
        """
        etag = etag_of(picture, size)
        if etag in self._kept:
            self._kept.move_to_end(etag)
            return self._kept[etag]
        if self._waiting >= _MAX_WAITING:
            raise Refusal("busy", f"{_MAX_WAITING} pictures are being prepared, try again in a moment")
        self._waiting += 1
        try:
            async with self._turn:
                made = Thumbnail(await asyncio.to_thread(_encode, picture, _LONGER_SIDE[size]), etag)
        finally:
            self._waiting -= 1
        self._keep(made)
        return made

    def _keep(self, made: Thumbnail) -> None:
        if made.etag in self._kept:
            return
        self._kept[made.etag] = made
        self._kept_bytes += len(made.encoded)
        while self._kept_bytes > _CACHE_BYTES:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= len(dropped.encoded)


def version_of(picture: Picture) -> str:
    """In a picture's address, so that it may be cached for good: another once the file has changed."""
    return picture_key(picture).hex()[:12]


def etag_of(picture: Picture, size: Size) -> str:
    """HTTP's ETag, with its quotes."""
    return f'"{picture_key(picture).hex()}-{size}"'


def _encode(picture: Picture, longer_side: int) -> bytes:
    file = io.BytesIO(picture.source) if isinstance(picture.source, bytes) else picture.source
    out = io.BytesIO()
    try:
        with Image.open(file, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Refusal("not_found", f"{picture.name}: too large to be shown")
            opened.draft("RGB", (2 * longer_side, 2 * longer_side))  # a large JPEG is decoded at a fraction of its size
            if opened.mode.startswith("I;16"):  # Pillow would clip it, not scale it
                shown = opened.convert("I").point(lambda value: value / 256).convert("L")
            else:
                shown = ImageOps.exif_transpose(opened)
            shown = shown.convert("RGBA" if _has_alpha(shown) else "RGB")
        shown.thumbnail((longer_side, longer_side), Image.Resampling.LANCZOS)
        shown.save(out, "WEBP", quality=82, method=2)
    except Refusal:
        raise
    except Exception as error:  # a decoder may raise anything on a corrupt file
        raise Refusal("not_found", f"{picture.name}: cannot be shown: {error}") from error
    return out.getvalue()


def _has_alpha(picture: Image.Image) -> bool:
    return "A" in picture.getbands() or "transparency" in picture.info
