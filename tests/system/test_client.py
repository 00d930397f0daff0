"""Both twins of the client on the real server: equal rows, several servers, overload, TLS, traces, other models."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tuwen_client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    RetryPolicy,
    ServerUnavailable,
    Tls,
    TuwenError,
)

from tests.system.conftest import some_ports
from tuwen.data.pairs import PairSet
from tuwen.serving import access
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton

# The order of a batch's sums is all that may differ between two runs.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def texts(sample_pairs: PairSet) -> list[str]:
    return [record.text for record in sample_pairs.texts[:300]]


@pytest.fixture(scope="module")
def files(sample_pairs: PairSet) -> list[bytes]:
    return [sample_pairs.image_bytes(image_id) for image_id in sample_pairs.image_ids[:100]]


async def slowly(items: list[Any]) -> AsyncIterator[Any]:
    for item in items:
        await asyncio.sleep(0)
        yield item


# --- the twins ------------------------------------------------------------------------------------------------------


def test_both_twins_give_equal_rows(
    client: Client, texts: list[str], files: list[bytes], sample_pairs: PairSet, tmp_path: Path
) -> None:
    path = tmp_path / "picture.webp"
    path.write_bytes(files[0])

    async def run() -> None:
        async with AsyncClient(client.url) as twin:
            assert await twin.is_ready()
            assert await twin.models() == client.models()
            assert (await twin.model(), await twin.embed_dim()) == (client.model, client.embed_dim)
            heard: list[int] = []
            rows, images = await asyncio.gather(twin.embed_text(texts, heard.append), twin.embed_images(files))
            assert heard == list(range(1, len(texts) + 1))
            assert np.allclose(rows, client.embed_text(texts), atol=TOLERANCE)
            assert np.allclose(images, client.embed_images(files), atol=TOLERANCE)
            assert np.allclose(await twin.embed_text(slowly(texts)), rows, atol=TOLERANCE)
            assert np.allclose(await twin.embed_images(slowly([path, str(path)])), images[0], atol=TOLERANCE)
            assert (await twin.embed_text([])).shape == (0, client.embed_dim)
            assert await twin.fingerprint() == client.fingerprint
            scores = await twin.similarity(files[:2], texts[:3])
            assert np.allclose(scores, client.similarity(files[:2], texts[:3]), atol=TOLERANCE)

    asyncio.run(run())


def test_an_endless_async_input_is_taken_as_it_is_needed(client: Client) -> None:
    asked = 0

    async def endless() -> AsyncIterator[str]:
        nonlocal asked
        for number in count():
            asked += 1
            yield f"第{number}个"

    async def run() -> None:
        async with AsyncClient(client.url, max_in_flight=16) as twin:
            taken = 0
            async for row in twin.iter_embed_text(endless()):
                assert row.shape == (client.embed_dim,)
                taken += 1
                assert asked <= taken + 16
                if taken == 200:
                    break
            assert (await twin.embed_text(["猫"])).shape == (1, client.embed_dim)

    asyncio.run(run())


def test_rows_that_are_ready_do_not_wait_for_a_slow_input(client: Client) -> None:
    async def run() -> None:
        more = asyncio.Event()

        async def two() -> AsyncIterator[str]:
            yield "一"
            await more.wait()
            yield "二"

        async with AsyncClient(client.url) as twin:
            rows = aiter(twin.iter_embed_text(two()))
            await asyncio.wait_for(anext(rows), 10)
            more.set()
            assert (await anext(rows)).shape == (client.embed_dim,)
            with pytest.raises(StopAsyncIteration):
                await anext(rows)

    asyncio.run(run())


def test_the_async_twin_raises_the_same_errors(client: Client) -> None:
    async def broken() -> AsyncIterator[str]:
        yield "猫"
        raise OSError("the disk is gone")

    async def run() -> None:
        async with AsyncClient(client.url) as twin:
            with pytest.raises(InvalidInput, match="item 40: text is empty") as raised:
                await twin.embed_text(["猫"] * 40 + [" "] + ["狗"] * 40)
            assert set(range(40)) <= set(raised.value.done)
            refused: list[InvalidInput] = []
            rows = await twin.embed_images([b"no picture", "no/such/file.png"], on_invalid=refused.append)
            assert np.isnan(rows).all()
            assert [error.index for error in refused] == [0, 1]
            with pytest.raises(OSError, match="the disk is gone"):
                await twin.embed_text(broken())
            with pytest.raises(InvalidInput, match="expected a list"):
                await twin.embed_text("猫")
        with pytest.raises(TuwenError, match="is closed; make a new one"):
            await twin.embed_text(["猫"])
        async with AsyncClient(client.url, model="vit_z") as other:
            with pytest.raises(ModelNotFound, match="serves tiny_rn"):
                await other.embed_text(["猫"])

    asyncio.run(run())


def test_a_cancelled_task_leaves_the_client_usable(client: Client, texts: list[str]) -> None:
    async def run() -> None:
        async with AsyncClient(client.url) as twin:
            task = asyncio.create_task(twin.embed_text(count_up()))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert np.allclose(await twin.embed_text(texts[:9]), client.embed_text(texts[:9]), atol=TOLERANCE)

    def count_up() -> Any:
        return (f"第{number}个" for number in count())

    asyncio.run(run())


def test_threads_share_a_client(client: Client, texts: list[str]) -> None:
    expected = client.embed_text(texts)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: client.embed_text(texts[start::8]), range(8)))
    assert all(np.allclose(part, expected[start::8], atol=TOLERANCE) for start, part in enumerate(parts))


def test_event_loops_share_an_async_client(client: Client, texts: list[str]) -> None:
    expected = client.embed_text(texts)
    twin = AsyncClient(client.url)

    async def embed(start: int) -> np.ndarray:
        return await twin.embed_text(slowly(texts[start::4]))

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda start: asyncio.run(embed(start)), range(4)))
    asyncio.run(twin.close())
    assert all(np.allclose(part, expected[start::4], atol=TOLERANCE) for start, part in enumerate(parts))


def test_gzip_and_headers_change_no_row(client: Client, texts: list[str]) -> None:
    with Client(client.url, compression="gzip", headers={"Authorization": "Bearer x"}) as zipped:
        assert np.allclose(zipped.embed_text(texts[:50]), client.embed_text(texts[:50]), atol=TOLERANCE)


def test_a_text_that_is_cut_is_told(client: Client) -> None:
    cut: list[int] = []
    texts = ["猫", "猫" * 60, "狗", "狗" * 50, "狗" * 51]
    client.embed_text(texts)  # so that the server has them in its cache
    client.embed_text(texts, on_truncated=cut.append)
    assert cut == [1, 4]  # 52 tokens, [CLS] and [SEP] among them


# --- the other models -----------------------------------------------------------------------------------------------


def test_scores_and_classes_agree_with_embeddings(client: Client, files: list[bytes]) -> None:
    labels = ["墨镜", "生日蛋糕", "时钟"]
    cosine = client.similarity(files, labels)
    scores = client.score(files, labels)  # two requests: 64 images and 36
    assert np.allclose(scores.cosine, cosine, atol=TOLERANCE)
    assert np.allclose(scores.probs.sum(axis=1), 1, atol=TOLERANCE)
    assert scores.relevance is None
    classes = client.classify(files, labels, templates=["{}"])
    assert classes.labels == tuple(labels)
    assert classes.best == [labels[column] for column in cosine.argmax(axis=1)]

    async def run() -> None:
        async with AsyncClient(client.url) as twin:
            assert np.allclose((await twin.score(files, labels)).probs, scores.probs, atol=1e-4)
            assert (await twin.classify(files[:5], labels, templates=["{}"])).best == classes.best[:5]

    asyncio.run(run())


def test_an_image_that_cannot_be_scored_is_named(client: Client, files: list[bytes]) -> None:
    with pytest.raises(InvalidInput, match="item 70: image is not a readable picture") as raised:
        client.score([*files[:70], b"no picture"], ["猫"])
    assert raised.value.index == 70
    with pytest.raises(InvalidInput, match="item 1: no/such: No such file"):
        client.classify([files[0], "no/such"], ["猫"])
    with pytest.raises(InvalidInput, match=r"^text 1: text is empty"):
        client.score(files[:1], ["猫", ""])
    with pytest.raises(InvalidInput, match="no calibration 'nowhere'"):
        client.score(files[:1], ["猫"], calibration="nowhere")


# --- several servers, overload --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_orderly", [False, True])
def test_one_of_two_servers_goes_and_every_row_arrives(
    is_orderly: bool, sample_server: EmbeddedServer, sample_repository: Path, client: Client
) -> None:
    gone = threading.Event()
    sent: list[str] = []

    def until_gone_and_more() -> Iterator[str]:
        after = 0
        while after < 200:
            sent.append(f"第{len(sent)}张图")
            yield sent[-1]
            after += gone.is_set()

    with some_ports().serve(sample_repository) as doomed:

        def end() -> None:
            if is_orderly:
                doomed.stop()
            else:
                assert doomed.pid is not None
                os.kill(doomed.pid, signal.SIGKILL)
            gone.set()

        with Client([doomed.endpoints.grpc, sample_server.endpoints.grpc]) as both:
            rows = []
            for row in both.iter_embed_text(until_gone_and_more()):
                rows.append(row)
                if len(rows) == 300:
                    threading.Thread(target=end).start()
            assert both._endpoints.all[0].failures, "it was used, and found gone"
            assert both.is_ready()
            assert both.models() == ["tiny_rn"]
    assert len(rows) == len(sent)
    assert np.allclose(rows, client.embed_text(sent), atol=TOLERANCE)


def test_the_only_server_that_stops_is_unavailable(sample_repository: Path) -> None:
    """It unloads its models first, which is no reason to say that it does not know them."""
    with some_ports().serve(sample_repository) as server, Client(server.endpoints.grpc) as client:

        def stop(done: int) -> None:
            if done == 300:
                threading.Thread(target=server.stop).start()

        with pytest.raises(ServerUnavailable) as raised:
            client.embed_text((f"第{number}个" for number in count()), on_progress=stop)
        assert len(raised.value.done) >= 300


@pytest.fixture(scope="module")
def narrow_repository(sample_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text tower's queue for interactive requests holds one."""
    repository = tmp_path_factory.mktemp("narrow") / "repository"
    shutil.copytree(sample_repository, repository)
    config = repository / "tiny_rn_text_tower" / "config.pbtxt"
    text, changes = re.subn(r'string_value: "64"', 'string_value: "1"', config.read_text(encoding="utf-8"))
    assert changes == 1
    config.write_text(text, encoding="utf-8")
    return repository


@pytest.fixture(scope="module")
def narrow_server(narrow_repository: Path) -> Iterator[EmbeddedServer]:
    with some_ports().serve(narrow_repository) as server:
        yield server


def test_a_full_queue_is_typed_and_patience_gets_through(
    narrow_server: EmbeddedServer, client: Client, texts: list[str]
) -> None:
    """Which also shows that priority reaches the queue: bulk has room for all. No text twice: answers are cached."""
    distinct = [f"{position} {text}" for position, text in enumerate(texts)]
    bulk, hasty_texts, patient_texts = distinct[:100], distinct[100:200], distinct[200:280]
    url = narrow_server.endpoints.grpc
    with Client(url, retry=RetryPolicy.off()) as hasty:
        assert np.allclose(hasty.embed_text(bulk), client.embed_text(bulk), atol=TOLERANCE)
        with pytest.raises(Overloaded, match="Exceeds maximum queue size"):
            hasty.embed_text(hasty_texts, priority="interactive")
    patience = RetryPolicy(attempts=200, first_delay_s=0.01, max_delay_s=0.05)
    with Client(url, max_in_flight=16, retry=patience, priority="interactive") as patient:
        expected = client.embed_text(patient_texts)
        assert np.allclose(patient.embed_text(patient_texts), expected, atol=TOLERANCE)


def test_a_deadline_of_one_call_is_its_own(narrow_server: EmbeddedServer) -> None:
    with Client(narrow_server.endpoints.grpc) as client:
        client.embed_text(["猫"])
        assert narrow_server.pid is not None
        os.kill(narrow_server.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded, match=r"timeout_s is 0\.5"):
                client.embed_text(["猫"], timeout_s=0.5)
            with pytest.raises(DeadlineExceeded, match=r"timeout_s is 0\.25"):
                asyncio.run(_embed_hastily(client.url))
            assert time.monotonic() - started < 10
        finally:
            os.kill(narrow_server.pid, signal.SIGCONT)
        assert client.embed_text(["猫"]).shape == (1, client.embed_dim)


async def _embed_hastily(url: str) -> None:
    async with AsyncClient(url, model="tiny_rn") as twin:
        await twin.embed_text(["猫"], timeout_s=0.25)


def test_closing_a_client_ends_what_another_thread_embeds(sample_server: EmbeddedServer) -> None:
    one = Client(sample_server.endpoints.grpc)

    def close(done: int) -> None:
        if done == 100:
            threading.Thread(target=one.close).start()

    with pytest.raises(TuwenError, match="is closed; make a new one"):
        one.embed_text((f"第{number}个" for number in count()), on_progress=close)


# --- TLS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_mutual", [False, True])
def test_tls_and_mutual_tls(is_mutual: bool, certificates: Path, sample_repository: Path, client: Client) -> None:
    ports, folder = some_ports(), certificates
    served = access.Tls(folder / "server.pem", folder / "server.key", folder / "ca.pem" if is_mutual else None)
    known = Tls(folder / "ca.pem", folder / "client.pem", folder / "client.key")
    nameless = Tls(folder / "ca.pem")
    with EmbeddedServer(
        sample_repository, grpc_port=ports.grpc, http_port=ports.http, metrics_port=ports.metrics, tls=served
    ) as server:
        url = server.endpoints.grpc
        for tls in (known,) if is_mutual else (nameless, known):
            with Client(url, tls=tls) as one:
                assert np.allclose(one.embed_text(["猫"]), client.embed_text(["猫"]), atol=TOLERANCE)
        for stranger in (None, Tls(folder / "other.pem"), *([nameless] if is_mutual else [])):
            with Client(url, "tiny_rn", tls=stranger, retry=RetryPolicy.off()) as one:
                assert not one.is_ready()
                with pytest.raises(ServerUnavailable, match="no server answers"):
                    one.embed_text(["猫"])


# --- traces ---------------------------------------------------------------------------------------------------------


def test_a_span_covers_each_call_and_its_context_is_sent(
    client: Client, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    sent: list[tuple[tuple[str, str], ...]] = []
    server = client._servers[0]
    infer = server.infer
    monkeypatch.setattr(server, "infer", lambda *args: (sent.append(args[2]), infer(*args))[1])
    with provider.get_tracer("test").start_as_current_span("request") as outer:
        client.embed_text(texts[:3])
        with pytest.raises(InvalidInput):
            list(client.iter_embed_text(["猫", ""]))
    good, bad, _ = exporter.get_finished_spans()
    assert (good.name, bad.name) == ("tuwen_client.embed_text", "tuwen_client.iter_embed_text")
    assert good.parent.span_id == bad.parent.span_id == outer.get_span_context().span_id
    assert good.attributes["tuwen.model"] == "tiny_rn"
    assert bad.status.status_code is trace.StatusCode.ERROR
    assert len(sent) == 5
    for headers, span in zip(sent, [good] * 3 + [bad] * 2, strict=True):
        assert f"{span.context.trace_id:032x}-{span.context.span_id:016x}" in dict(headers)["traceparent"]
