"""What the measurements send: queries as long as a shop's are, and photographs."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tuwen.data.pairs import open_pairs
from tuwen.errors import MissingDependency

# The photographs inside the wheels of scikit-image and scikit-learn.
PHOTOGRAPHS = (
    "coffee.png",
    "astronaut.png",
    "chelsea.png",
    "hubble_deep_field.jpg",
    "rocket.jpg",
    "motorcycle_left.png",
)
MAX_CHARACTERS = 50  # with [CLS] and [SEP] the 52 tokens of Chinese-CLIP
MEDIAN_CHARACTERS, SPREAD = 6.0, 0.55  # of a log-normal: mean 7 characters, one in a hundred above 21


def muge_like_texts(
    count: int,
    seed: int = 0,
    median_characters: float = MEDIAN_CHARACTERS,
    spread: float = SPREAD,
    max_characters: int = MAX_CHARACTERS,
) -> list[str]:
    """Chinese queries, lengths in characters as MUGE's: mean about 7, a tail to 50; the words are Emoji-CN's.

    Args:
        median_characters, spread: of the log-normal the lengths are drawn from.
        max_characters: longer ones are cut to it.
    """
    random = np.random.default_rng(seed)
    captions = [record.text for record in open_pairs(Path(__file__).parents[1] / "samples" / "emoji_cn", "valid").texts]
    lengths = np.exp(random.normal(np.log(median_characters), spread, count))
    texts = []
    for length in np.clip(np.round(lengths), 1, max_characters).astype(int):
        text = ""
        while len(text) < length:
            text += captions[random.integers(len(captions))]
        texts.append(text[:length])
    return texts


def photographs() -> Iterator[tuple[str, Image.Image]]:
    """Name and RGB picture of each.

    Raises:
        MissingDependency: scikit-image or scikit-learn, whose files they are, is not installed.
    """
    for name in PHOTOGRAPHS:
        yield name, Image.open(_folder_of("skimage") / "data" / name).convert("RGB")
    for name in ("china.jpg", "flower.jpg"):
        yield name, Image.open(_folder_of("sklearn") / "datasets" / "images" / name).convert("RGB")


def _folder_of(package: str) -> Path:
    """Found without importing it, which takes more packages than its files do."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency(f"the photographs of {package} are not installed: pip install 'tuwen[bench]'")
    return Path(spec.submodule_search_locations[0])


def encode_jpeg(image: Image.Image, size: tuple[int, int], subsampling: int = 2) -> bytes:
    """The picture at this width and height as a JPEG of quality 90."""
    file = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90, subsampling=subsampling)
    return file.getvalue()
