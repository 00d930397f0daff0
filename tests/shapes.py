"""Coloured shapes with Chinese captions, drawn on the fly: a set of pairs small enough to train on in a test."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from tuwen.data.pairs import ImageRecord, TextRecord, jsonl_path, tsv_path, write_images, write_texts
from tuwen.errors import InvalidInput

COLOURS = {"红": (220, 40, 40), "绿": (40, 170, 60), "蓝": (40, 70, 220), "黄": (240, 210, 40), "黑": (20, 20, 20)}
SHAPES = ("圆", "方块", "三角", "横条")
SIZE = 48


def draw_shape(colour: str, shape: str) -> bytes:
    """A PNG of one shape on white."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    draw, fill = ImageDraw.Draw(image), COLOURS[colour]
    if shape == "圆":
        draw.ellipse((8, 8, 40, 40), fill=fill)
    elif shape == "方块":
        draw.rectangle((10, 10, 38, 38), fill=fill)
    elif shape == "三角":
        draw.polygon([(24, 6), (42, 40), (6, 40)], fill=fill)
    else:
        draw.rectangle((2, 19, 46, 29), fill=fill)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class MemoryPairs:
    """A PairSet without files."""

    images: dict[int, bytes]
    texts: list[TextRecord]

    @property
    def image_ids(self) -> list[int]:
        return list(self.images)

    def image_bytes(self, image_id: int) -> bytes:
        if image_id not in self.images:
            raise InvalidInput(f"picture {image_id} is missing")
        return self.images[image_id]


def shape_pairs() -> MemoryPairs:
    """20 pictures with a caption of their own each (红圆), and one per colour that four of them share (红色)."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    images = {100 + index: draw_shape(*kind) for index, kind in enumerate(kinds)}
    texts = [TextRecord(index, colour + shape, (100 + index,)) for index, (colour, shape) in enumerate(kinds)]
    for index, colour in enumerate(COLOURS):
        shared = tuple(100 + position for position, kind in enumerate(kinds) if kind[0] == colour)
        texts.append(TextRecord(50 + index, f"{colour}色", shared))
    return MemoryPairs(images, texts)


def write_pairs(folder: Path, split: str, pairs: MemoryPairs) -> None:
    """Write a split as TSV and JSONL."""
    write_images(tsv_path(folder, split), (ImageRecord(*item) for item in pairs.images.items()))
    write_texts(jsonl_path(folder, split), pairs.texts)
