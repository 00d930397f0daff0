"""Pictures -> the gallery that an app carries: their names and vectors in one safetensors file.

tuwen export gallery --checkpoint samples/emoji_tiny --images samples/emoji_cn/valid_imgs.tsv --out dist/gallery
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tuwen.embed import embed_images
from tuwen.errors import InvalidInput
from tuwen.files import atomic_path
from tuwen.fingerprint import model_fingerprint
from tuwen.model import ChineseCLIP

FILE_NAME = "gallery.safetensors"


def write_gallery(
    model: ChineseCLIP,
    names: Sequence[str],
    pictures: Iterable[bytes],
    out: Path,
    on_batch: Callable[[int], None] | None = None,
) -> Path:
    """Write `out`/gallery.safetensors: `image_embeds` float32 (N, D), and `names` and `fingerprint` as metadata.

    Args:
        pictures: the encoded files, one for each name; each is read when its turn comes.
        on_batch: hears how many are done.
    Raises:
        InvalidInput: no picture, or one that cannot be decoded, by name.
    """
    if not names:
        raise InvalidInput("no pictures, expected at least one")
    reading: list[str] = []

    def read() -> Iterator[bytes]:
        for name, picture in zip(names, pictures, strict=True):
            reading.append(name)
            yield picture

    try:
        embeds = embed_images(model, read(), on_batch=on_batch)
    except InvalidInput as error:
        raise InvalidInput(f"{reading[-1]}: {error}") from error
    metadata = {
        "names": json.dumps(list(names), ensure_ascii=False),
        "fingerprint": str(model_fingerprint(model.spec, model.state_dict())),
    }
    path = out / FILE_NAME
    with atomic_path(path) as temporary:
        save_file({"image_embeds": np.ascontiguousarray(embeds)}, temporary, metadata)
    return path
