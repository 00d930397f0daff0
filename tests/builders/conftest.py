"""The sample's towers as float32 ONNX, exported once: it takes half a minute on a busy machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders.onnx_export import export_tower
from builders.towers import TOWERS, TowerKind
from tuwen.checkpoint import load_checkpoint
from tuwen.model import ChineseCLIP

SAMPLE = Path(__file__).parents[2] / "samples" / "emoji_tiny"
FINGERPRINT = 7


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[ChineseCLIP, dict[TowerKind, Path]]:
    """The model and its towers; not to be written to."""
    model, folder = load_checkpoint(SAMPLE), tmp_path_factory.mktemp("fp32")
    paths: dict[TowerKind, Path] = {kind: folder / f"{kind}.onnx" for kind in TOWERS}
    for kind, path in paths.items():
        export_tower(model, kind, FINGERPRINT, path)
    return model, paths
