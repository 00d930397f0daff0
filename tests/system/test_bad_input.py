"""Each bad item gets its own sentence; 50 good ones beside it get their embeddings."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tritonclient.grpc as triton
from PIL import Image
from tritonclient.utils import InferenceServerException
from tuwen_client import Client, InvalidInput

from tests.test_image_transform import png_header
from tuwen.data.pairs import PairSet
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton


def truncated_jpeg() -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()[:5000]


def text_input(value: bytes) -> triton.InferInput:
    return triton.InferInput("text", [1, 1], "BYTES").set_data_from_numpy(np.array([[value]], dtype=np.object_))


def image_input(value: bytes) -> triton.InferInput:
    data = np.frombuffer(value, np.uint8)[None]
    return triton.InferInput("image", list(data.shape), "UINT8").set_data_from_numpy(data)


def wrong_dtype() -> triton.InferInput:
    return triton.InferInput("text", [1, 1], "INT64").set_data_from_numpy(np.zeros((1, 1), np.int64))


def wrong_shape() -> triton.InferInput:
    texts = np.array([["一", "二"]], dtype=np.object_)
    return triton.InferInput("text", [1, 2], "BYTES").set_data_from_numpy(texts)


def wrong_image_dtype() -> triton.InferInput:
    return triton.InferInput("image", [1, 4], "FP32").set_data_from_numpy(np.zeros((1, 4), np.float32))


BAD = {
    "garbage bytes": ("image", image_input(b"no picture at all"), "not a readable picture file"),
    "truncated jpeg": ("image", image_input(truncated_jpeg()), "cannot be decoded: .*truncated"),
    "png bomb": ("image", image_input(png_header(20_000, 20_000)), "pixels, the limit"),
    "empty text": ("text", text_input(b""), "text is empty"),
    "10,000 characters": ("text", text_input("猫".encode() * 10_000), "text has 10000 characters, the limit is"),
    "invalid UTF-8": ("text", text_input(b"\xe7\x8c\xff"), "text is not valid UTF-8"),
    "wrong dtype": ("text", wrong_dtype(), "TYPE_STRING|BYTES"),
    "wrong shape": ("text", wrong_shape(), r"unexpected shape|\[-1,1\]"),
    "wrong image dtype": ("image", wrong_image_dtype(), "UINT8"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_bad_request_fails_alone_with_its_sentence(
    name: str, sample_server: EmbeddedServer, client: Client, sample_pairs: PairSet
) -> None:
    side, bad, sentence = BAD[name]
    goods = (
        [sample_pairs.image_bytes(image_id) for image_id in sample_pairs.image_ids[:50]]
        if side == "image"
        else [record.text for record in sample_pairs.texts[:50]]
    )
    embed = client.embed_images if side == "image" else client.embed_text
    expected = embed(goods)
    outcomes: list[InferenceServerException | triton.InferResult] = []
    with triton.InferenceServerClient(sample_server.endpoints.grpc) as raw:
        # The bad request is in the middle of the good ones, so that it shares batches with them.
        def slip_in(done: int) -> None:
            if done in (1, 10, 20):
                raw.async_infer(
                    f"tiny_rn_{side}", [bad], callback=lambda result, error: outcomes.append(error or result)
                )

        rows = embed(goods, on_progress=slip_in)
        with pytest.raises(InferenceServerException, match=sentence) as raised:
            raw.infer(f"tiny_rn_{side}", [bad])
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert "/" not in raised.value.message(), "no path of the server in a message"
    assert np.allclose(rows, expected, atol=1e-5)
    assert len(outcomes) == 3
    assert all(isinstance(outcome, InferenceServerException) for outcome in outcomes)


@pytest.mark.parametrize("priority", ["x", -1, 2**40, True])
def test_an_odd_priority_is_bulk_and_harms_nobody(
    priority: object, sample_server: EmbeddedServer, client: Client
) -> None:
    with triton.InferenceServerClient(sample_server.endpoints.grpc) as raw:
        text = text_input(f"优先级{priority}".encode())
        answer = raw.infer("tiny_rn_text", [text], parameters={"queue_priority": priority})
    assert np.allclose(answer.as_numpy("text_embeds"), client.embed_text([f"优先级{priority}"]), atol=1e-5)


def test_the_client_names_the_item_and_keeps_what_was_done(client: Client) -> None:
    texts = ["猫"] * 40 + [" "] + ["狗"] * 40
    with pytest.raises(InvalidInput, match="item 40: text is empty") as raised:
        client.embed_text(texts)
    assert raised.value.index == 40
    assert set(range(40)) <= set(raised.value.done)
    assert 40 not in raised.value.done
    assert np.allclose(raised.value.partial[3], client.embed_text(["猫"])[0], atol=1e-5)
    assert client.embed_text(["猫"]).shape == (1, client.embed_dim)


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        ("no/such/file.png", r"no/such/file\.png: No such file"),
        (b"", "image is empty"),
        (np.zeros((4, 4), np.float32), r"array is float32 \(4, 4\), expected uint8"),
        (object(), "a object is no image"),
    ],
)
def test_what_is_no_image_is_refused_before_it_is_sent(client: Client, item: object, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=f"item 0: {sentence}"):
        client.embed_images([item])  # type: ignore[list-item]


def test_one_string_is_not_a_list_of_texts(client: Client) -> None:
    with pytest.raises(InvalidInput, match="expected a list"):
        client.embed_text("猫")
