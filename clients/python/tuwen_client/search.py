"""Search pictures through the server, and draw what was found.

pictures = read_folder(Path("photos"))
matches = rank_pictures(client, ["戴墨镜的笑脸"], pictures, k=8)
contact_sheet(["戴墨镜的笑脸"], matches).save("sheet.png")
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tuwen_client.client import Client, InvalidHook, ProgressHook
from tuwen_client.errors import InvalidInput

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"})

# Text in a contact sheet: the common 3,755 ideographs and ASCII; its licence lies beside it.
FONT_PATH = Path(__file__).parent / "contact_sheet_font.woff2"

# Of a contact sheet, in pixels and colours.
_MARGIN, _GAP, _INSET, _TITLE_HEIGHT, _LABEL_HEIGHT, _ROW_GAP = 28, 14, 7, 44, 24, 26
_INK, _GREY, _RULE = "#1a1a1a", "#7a7a7a", "#e4e4e0"
_MIN_WIDTH = 480  # a query of some twenty ideographs fits above even a single match


@dataclass(frozen=True)
class Picture:
    """A name to show, and an encoded file or the path of one, which is read when it is needed."""

    name: str
    source: bytes | Path


@dataclass(frozen=True)
class Match:
    """A picture found, and its cosine similarity to the query."""

    picture: Picture
    cosine: float


def iter_image_files(folder: Path) -> Iterator[Path]:
    """Paths of the picture files below `folder`, known by their suffix, sorted.

    Raises:
        InvalidInput: there is no such folder.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder}: there is no such folder")
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    yield from sorted(paths)


def read_folder(folder: Path) -> list[Picture]:
    """Every picture file below `folder`, named by its path in there; none is read yet.

    Raises:
        InvalidInput: there is no such folder, or no picture in it.
    """
    pictures = [Picture(str(path.relative_to(folder)), path) for path in iter_image_files(folder)]
    if not pictures:
        raise InvalidInput(f"{folder}: no picture in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return pictures


def rank_pictures(
    client: Client,
    queries: Sequence[str],
    pictures: Sequence[Picture],
    k: int = 8,
    on_progress: ProgressHook | None = None,
    on_invalid: InvalidHook | None = None,
) -> list[list[Match]]:
    """The k best matches of each query, best first.

    Args:
        on_invalid: called with the error of each picture that cannot be embedded, which then matches nothing;
            without it the first one is raised.
    Raises:
        TuwenError: as `Client.embed_images`; its `item` is the picture's name.
    """
    if k < 1:
        raise InvalidInput(f"k is {k}, expected at least 1")

    def skip(error: InvalidInput) -> None:
        assert error.index is not None  # it is an item's
        error.item = pictures[error.index].name
        if on_invalid is None:
            raise error
        on_invalid(error)

    text_embeds = client.embed_text(queries)
    image_embeds = client.embed_images((picture.source for picture in pictures), on_progress, skip)
    usable = np.flatnonzero(~np.isnan(image_embeds[:, 0]))
    scores = text_embeds @ image_embeds[usable].T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [
        [Match(pictures[usable[position]], float(row[position])) for position in order]
        for row, order in zip(scores, best, strict=True)
    ]


def contact_sheet(
    queries: Sequence[str], matches: Sequence[Sequence[Match]], thumbnail: int = 96, font_path: Path = FONT_PATH
) -> Image.Image:
    """A picture of queries, one a row, with their matches, best first, and rank and cosine under each.

    Args:
        thumbnail: longer side of a picture, in pixels.
        font_path: a font that holds the queries' characters; the default knows the common Chinese ones and ASCII.
    Raises:
        InvalidInput: the font cannot be read, or a picture cannot be drawn.
    """
    title, label = _font(font_path, 24), _font(font_path, 14)
    columns = max((len(row) for row in matches), default=0)
    side = thumbnail + 2 * _INSET
    width = max(2 * _MARGIN + columns * (side + _GAP) - _GAP, _MIN_WIDTH)
    row_height = _TITLE_HEIGHT + side + _LABEL_HEIGHT + _ROW_GAP
    sheet = Image.new("RGB", (width, max(1, 2 * _MARGIN + len(queries) * row_height - _ROW_GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (query, found) in enumerate(zip(queries, matches, strict=True)):
        top = _MARGIN + row * row_height
        if row:
            draw.line([(_MARGIN, top - _ROW_GAP // 2), (width - _MARGIN, top - _ROW_GAP // 2)], fill=_RULE)
        draw.text((_MARGIN, top + 4), _shorten(query, title, width - 2 * _MARGIN), fill=_INK, font=title)
        for column, match in enumerate(found):
            left = _MARGIN + column * (side + _GAP)
            _draw_tile(sheet, match.picture, (left, top + _TITLE_HEIGHT), side)
            under = top + _TITLE_HEIGHT + side + 4
            draw.text((left, under), f"{column + 1}", fill=_INK, font=label)
            draw.text((left + side, under), f"{match.cosine:.3f}", fill=_GREY, font=label, anchor="ra")
    return sheet


def _draw_tile(sheet: Image.Image, picture: Picture, corner: tuple[int, int], side: int) -> None:
    """The picture, whole, in the middle of a square with a fine outline."""
    left, top = corner
    size = (side - 2 * _INSET, side - 2 * _INSET)
    shown = ImageOps.contain(_open(picture, side), size, Image.Resampling.LANCZOS)
    box = (left, top, left + side - 1, top + side - 1)
    ImageDraw.Draw(sheet).rounded_rectangle(box, radius=_INSET, fill="white", outline=_RULE)
    sheet.paste(shown, (left + (side - shown.width) // 2, top + (side - shown.height) // 2), shown)


def _open(picture: Picture, side: int) -> Image.Image:
    file = io.BytesIO(picture.source) if isinstance(picture.source, bytes) else picture.source
    try:
        with Image.open(file) as opened:
            opened.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
            return ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidInput(f"{picture.name}: cannot be drawn: {error}") from error


def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(str(path), size)
    except OSError as error:
        raise InvalidInput(f"{path}: not a font that can be read: {error}") from error


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text on one line, cut so that it fits."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
