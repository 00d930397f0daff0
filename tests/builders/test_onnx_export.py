"""An export that cannot be trusted is refused, in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders.onnx_export import ExportFailed, export_tower
from builders.parity import measure_parity
from tests.conftest import SMALL_SPECS, random_model


def test_a_model_in_training_mode_is_refused(tmp_path: Path) -> None:
    """Its dropout would be exported, silently."""
    model = random_model(SMALL_SPECS["vit"]).train()
    with pytest.raises(ExportFailed, match=r"training mode.*call model\.eval\(\)"):
        export_tower(model, "text", 1, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_exporters_refusal_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first line of its reason; and a reason without words has its type's name."""
    for error, reason in ((RuntimeError("cannot trace\n  at line 7\n"), "cannot trace"), (ValueError(), "ValueError")):

        def refuses(*args: object, error: Exception = error, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr("torch.onnx.export", refuses)
        with pytest.raises(ExportFailed, match=rf"^Small-ViT text tower cannot be exported to ONNX: {reason}$"):
            export_tower(random_model(SMALL_SPECS["vit"]), "text", 1, tmp_path / "model.onnx")


def test_a_file_that_does_not_load_fails_the_gate(tmp_path: Path) -> None:
    """In a sentence of ours."""
    (tmp_path / "model.onnx").write_bytes(b"not ONNX")
    with pytest.raises(ExportFailed, match=r"^model\.onnx: ONNX Runtime cannot load it: "):
        measure_parity(random_model(SMALL_SPECS["vit"]), "text", tmp_path / "model.onnx", 1)
