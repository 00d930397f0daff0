"""Features of `tuwen features` are ranked as Chinese-CLIP's JSONL is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eval.chinese_clip_files import TEXT_TO_IMAGE
from eval.feature_files import Manifest, Side, part_bytes, write_jsonl, write_manifest, write_part, write_single_file
from eval.predictions import predict
from eval.read_features import iter_stored, read_stored
from tuwen.errors import InvalidInput

pytest.importorskip("pyarrow")


def store(folder: Path, side: Side, ids: list[int] | list[str], fingerprint: int = 1, seed: int = 0) -> Manifest:
    """Two parts."""
    embeds = np.random.default_rng(seed).standard_normal((len(ids), 8)).astype(np.float16)
    integers = isinstance(ids[0], int)
    half = len(ids) // 2
    manifest = Manifest(side, "", "", len(ids), "torch", "m", fingerprint, 8, "float16", integers, half)
    folder.mkdir(parents=True)
    write_manifest(folder, manifest)
    for number in range(2):
        chosen = slice(number * half, (number + 1) * half)
        write_part(folder, number, part_bytes(manifest, ids[chosen], embeds[chosen], []))
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for side, first in (("images", 50), ("texts", 7)):
        manifest = store(tmp_path / side, side, list(range(first, first + 40)), seed=first)
        write_single_file(tmp_path / side, manifest)
        write_jsonl(tmp_path / side, manifest)
    return tmp_path


def test_each_form_gives_the_same_predictions(folder: Path) -> None:
    forms = [
        ("images", "texts"),
        ("images.parquet", "texts.parquet"),
        ("images.img_feat.jsonl", "texts.txt_feat.jsonl"),
    ]
    found = []
    for images, texts in forms:
        predict(folder / images, folder / texts, TEXT_TO_IMAGE, folder / "out.jsonl")
        found.append((folder / "out.jsonl").read_bytes())
        assert read_stored(folder / images, "image").embeds.dtype == np.float32
        assert read_stored(folder / images, "image").ids.tolist() == list(range(50, 90))
    assert found[0].count(b"\n") == 40
    assert found == found[:1] * 3


def test_features_of_two_models_are_not_ranked(folder: Path) -> None:
    store(folder / "others", "images", list(range(40)), fingerprint=2)
    with pytest.raises(InvalidInput, match=r"others and .*texts are not of one model"):
        predict(folder / "others", folder / "texts", TEXT_TO_IMAGE, folder / "out.jsonl")
    predict(folder / "others", folder / "texts.txt_feat.jsonl", TEXT_TO_IMAGE, folder / "out.jsonl")


def test_ids_must_be_integers_and_each_once(tmp_path: Path) -> None:
    """A folder of pictures is named by its files; a prediction file has integers alone."""
    store(tmp_path / "named", "images", ["a.jpg", "b.jpg"])
    with pytest.raises(InvalidInput, match=r"named: image_id is 'a.jpg', expected an integer"):
        list(iter_stored(tmp_path / "named", "image"))
    store(tmp_path / "twice", "images", [3, 4, 5, 3])
    with pytest.raises(InvalidInput, match=r"twice: image_id 3 is there twice"):
        read_stored(tmp_path / "twice", "image")
