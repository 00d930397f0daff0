"""What can be held without a GPU: there is no engine then, and the profile names every input of the exported towers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from builders.onnx_export import INPUT_NAMES
from builders.towers import TOWERS
from perf.tensorrt_tower import MAX_BATCH, open_tensorrt, profile_shapes
from tuwen.specs import SPECS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_engine() -> None:
    assert open_tensorrt(Path("not-read.onnx"), SPECS["ViT-B-16"]) == {}


@pytest.mark.parametrize("architecture", sorted(SPECS))
def test_the_profile_grows_from_one_item_to_the_largest_batch(architecture: str) -> None:
    spec = SPECS[architecture]
    for kind in TOWERS:
        shapes = profile_shapes(spec, INPUT_NAMES[kind])
        assert list(shapes) == INPUT_NAMES[kind]
        for least, usual, most in shapes.values():
            assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
    assert profile_shapes(spec, ["text_offsets"])["text_offsets"][2] == (MAX_BATCH + 1,)
    assert profile_shapes(spec, ["pixel_values"])["pixel_values"][0][2:] == (spec.vision.resolution,) * 2
