"""The gallery of an app against the checkpoint that made it, and pictures that are none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from builders.ios_gallery import write_gallery
from tests.shapes import draw_shape
from tuwen.checkpoint import load_checkpoint
from tuwen.embed import embed_images
from tuwen.errors import InvalidInput
from tuwen.fingerprint import model_fingerprint
from tuwen.model import ChineseCLIP

SAMPLE = Path(__file__).parents[2] / "samples" / "emoji_tiny"


@pytest.fixture(scope="module")
def model() -> ChineseCLIP:
    return load_checkpoint(SAMPLE)


def test_it_holds_the_vectors_the_names_and_the_model(model: ChineseCLIP, tmp_path: Path) -> None:
    pictures = [draw_shape("红", "圆"), draw_shape("蓝", "方块")]
    path = write_gallery(model, ["红圆", "蓝方块"], pictures, tmp_path)
    with safe_open(path, "numpy") as file:
        assert json.loads(file.metadata()["names"]) == ["红圆", "蓝方块"]
        assert file.metadata()["fingerprint"] == str(model_fingerprint(model.spec, model.state_dict()))
        embeds = file.get_tensor("image_embeds")
    np.testing.assert_allclose(embeds, embed_images(model, iter(pictures)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-5)


def test_a_picture_that_is_none_is_named_and_nothing_is_written(model: ChineseCLIP, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^b\.png: image is not a readable picture"):
        write_gallery(model, ["a.png", "b.png"], [draw_shape("红", "圆"), b"no picture"], tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InvalidInput, match="at least one"):
        write_gallery(model, [], [], tmp_path)
