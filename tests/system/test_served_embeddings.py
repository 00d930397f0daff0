"""What the server answers is what the checkpoint computes."""

from __future__ import annotations

import io
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from PIL import Image
from tuwen_client import Client, ModelNotFound

from builders.repository import REPOSITORY_DIR
from perf.http_requests import HttpRequests, closed_loop, text_request
from tuwen.data.pairs import PairSet
from tuwen.embed import embed_images, embed_texts
from tuwen.fingerprint import model_fingerprint
from tuwen.model import ChineseCLIP
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton

# The bound the project asks of a served embedding; fp32 towers differ by the order of their sums alone.
MIN_COSINE = 0.9999


def cosines(served: np.ndarray, expected: np.ndarray) -> np.ndarray:
    assert served.shape == expected.shape
    assert served.dtype == np.float32
    assert np.allclose(np.linalg.norm(served, axis=1), 1, atol=1e-5)
    return (served * expected).sum(axis=1)


def test_100_served_images_equal_pytorch(client: Client, sample_model: ChineseCLIP, sample_pairs: PairSet) -> None:
    files = [sample_pairs.image_bytes(image_id) for image_id in sample_pairs.image_ids[:1500:15]]
    assert len(files) == 100
    assert cosines(client.embed_images(files), embed_images(sample_model, iter(files))).min() >= MIN_COSINE


def test_100_served_texts_equal_pytorch(client: Client, sample_model: ChineseCLIP, sample_pairs: PairSet) -> None:
    texts = [record.text for record in sample_pairs.texts[:5400:60]]
    # Every length bucket, upper case and curly quotes: the server normalises as training does.
    texts += ["猫" * size for size in (1, 6, 7, 10, 14, 22, 30, 50, 60)] + ["SOON “箭头”"]
    assert len(texts) == 100
    assert cosines(client.embed_text(texts), embed_texts(sample_model, texts)).min() >= MIN_COSINE


def test_the_measurements_send_texts_that_are_embedded(client: Client, sample_server: EmbeddedServer) -> None:
    texts = ["一只猫", "戴墨镜的笑脸"]
    http: HttpRequests[int] = HttpRequests(sample_server.endpoints.http_address)
    responses = closed_loop(http, [text_request(f"{client.model}_text", text) for text in texts], 2)
    http.close()
    rows = np.stack([np.frombuffer(each.body[each.json_size :], np.float32) for each in responses])
    assert np.allclose(rows, client.embed_text(texts), atol=1e-5)


def test_order_is_kept_over_a_thousand_items(client: Client, sample_pairs: PairSet) -> None:
    texts = [record.text for record in sample_pairs.texts[:1000]]
    together = client.embed_text(texts)
    for index in (0, 1, 499, 998, 999):
        assert np.allclose(together[index], client.embed_text([texts[index]])[0], atol=1e-5)


def test_paths_bytes_pictures_and_arrays_of_one_image_agree(
    client: Client, sample_pairs: PairSet, tmp_path: Path
) -> None:
    encoded = sample_pairs.image_bytes(sample_pairs.image_ids[7])
    path = tmp_path / "picture.webp"
    path.write_bytes(encoded)
    picture = Image.open(io.BytesIO(encoded))
    rows = client.embed_images([path, str(path), encoded, picture, np.array(picture)])
    assert np.allclose(rows, rows[0], atol=1e-6)


def test_an_endless_input_is_taken_as_it_is_needed(client: Client) -> None:
    asked = 0

    def endless():
        nonlocal asked
        for number in count():
            asked += 1
            yield f"第{number}个"

    rows = list(islice(client.iter_embed_text(endless()), 300))
    assert len(rows) == 300
    assert asked <= 300 + client.max_in_flight


def test_no_items_give_no_rows(client: Client, sample_model: ChineseCLIP) -> None:
    assert client.embed_text([]).shape == (0, sample_model.spec.embed_dim)
    assert client.embed_images([]).shape == (0, sample_model.spec.embed_dim)


def test_similarity_is_the_cosine_of_every_pair(client: Client, sample_pairs: PairSet) -> None:
    files = [sample_pairs.image_bytes(image_id) for image_id in sample_pairs.image_ids[:3]]
    scores = client.similarity(files, ["脸", "旗"])
    assert scores.shape == (3, 2)
    assert np.allclose(scores, client.embed_images(files) @ client.embed_text(["脸", "旗"]).T, atol=1e-5)


def test_the_fingerprint_travels_with_the_model(client: Client, sample_model: ChineseCLIP) -> None:
    assert client.fingerprint == model_fingerprint(sample_model.spec, sample_model.state_dict())


def test_progress_is_told(client: Client) -> None:
    heard: list[int] = []
    client.embed_text(["一", "二", "三"], on_progress=heard.append)
    assert heard == [1, 2, 3]


def test_the_only_model_is_found_and_an_unknown_one_is_met_with_a_list(sample_server: EmbeddedServer) -> None:
    with Client(sample_server.endpoints.grpc) as one:
        assert one.model == "tiny_rn"
    with Client(sample_server.endpoints.grpc, model="vit_z") as other, pytest.raises(ModelNotFound, match="tiny_rn"):
        other.embed_text(["猫"])


def test_the_server_runs_the_committed_config(sample_server: EmbeddedServer, sample_repository: Path) -> None:
    committed = (REPOSITORY_DIR / "tiny_rn_text_tower" / "config.pbtxt").read_text(encoding="utf-8")
    assert (sample_repository / "tiny_rn_text_tower" / "config.pbtxt").read_text(encoding="utf-8") == committed
    with triton.InferenceServerClient(sample_server.endpoints.grpc) as raw:
        config = raw.get_model_config("tiny_rn_text_tower").config
    assert config.backend == "onnxruntime"
    assert config.max_batch_size == 32
    assert config.HasField("dynamic_batching")
    assert [group.count for group in config.instance_group] == [1]
