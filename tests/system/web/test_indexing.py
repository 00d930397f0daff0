"""What is embedded, what is kept, and when it is embedded again; on the real server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuwen_client import AsyncClient
from tuwen_client.search import Picture
from tuwen_web.gallery import Gallery, best_rows
from tuwen_web.indexing import Collection, ProgressHook, make_gallery
from tuwen_web.refusals import Refusal
from tuwen_web.searcher import Searcher
from tuwen_web.store import VectorStore

from tuwen.serving.server import EmbeddedServer

NAMES = ("墨镜", "电脑鼠标", "哭泣的猫")


@given(st.lists(st.integers(0, 4), min_size=0, max_size=30), st.integers(1, 40))
def test_best_rows_are_a_stable_sort(numbers: list[int], limit: int) -> None:
    """Ties in order of rows, at the limit as well."""
    scores = np.array(numbers, np.float32)
    expected = sorted(range(len(numbers)), key=lambda row: (-numbers[row], row))[:limit]
    assert best_rows(scores, limit) == [(row, numbers[row]) for row in expected]


@pytest.fixture
def url(sample_server: EmbeddedServer) -> str:
    return sample_server.endpoints.grpc


@pytest.fixture
def collection(emoji: dict[str, bytes], tmp_path: Path) -> Collection:
    """Three files, one of them broken, one twice as bytes; two names."""
    for name in NAMES:
        (tmp_path / name).write_bytes(emoji[name])
    files = [Picture(name, tmp_path / name) for name in NAMES]
    twice = [Picture("twice", emoji["墨镜"]), Picture("twice again", emoji["墨镜"])]
    return Collection([*files, Picture("broken", b"no picture"), *twice], ["猫", "墨镜"])


def index(url: str, collection: Collection, store: VectorStore) -> tuple[Gallery, tuple[int, int], list[str]]:
    """The gallery; how many vectors the store had, of how many; and what was refused."""
    progress: list[tuple[int, int]] = []
    refused: list[str] = []

    async def make() -> Gallery:
        async with AsyncClient(url) as client:
            return await make_gallery(
                client,
                collection,
                store,
                lambda done, total: progress.append((done, total)),
                lambda name, reason: refused.append(f"{name}: {reason[:32]}"),
            )

    gallery = asyncio.run(make())
    assert progress[-1][0] == progress[-1][1]
    return gallery, progress[0], refused


@pytest.mark.triton
def test_a_restart_embeds_only_what_is_new(url: str, collection: Collection, tmp_path: Path) -> None:
    """Refused pictures are tried again; a file that changed has another vector; the rest is bit for bit the same."""
    store = VectorStore(tmp_path / "cache" / "vectors.npz")
    first, before, refused = index(url, collection, store)
    assert before == (0, 7)  # equal bytes count once
    assert refused == ["broken: image is not a readable picture "]
    assert first.indices.tolist() == [0, 1, 2, 4, 5]
    assert np.array_equal(first.image_embeds[3], first.image_embeds[4])

    again, before, _ = index(url, collection, store)
    assert before == (6, 7)
    assert np.array_equal(again.image_embeds, first.image_embeds)
    assert np.array_equal(again.tag_embeds, first.tag_embeds)

    (tmp_path / NAMES[0]).write_bytes((tmp_path / NAMES[1]).read_bytes())
    changed, before, _ = index(url, collection, store)
    assert before == (5, 7)
    np.testing.assert_allclose(changed.image_embeds[0], first.image_embeds[1], atol=1e-5)  # batched differently
    assert [path.name for path in store.path.parent.iterdir()] == ["vectors.npz"]


@pytest.mark.triton
def test_vectors_of_another_model_are_not_used(url: str, collection: Collection, tmp_path: Path) -> None:
    store = VectorStore(tmp_path / "vectors.npz")
    gallery, _, _ = index(url, collection, store)
    kept = store.load(gallery.fingerprint)
    assert store.load(gallery.fingerprint + 1) == {}
    store.save(gallery.fingerprint + 1, {key: -vector for key, vector in kept.items()})
    again, before, _ = index(url, collection, store)
    assert before == (0, 7)
    np.testing.assert_allclose(again.image_embeds, gallery.image_embeds, atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "pickle", "shape"])
def test_a_damaged_store_is_told_and_ignored(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = VectorStore(tmp_path / "vectors.npz")
    store.save(7, {bytes(16): np.ones(4, np.float32)})
    assert list(store.load(7)) == [bytes(16)]
    whole = store.path.read_bytes()
    if damage == "pickle":
        np.savez(store.path, fingerprint=7, keys=np.array([object()]), vectors=np.ones((1, 4), np.float32))
    elif damage == "shape":
        np.savez(store.path, fingerprint=7, keys=np.zeros((2, 16), np.uint8), vectors=np.ones((1, 4), np.float32))
    else:
        store.path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"vectors", "empty": b""}[damage])
    assert store.load(7) == {}
    assert "all is embedded again" in caplog.text


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    VectorStore(tmp_path / "file" / "vectors.npz").save(7, {bytes(16): np.ones(4, np.float32)})
    assert "vectors cannot be kept: File exists" in caplog.text


def silent() -> AbstractContextManager[ProgressHook]:
    return nullcontext(lambda done, total: None)


@pytest.mark.triton
def test_a_model_that_changes_is_noticed_and_all_embedded_again(
    url: str, collection: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The client is made to have begun with another model: the server's answers are then what it would see."""
    caplog.set_level(logging.INFO)
    clients: list[AsyncClient] = []

    def make_client() -> AsyncClient:
        clients.append(AsyncClient(url))
        return clients[-1]

    async def change_model() -> None:
        searcher = Searcher(collection, make_client, VectorStore(tmp_path / "vectors.npz"), silent)
        with pytest.raises(Refusal, match="the pictures are being embedded, 0 of 0 so far"):
            await searcher.search_text("猫", 3)
        task = asyncio.create_task(searcher.keep_indexed())
        await until(lambda: searcher.gallery is not None)
        before = await searcher.search_text("哭泣的猫", 3)
        assert await searcher.is_ready()
        clients[0]._fingerprint = 1
        with pytest.raises(Refusal) as refused:
            await searcher.search_text("墨镜", 3)
        assert (refused.value.kind, refused.value.status) == ("not_ready", 503)
        assert not await searcher.is_ready()
        await until(lambda: len(clients) == 2 and caplog.text.count("ready: 5 pictures") == 2)
        after = await searcher.search_text("哭泣的猫", 3)
        assert after.matches == before.matches
        assert await searcher.is_ready()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(change_model())
    assert "the server's model is another now" in caplog.text


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)
