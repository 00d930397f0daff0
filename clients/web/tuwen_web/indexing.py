"""Pictures and names to a gallery of vectors, through the server; what the store has already is not embedded again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from tuwen_client import AsyncClient, InvalidInput
from tuwen_client.search import Picture

from tuwen_web.gallery import Gallery, Rows
from tuwen_web.store import VectorStore, picture_key, text_key

Item = TypeVar("Item")

_SAVE_EVERY_S = 30.0  # a kill loses little more than this
_SAVE_SHARE = 0.05  # of the time, where writing a large file takes longer

ProgressHook = Callable[[int, int], None]
RefusedHook = Callable[[str, str], None]


class NothingToSearch(InvalidInput):
    """Not one of the pictures can be embedded."""


@dataclass(frozen=True)
class Collection:
    """What is to be searched.

    Attributes:
        pictures: each known by its position.
        tags: names that a picture can be given, none twice; may be empty.
    """

    pictures: Sequence[Picture]
    tags: Sequence[str]


@dataclass
class _Kept:
    """Vectors by key, and when they were last written."""

    store: VectorStore
    fingerprint: int
    vectors: dict[bytes, Rows]
    saved_at: float
    num_new: int = 0
    pause_s: float = _SAVE_EVERY_S

    async def add(self, key: bytes, row: Rows) -> None:
        self.vectors[key] = row
        self.num_new += 1
        if time.monotonic() - self.saved_at > self.pause_s:
            await self.save()

    async def save(self) -> None:
        if self.num_new:
            began_at = time.monotonic()
            await asyncio.to_thread(self.store.save, self.fingerprint, dict(self.vectors))
            self.pause_s = max(_SAVE_EVERY_S, (time.monotonic() - began_at) / _SAVE_SHARE)
        self.saved_at = time.monotonic()


async def make_gallery(
    client: AsyncClient,
    collection: Collection,
    store: VectorStore,
    on_progress: ProgressHook,
    on_refused: RefusedHook,
) -> Gallery:
    """Embed what the store lacks, and keep it there, also when an error ends this half-way.

    Args:
        on_progress: hears how many vectors there are, and how many there will be.
        on_refused: hears the name of each picture or tag that cannot be embedded, and why; it is left out.
    Raises:
        NothingToSearch: that was every picture.
        TuwenError: as `AsyncClient.embed_images`.
    """
    fingerprint = await client.fingerprint()
    image_keys = await asyncio.to_thread(lambda: [picture_key(picture) for picture in collection.pictures])
    tag_keys = [text_key(tag) for tag in collection.tags]
    stored = await asyncio.to_thread(store.load, fingerprint)
    vectors = {key: stored[key] for key in (*image_keys, *tag_keys) if key in stored}  # what is gone is forgotten
    kept = _Kept(store, fingerprint, vectors, time.monotonic())

    total = len({*image_keys, *tag_keys})
    on_progress(len(vectors), total)
    done = len(vectors)

    async def keep(rows: AsyncIterator[Rows], keys: Sequence[bytes]) -> None:
        nonlocal done
        position = 0
        async for row in rows:
            if not np.isnan(row[0]):
                await kept.add(keys[position], row)
            position, done = position + 1, done + 1
            on_progress(done, total)

    def refuse(names: Sequence[str]) -> Callable[[InvalidInput], None]:
        def tell(error: InvalidInput) -> None:
            assert error.index is not None  # it is an item's
            on_refused(names[error.index], error.message)

        return tell

    try:
        pictures = _missing(image_keys, collection.pictures, vectors)
        sources = (picture.source for picture in pictures.values())
        refused = refuse([picture.name for picture in pictures.values()])
        async with contextlib.aclosing(client.iter_embed_images(sources, refused)) as rows:  # type: ignore[type-var]
            await keep(rows, list(pictures))
        tags = _missing(tag_keys, collection.tags, vectors)
        async with contextlib.aclosing(client.iter_embed_text(tags.values(), refuse([*tags.values()]))) as rows:  # type: ignore[type-var]
            await keep(rows, list(tags))
    finally:
        await kept.save()
    return _assemble(await client.model(), fingerprint, collection, image_keys, tag_keys, vectors)


def _missing(keys: Sequence[bytes], items: Sequence[Item], vectors: dict[bytes, Rows]) -> dict[bytes, Item]:
    """Items without a vector, by key: of equal ones the first."""
    found: dict[bytes, Item] = {}
    for key, item in zip(keys, items, strict=True):
        if key not in vectors:
            found.setdefault(key, item)
    return found


def _assemble(
    model: str,
    fingerprint: int,
    collection: Collection,
    image_keys: Sequence[bytes],
    tag_keys: Sequence[bytes],
    vectors: dict[bytes, Rows],
) -> Gallery:
    indices = [index for index, key in enumerate(image_keys) if key in vectors]
    if not indices:
        raise NothingToSearch(f"none of the {len(image_keys)} pictures can be embedded")
    image_embeds = np.stack([vectors[image_keys[index]] for index in indices])
    tagged = [number for number, key in enumerate(tag_keys) if key in vectors]
    tag_embeds = np.array([vectors[tag_keys[number]] for number in tagged], np.float32)
    return Gallery(
        model,
        fingerprint,
        np.array(indices, np.int64),
        image_embeds,
        [collection.tags[number] for number in tagged],
        tag_embeds.reshape(len(tagged), image_embeds.shape[1]),
    )
