"""An export that cannot be trusted is refused, in a sentence."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from builders.attention import translate_attention
from builders.onnx_export import export_tower
from builders.parity import measure_parity
from builders.towers import ExportFailed
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


@pytest.mark.parametrize("kind", ["text", "image"])
def test_attention_is_six_operators(kind: str, tmp_path: Path) -> None:
    """Between the heads of query, key and value and what they gather: what fused kernels look for, and nothing else."""
    export_tower(random_model(SMALL_SPECS["vit"]), kind, 1, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    makers = {name: node for node in graph.node for name in node.output}
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == 2
    for softmax in softmaxes:
        scores = makers[softmax.input[0]]
        if kind == "text":
            assert scores.op_type == "Add"
            assert [makers[name].op_type for name in scores.input] == ["MatMul", "Where"]
            scores = makers[scores.input[0]]
        assert scores.op_type == "MatMul"
        assert makers[scores.input[0]].op_type == "Mul"
        users = [node.op_type for node in graph.node if softmax.output[0] in node.input]
        assert users == ["MatMul"]
    assert all("/" in node.name for node in softmaxes)  # named by its module


def test_attention_that_no_tower_uses_is_not_exported() -> None:
    for options in ({"is_causal": True}, {"scale": 1.0}, {"dropout_p": 0.1}, {"enable_gqa": True}):
        with pytest.raises(ValueError, match="without dropout, causal mask"):
            translate_attention(None, None, None, **options)
