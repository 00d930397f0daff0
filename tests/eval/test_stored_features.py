"""Features extracted before score as those embedded now."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from eval.engines import open_engine
from eval.retrieval import evaluate_retrieval
from eval.stored_features import score_features
from tests.conftest import SMALL_SPECS, random_model
from tests.shapes import shape_pairs, write_pairs
from tuwen.checkpoint import save_checkpoint
from tuwen.data.pairs import open_pairs
from tuwen.errors import InvalidInput

pytest.importorskip("pyarrow")


def tuwen(*arguments: str) -> str:
    ended = subprocess.run([sys.executable, "-m", "tuwen.cli", *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_extracted_features_score_as_the_checkpoint(tmp_path: Path) -> None:
    """From the command that extracts to the one that scores; as Parquet, and as Chinese-CLIP's JSONL."""
    save_checkpoint(random_model(SMALL_SPECS["vit"]), tmp_path / "model")
    write_pairs(tmp_path / "data", "valid", shape_pairs())
    pairs = open_pairs(tmp_path / "data", "valid")
    with open_engine("torch", checkpoint=tmp_path / "model") as engine:
        expected, _ = evaluate_retrieval(engine, pairs, "shapes", "valid")
    features, data = str(tmp_path / "features"), str(tmp_path / "data")
    tuwen("features", "--checkpoint", str(tmp_path / "model"), "--data", data, "--out", features, "--dtype", "float32",
          "--jsonl")  # fmt: skip
    result, _ = score_features(tmp_path / "features", pairs, "shapes", "valid")
    assert result == replace(expected, engine="features")
    printed = json.loads(tuwen("eval", "retrieval", "--features", features, "--data", data, "--json"))
    assert printed["text_to_image"]["r5"] == expected.text_to_image.r5

    written = sorted((tmp_path / "features").rglob("*_feat.jsonl"))
    (tmp_path / "jsonl").mkdir()
    for path, name in zip(written, ("valid_imgs.img_feat.jsonl", "valid_texts.txt_feat.jsonl"), strict=True):
        path.rename(tmp_path / "jsonl" / name)
    result, _ = score_features(tmp_path / "jsonl", pairs, "shapes", "valid")
    assert (result.architecture, result.fingerprint) == ("jsonl", None)
    assert (result.text_to_image, result.image_to_text) == (expected.text_to_image, expected.image_to_text)


def test_a_folder_without_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"neither images of `tuwen features` in it nor valid_imgs\.img_feat\.jsonl"):
        score_features(tmp_path, shape_pairs(), "shapes", "valid")
