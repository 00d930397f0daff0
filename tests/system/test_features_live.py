"""`tuwen features` through PyTorch, ONNX Runtime and the live server: one table of numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval.feature_files import open_features, skipped_of
from eval.features import EngineChoice, FeatureJob, parts_by_engine, write_features
from tests.shapes import shape_pairs, write_pairs
from tests.system.conftest import SAMPLE_CHECKPOINT
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton


def test_three_engines_write_the_same_features(
    sample_repository: Path, sample_server: EmbeddedServer, tmp_path: Path
) -> None:
    """The same ids and vectors, of one fingerprint; each skips the broken picture alone."""
    pairs = shape_pairs()
    pairs.images[105] = b"no picture"
    write_pairs(tmp_path / "data", "valid", pairs)
    choices = (
        EngineChoice("torch", SAMPLE_CHECKPOINT),
        EngineChoice("onnx", repository=sample_repository),
        EngineChoice("triton", url=sample_server.endpoints.grpc),
    )
    job = FeatureJob(tmp_path / "data", tmp_path, dtype="float32", part_rows=8)
    for choice in choices:
        with choice.open() as engine:
            write_features(replace(job, out=tmp_path / choice.kind), engine, choice.kind, parts_by_engine(engine))
    for side, num_rows in (("images", 19), ("texts", 25)):
        expected_ids, expected = open_features(tmp_path / "torch" / side)
        assert len(expected_ids) == num_rows
        for kind in ("onnx", "triton"):
            ids, embeddings = open_features(tmp_path / kind / side)
            assert ids == expected_ids
            np.testing.assert_allclose(embeddings, expected, atol=1e-5)  # as builders' gate of parity in float32
    for choice in choices:
        (skipped,) = skipped_of(tmp_path / choice.kind / "images" / "000000.parquet")
        assert skipped.id == 105
        assert "not a readable picture" in skipped.reason
