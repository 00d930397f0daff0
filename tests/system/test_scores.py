"""The similarity and zero-shot models on the real server: their numbers are PyTorch's, their refusals are sentences."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException
from typer.testing import CliRunner

from tests.system.conftest import SAMPLE_DATA
from tuwen.cli import app
from tuwen.data.pairs import PairSet
from tuwen.image_transform import preprocess_image
from tuwen.model import ChineseCLIP
from tuwen.scoring import Calibration, Classifier, average_prompts, fill_templates, load_calibration, softmax
from tuwen.serving.server import EmbeddedServer
from tuwen.tokenizer import default_tokenizer, normalize_text, pad_rows

pytestmark = pytest.mark.triton

LABELS = ["墨镜", "生日蛋糕", "时钟"]


@pytest.fixture
def raw(sample_server: EmbeddedServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(sample_server.endpoints.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def pictures(sample_pairs: PairSet) -> list[bytes]:
    return [sample_pairs.image_bytes(one) for one in list(sample_pairs.image_ids)[:3]]


def ask(raw: triton.InferenceServerClient, model: str, **inputs: list[bytes] | list[str]) -> triton.InferResult:
    tensors = []
    for name, values in inputs.items():
        array = np.array([value.encode() if isinstance(value, str) else value for value in values], np.object_)
        tensors.append(triton.InferInput(name, list(array.shape), "BYTES").set_data_from_numpy(array))
    return raw.infer(model, tensors, client_timeout=60)


@torch.inference_mode()
def expected(model: ChineseCLIP, pictures: list[bytes], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """image_embeds and text_embeds of PyTorch."""
    pixel_values = torch.from_numpy(np.stack([preprocess_image(one, model.spec.vision.resolution) for one in pictures]))
    ids = pad_rows([default_tokenizer().encode_ids(normalize_text(text)) for text in texts], 52)
    text_embeds = model.encode_text(torch.from_numpy(ids), normalize=True)
    return model.encode_image(pixel_values, normalize=True).numpy(), text_embeds.numpy()


def test_similarity_equals_pytorch(
    raw: triton.InferenceServerClient, sample_model: ChineseCLIP, pictures: list[bytes]
) -> None:
    answer = ask(raw, "tiny_rn_similarity", images=pictures, texts=LABELS)
    image_embeds, text_embeds = expected(sample_model, pictures, LABELS)
    logits = np.exp(sample_model.logit_scale.item()) * image_embeds @ text_embeds.T
    assert answer.as_numpy("cosine") == pytest.approx(image_embeds @ text_embeds.T, abs=1e-5)
    assert answer.as_numpy("logits_per_image") == pytest.approx(logits, abs=1e-3)  # a scale of about 50 of 1e-5
    assert answer.as_numpy("probs") == pytest.approx(softmax(logits), abs=1e-3)
    assert answer.as_numpy("relevance") is None


def test_zero_shot_averages_its_prompts(
    raw: triton.InferenceServerClient, sample_model: ChineseCLIP, pictures: list[bytes]
) -> None:
    templates = ["{}", "{}的照片"]
    answer = ask(raw, "tiny_rn_zero_shot", images=pictures, labels=LABELS, templates=templates)
    image_embeds, text_embeds = expected(sample_model, pictures, fill_templates(LABELS, templates))
    classifier = average_prompts(text_embeds, len(LABELS))
    logits = np.exp(sample_model.logit_scale.item()) * image_embeds @ classifier.T
    assert answer.as_numpy("probs") == pytest.approx(softmax(logits), abs=1e-3)
    assert [label.decode() for label in answer.as_numpy("labels")] == LABELS


@pytest.fixture
def fingerprint(raw: triton.InferenceServerClient) -> int:
    return int(ask(raw, "tiny_rn_similarity", images=[one_pixel()], texts=["猫"]).as_numpy("fingerprint")[0])


def one_pixel() -> bytes:
    return b"P6 1 1 255 \xff\x00\x00"


def test_a_stored_classifier_is_served_and_replaced_while_it_is(
    raw: triton.InferenceServerClient,
    sample_repository: Path,
    sample_model: ChineseCLIP,
    pictures: list[bytes],
    fingerprint: int,
) -> None:
    path = sample_repository / "tiny_rn_zero_shot" / "classifiers" / "things.safetensors"
    for labels in (LABELS, LABELS[::-1]):
        image_embeds, text_embeds = expected(sample_model, pictures, labels)
        Classifier(tuple(labels), text_embeds, fingerprint, ()).save(path)
        answer = ask(raw, "tiny_rn_zero_shot", images=pictures, classifier=["things"])
        assert [label.decode() for label in answer.as_numpy("labels")] == labels
        logits = np.exp(sample_model.logit_scale.item()) * image_embeds @ text_embeds.T
        assert answer.as_numpy("logits_per_image") == pytest.approx(logits, abs=1e-3)
    Classifier(tuple(LABELS), text_embeds, fingerprint + 1, ()).save(path)
    with pytest.raises(InferenceServerException, match=f"was made with model {fingerprint + 1}"):
        ask(raw, "tiny_rn_zero_shot", images=pictures, classifier=["things"])
    path.write_bytes(os.urandom(100))
    with pytest.raises(InferenceServerException, match="classifier things cannot be read"):
        ask(raw, "tiny_rn_zero_shot", images=pictures, classifier=["things"])


def test_a_calibration_tells_relevance_and_no_match(
    raw: triton.InferenceServerClient, sample_repository: Path, pictures: list[bytes], fingerprint: int
) -> None:
    plain = ask(raw, "tiny_rn_similarity", images=pictures, texts=LABELS).as_numpy("cosine")
    low, high = sorted(plain.max(axis=1))[:2]
    middle = float(low + high) / 2
    calibration = Calibration(30.0, -30.0 * middle, 0.5, fingerprint, 100, 0.9, 0.1)
    calibration.save(sample_repository / "tiny_rn_similarity" / "calibration" / "emoji.json")
    for model, texts in (("tiny_rn_similarity", "texts"), ("tiny_rn_zero_shot", "labels")):
        answer = ask(raw, model, images=pictures, calibration=["emoji"], **{texts: LABELS})
        assert answer.as_numpy("relevance") == pytest.approx(calibration.relevance(plain), abs=1e-3)
        assert answer.as_numpy("no_match").tolist() == (plain.max(axis=1) < middle).tolist()


@pytest.mark.parametrize(
    ("model", "inputs", "sentence"),
    [
        ("similarity", {"images": [b"no picture"], "texts": ["猫"]}, "image 0: "),
        ("similarity", {"images": [one_pixel()], "texts": ["猫", ""]}, "text 1: "),
        ("similarity", {"images": [one_pixel()] * 65, "texts": ["猫"]}, "65 images, expected 1 to 64"),
        ("similarity", {"images": [one_pixel()], "texts": []}, "0 texts"),
        ("similarity", {"images": [one_pixel()], "texts": ["猫"], "calibration": ["../x"]}, "no calibration '../x'"),
        ("zero_shot", {"images": [one_pixel()]}, "either labels or the name of a classifier"),
        ("zero_shot", {"images": [one_pixel()], "labels": ["猫"], "classifier": ["a"]}, "either labels or"),
        ("zero_shot", {"images": [one_pixel()], "classifier": ["../../etc/passwd"]}, "no classifier"),
        ("zero_shot", {"images": [one_pixel()], "labels": ["猫", "猫"]}, "is there twice"),
        ("zero_shot", {"images": [one_pixel()], "labels": ["猫"], "templates": ["图"]}, "needs one {}"),
        ("zero_shot", {"images": [one_pixel()], "labels": [b"\xff"]}, "not UTF-8"),
    ],
)
def test_a_bad_request_gets_a_sentence(
    raw: triton.InferenceServerClient, model: str, inputs: dict[str, list[bytes]], sentence: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask(raw, f"tiny_rn_{model}", **inputs)
    assert sentence in caught.value.message()
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert "Traceback" not in caught.value.message()


def test_commands_store_a_classifier_and_a_calibration(
    sample_server: EmbeddedServer,
    sample_repository: Path,
    raw: triton.InferenceServerClient,
    pictures: list[bytes],
    tmp_path: Path,
) -> None:
    (tmp_path / "objects.txt").write_text("墨镜\n生日蛋糕\n\n时钟\n", encoding="utf-8")
    where = ["--url", sample_server.endpoints.grpc, "--repository", str(sample_repository)]
    for arguments in (
        ["classifier", "build", str(tmp_path / "objects.txt")],
        ["calibrate", "--data", str(SAMPLE_DATA), "--domain", "stickers"],
    ):
        done = CliRunner().invoke(app, [*arguments, *where])
        assert done.exit_code == 0, done.output
    answer = ask(raw, "tiny_rn_zero_shot", images=pictures, classifier=["objects"], calibration=["stickers"])
    assert [label.decode() for label in answer.as_numpy("labels")] == LABELS
    assert answer.as_numpy("probs").sum(axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    calibration = load_calibration(sample_repository / "tiny_rn_similarity" / "calibration" / "stickers.json")
    assert calibration.true_match_rate > 0.8
    assert calibration.false_match_rate < 0.2
