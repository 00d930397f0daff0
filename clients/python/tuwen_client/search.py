"""Search a folder of pictures through the server, and draw what was found."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tuwen_client.client import Client, ProgressHook
from tuwen_client.errors import InvalidInput

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

# Text in a contact sheet: the common 3,755 ideographs and ASCII; see NOTICE for the font's licence.
FONT_PATH = Path(__file__).parent / "contact_sheet_font.woff2"


@dataclass(frozen=True)
class Picture:
    """A name to show and an encoded file."""

    name: str
    encoded: bytes


@dataclass(frozen=True)
class Match:
    """A picture found, and its cosine similarity to the query."""

    picture: Picture
    cosine: float


def read_folder(folder: Path) -> list[Picture]:
    """Every picture file below `folder`, by path.

    Raises:
        InvalidInput: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder}: there is no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise InvalidInput(f"{folder}: no picture in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [Picture(str(path.relative_to(folder)), path.read_bytes()) for path in paths]


def rank_pictures(
    client: Client,
    queries: Sequence[str],
    pictures: Sequence[Picture],
    k: int = 8,
    on_progress: ProgressHook | None = None,
) -> list[list[Match]]:
    """The k best matches of each query, best first."""
    image_embeds = client.embed_images((picture.encoded for picture in pictures), on_progress)
    scores = client.embed_text(queries) @ image_embeds.T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [
        [Match(pictures[index], float(row[index])) for index in order] for row, order in zip(scores, best, strict=True)
    ]


def contact_sheet(queries: Sequence[str], matches: Sequence[Sequence[Match]], thumbnail: int = 96) -> Image.Image:
    """A picture of queries, one a row, with their matches and cosines beneath."""
    title, small = _font(22), _font(13)
    gap, label, heading = 14, 22, 40
    columns = max(map(len, matches), default=1)
    width = gap + columns * (thumbnail + gap)
    row_height = heading + thumbnail + label + gap
    sheet = Image.new("RGB", (width, gap + len(queries) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (query, found) in enumerate(zip(queries, matches, strict=True)):
        top = gap + row * row_height
        draw.text((gap, top), query, fill="#1a1a1a", font=title)
        for column, match in enumerate(found):
            left = gap + column * (thumbnail + gap)
            _paste(sheet, match.picture.encoded, (left, top + heading), thumbnail)
            draw.text((left, top + heading + thumbnail + 3), f"{match.cosine:.2f}", fill="#777777", font=small)
    return sheet


def _paste(sheet: Image.Image, encoded: bytes, corner: tuple[int, int], size: int) -> None:
    picture = Image.open(io.BytesIO(encoded)).convert("RGBA")
    scale = size / max(picture.size)
    shown = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    left, top = corner[0] + (size - shown.width) // 2, corner[1] + (size - shown.height) // 2
    sheet.paste(shown, (left, top), shown)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONT_PATH), size)
