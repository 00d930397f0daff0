"""clients/ios from this side: the vectors its tests go by are true, and where Swift is installed its tests pass."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from builders.ios_vectors import NUM_LINES, RESOURCES, rendered, resize_plane
from tuwen.image_transform import resize_image
from tuwen.tokenizer import default_tokenizer, normalize_text

PACKAGE = RESOURCES.parents[2]
SWIFT = shutil.which("swift")


@pytest.mark.parametrize("name", ["tokenizer_vectors.json", "resize_vectors.json", "gallery.safetensors"])
def test_what_is_committed_is_true(name: str) -> None:
    assert (RESOURCES / name).read_bytes() == rendered()[name], "run `python -m builders.ios_vectors`"


def test_the_lines_are_as_many_as_said_and_of_many_kinds() -> None:
    vectors = json.loads((RESOURCES / "tokenizer_vectors.json").read_text(encoding="ascii"))
    assert len(vectors) == NUM_LINES
    assert len({vector["text"] for vector in vectors}) > 0.98 * NUM_LINES
    assert sum(vector["truncated"] for vector in vectors) > 20
    assert sum(100 in vector["input_ids"] for vector in vectors) > 100  # [UNK]
    assert len({id for vector in vectors for id in vector["input_ids"]}) > 2500
    scripts = {ord(character) >> 8 for vector in vectors for character in vector["text"]}
    assert len(scripts) > 100
    first = vectors[0]
    assert first["input_ids"] == default_tokenizer().encode_ids(normalize_text(first["text"]))


def test_channels_are_resized_like_a_whole_picture() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    planes = np.stack([resize_plane(pixels[..., channel], 64) for channel in range(3)], axis=-1)
    assert (planes == resize_image(Image.fromarray(pixels), 64)).all()


def test_the_gallery_is_a_safetensors_file() -> None:
    assert load_file(RESOURCES / "gallery.safetensors")["image_embeds"].shape == (4, 3)


@pytest.mark.skipif(SWIFT is None, reason="Swift is not installed (Debian 13: apt-get install swiftlang swiftlang-dev)")
def test_the_swift_packages_own_tests(tmp_path: Path) -> None:
    assert SWIFT is not None
    command = [SWIFT, "test", "--package-path", str(PACKAGE), "--scratch-path", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
