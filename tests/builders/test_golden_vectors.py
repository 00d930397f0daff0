"""clients/golden/golden.json is what the code makes of its texts and pictures, and covers the hard cases."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

from builders.golden import (
    CHECKPOINT,
    GOLDEN_PATH,
    MIN_COSINE,
    RESOLUTIONS,
    describe_pixels,
    describe_text,
    embed_ids,
    embed_picture,
    write_golden,
)
from tests.test_image_transform import published_transform
from tuwen.checkpoint import load_checkpoint
from tuwen.fingerprint import model_fingerprint
from tuwen.image_transform import preprocess_image
from tuwen.model import ChineseCLIP

MAX_BYTES = 400_000


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN_PATH.read_text(encoding="ascii"))


@pytest.fixture(scope="module")
def model() -> ChineseCLIP:
    return load_checkpoint(CHECKPOINT)


def test_ids_are_what_the_tokenizer_gives(golden: dict[str, Any]) -> None:
    for entry in golden["texts"]:
        assert describe_text(entry["text"]) == {key: entry[key] for key in ("text", "input_ids", "truncated")}


def test_pixels_are_what_the_transform_gives(golden: dict[str, Any]) -> None:
    for entry in golden["pictures"]:
        for resolution in RESOLUTIONS:
            expected = entry["pixel_values"][str(resolution)]
            assert describe_pixels(base64.b64decode(entry["file"]), resolution) == expected, entry["name"]


def test_sampled_pixels_are_the_published_transforms(golden: dict[str, Any]) -> None:
    for entry in golden["pictures"]:
        for resolution in RESOLUTIONS:
            pixels = published_transform(base64.b64decode(entry["file"]), resolution).numpy()
            for *place, value in entry["pixel_values"][str(resolution)]["samples"]:
                assert abs(pixels[tuple(place)] - value) < golden["tolerance"]["pixel_values"]


def test_the_server_does_not_draft_any_of_the_pictures(golden: dict[str, Any]) -> None:
    """So that its pixels are those of the file, at each of the resolutions."""
    for entry in golden["pictures"]:
        encoded = base64.b64decode(entry["file"])
        for resolution in RESOLUTIONS:
            drafted = preprocess_image(encoded, resolution, draft=True)
            assert np.array_equal(drafted, preprocess_image(encoded, resolution)), entry["name"]


def test_embeddings_are_pytorchs(golden: dict[str, Any], model: ChineseCLIP) -> None:
    assert golden["model"]["fingerprint"] == str(model_fingerprint(model.spec, model.state_dict()))
    assert golden["tolerance"]["min_cosine"] == MIN_COSINE
    found = [(embed_ids(model, entry["input_ids"]), entry["text_embeds"]) for entry in golden["texts"]]
    found += [
        (embed_picture(model, base64.b64decode(entry["file"])), entry["image_embeds"]) for entry in golden["pictures"]
    ]
    for ours, written in found:
        assert len(written) == golden["model"]["embed_dim"]
        assert ours @ np.array(written) >= MIN_COSINE


def test_hard_cases_are_there_and_the_file_is_small(golden: dict[str, Any]) -> None:
    assert GOLDEN_PATH.stat().st_size < MAX_BYTES
    texts = "".join(entry["text"] for entry in golden["texts"])
    for hard in ("“", "Ａ", "😎", "\u200d", "\u3000", "\0", "\u202e", "𠀀", "İ", "臺", "\u0301"):
        assert hard in texts
    lengths = {len(entry["input_ids"]): entry["truncated"] for entry in golden["texts"]}
    assert max(lengths) == 52
    assert {entry["truncated"] for entry in golden["texts"] if len(entry["input_ids"]) == 52} == {True, False}
    assert len({entry["text"] for entry in golden["texts"]}) == len(golden["texts"]) >= 40
    assert len({entry["file"] for entry in golden["pictures"]}) == len(golden["pictures"]) >= 10


def test_the_command_writes_the_same_texts_and_ids(golden: dict[str, Any], tmp_path: Any) -> None:
    path = tmp_path / "golden.json"
    write_golden(path)
    again = json.loads(path.read_text())
    assert {key: again[key] for key in ("format", "model", "tolerance")} == {
        key: golden[key] for key in ("format", "model", "tolerance")
    }
    assert [entry["input_ids"] for entry in again["texts"]] == [entry["input_ids"] for entry in golden["texts"]]
    assert [entry["name"] for entry in again["pictures"]] == [entry["name"] for entry in golden["pictures"]]
