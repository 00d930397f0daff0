"""Low-precision towers: what is cast and what is not, that the numbers hold, and that TensorRT takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto

from builders import onnx_export
from builders.half_numerics import MIN_HALF_COSINE, first_overflow, measure_activations, measure_half_parity, write_twin
from builders.onnx_export import export_tower
from builders.parity import measure_parity, open_session
from builders.reduced_precision import HalfType, write_half
from builders.towers import TOWERS, ExportFailed, TowerKind
from tests.builders.conftest import FINGERPRINT
from tests.builders.precision import build_strongly_typed
from tests.conftest import SMALL_SPECS, random_model
from tuwen.model import ChineseCLIP
from tuwen.tokenizer import default_tokenizer, pack_rows

HALF_NUMBERS: dict[HalfType, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# bfloat16 has 8 bits of mantissa where float16 has 11: an error 8 times as large, and a cosine's is quadratic in it.
MIN_COSINE: dict[HalfType, float] = {"fp16": MIN_HALF_COSINE, "bf16": 0.999}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[(kind, dtype) for kind in TOWERS for dtype in HALF_NUMBERS], ids="-".join)
def half(
    request: pytest.FixtureRequest, sample: tuple[ChineseCLIP, dict[TowerKind, Path]], tmp_path: Path
) -> tuple[ChineseCLIP, TowerKind, HalfType, Path]:
    kind, dtype = request.param
    path = tmp_path / f"{dtype}.onnx"
    write_half(sample[1][kind], path, dtype)
    return sample[0], kind, dtype, path


def types(path: Path) -> dict[str, int]:
    """ONNX's type of each tensor."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    found = {each.name: each.data_type for each in graph.initializer}
    values = (*graph.input, *graph.output, *graph.value_info)
    return found | {each.name: each.type.tensor_type.elem_type for each in values}


def test_what_is_cast_and_what_is_not(half) -> None:
    """Products run in the low precision; LayerNorm, softmax with its mask, means and the final norm in float32."""
    _, kind, dtype, path = half
    of, number = types(path), HALF_NUMBERS[dtype]
    nodes = list(onnx.load(path).graph.node)
    for node in nodes:
        if node.op_type in ("MatMul", "Gemm", "Conv", "Relu", "Erf", "Sigmoid", "AveragePool"):
            assert {of[name] for name in (*node.input, *node.output)} == {number}, node.name
        if node.op_type in ("LayerNormalization", "Softmax", "ReduceMean", "ReduceL2"):
            assert {of[name] for name in (node.input[0], *node.output)} == {TensorProto.FLOAT}, node.name
        if node.op_type in ("Gather", "GatherND"):
            assert of[node.input[1]] == TensorProto.INT64, node.name
    masked = [node for node in nodes if node.op_type == "Where" and of[node.output[0]] != TensorProto.INT64]
    assert [of[node.output[0]] for node in masked] == ([TensorProto.FLOAT] if kind == "text" else [])
    integers = (TensorProto.INT64, TensorProto.INT32)
    assert not [n for n in nodes if n.op_type == "Cast" and of[n.input[0]] in integers and of[n.output[0]] == number]


def test_names_and_types_outside_stay(half, sample) -> None:
    _, kind, _, path = half
    before, after = (onnx.load(each, load_external_data=False).graph for each in (sample[1][kind], path))
    for values in ("input", "output"):
        public = [[(one.name, one.type.SerializeToString()) for one in getattr(g, values)] for g in (before, after)]
        assert public[0] == public[1]


def test_close_to_pytorch(half) -> None:
    model, kind, dtype, path = half
    assert measure_half_parity(model, kind, path, FINGERPRINT).min_cosine >= MIN_COSINE[dtype]


def test_tensorrt_builds_it(half) -> None:
    model, _, _, path = half
    assert build_strongly_typed(path, model.spec) > 1_000_000


def test_the_twin_rounds_where_onnx_runtime_would_not(sample, tmp_path: Path) -> None:
    """It runs chains of operators in float32 for want of kernels: the error is the greater for every rounding."""
    model, paths = sample
    write_half(paths["image"], tmp_path / "fp16.onnx", "fp16")
    rounded = measure_half_parity(model, "image", tmp_path / "fp16.onnx", FINGERPRINT)
    as_is = measure_parity(model, "image", tmp_path / "fp16.onnx", FINGERPRINT)
    assert rounded.max_abs_diff > 1.2 * as_is.max_abs_diff


def test_the_twin_of_one_product_is_the_product_of_rounded_numbers(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 4), np.float32)
    given, product, result = (
        gs.Variable(name, np.float32, ["n", size]) for name, size in (("x", 8), ("p", 4), ("y", 4))
    )
    nodes = [
        gs.Node("MatMul", "product", {}, [given, gs.Constant("w", weight)], [product]),
        gs.Node("Softmax", "softmax", {"axis": -1}, [product], [result]),
    ]
    onnx.save(gs.export_onnx(gs.Graph(nodes, [given], [result], opset=18, ir_version=10)), tmp_path / "fp32.onnx")
    write_half(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx", "fp16")
    write_twin(tmp_path / "fp16.onnx", tmp_path / "twin.onnx")
    x = np.random.default_rng(1).standard_normal((5, 8), np.float32)
    wide = x.astype(np.float16).astype(np.float32) @ weight.astype(np.float16).astype(np.float32)
    powers = np.exp(wide.astype(np.float16).astype(np.float32))
    (twin,) = open_session(tmp_path / "twin.onnx", optimise=False).run(None, {"x": x})
    np.testing.assert_allclose(twin, powers / powers.sum(axis=1, keepdims=True), rtol=1e-6)


def test_a_constant_that_float16_does_not_hold_keeps_its_node_in_float32(tmp_path: Path) -> None:
    """One beyond its range, and an epsilon that would be 0."""
    given = gs.Variable("x", np.float32, ["n"])
    tensors = [gs.Variable(name, np.float32, ["n"]) for name in ("a", "b", "c")]
    result = gs.Variable("y", np.float32, ["n"])
    constants = [
        gs.Constant(name, np.float32(value).reshape(1)) for name, value in (("i", 1e5), ("j", 1e-12), ("k", 2))
    ]
    chain = [given, *tensors]
    nodes = [gs.Node("Mul", f"mul_{each}", {}, [chain[each], constants[each]], [chain[each + 1]]) for each in range(3)]
    nodes.append(gs.Node("Softmax", "softmax", {"axis": -1}, [tensors[2]], [result]))
    onnx.save(gs.export_onnx(gs.Graph(nodes, [given], [result], opset=18, ir_version=10)), tmp_path / "fp32.onnx")
    write_half(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx", "fp16")
    of = types(tmp_path / "fp16.onnx")
    assert [of[name] for name in "abc"] == [TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT16]
    (row,) = open_session(tmp_path / "fp16.onnx").run(None, {"x": np.float32([1e6, 2e6])})
    assert np.isfinite(row).all()


def test_an_overflow_names_the_layer(tmp_path: Path) -> None:
    """float16 overflows where one layer's weights are too large, bfloat16 does not."""
    model = random_model(SMALL_SPECS["vit"])
    with torch.no_grad():
        block = model.visual.transformer.resblocks[1]
        block.ln_2.weight.fill_(1000)
        block.mlp.c_fc.weight.mul_(1000)
        block.mlp.c_proj.weight.mul_(1e-6)
    export_tower(model, "image", FINGERPRINT, tmp_path / "fp32.onnx")
    feed = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)}
    for dtype in HALF_NUMBERS:
        write_half(tmp_path / "fp32.onnx", tmp_path / f"{dtype}.onnx", dtype)
    found = first_overflow(tmp_path / "fp16.onnx", feed)
    assert found is not None
    assert found.startswith("visual.transformer.resblocks.1.mlp.c_fc/")
    assert first_overflow(tmp_path / "bf16.onnx", feed) is None
    assert first_overflow(tmp_path / "fp32.onnx", feed) is None
    magnitudes = [each.largest for each in measure_activations(tmp_path / "bf16.onnx", feed) if each.is_half]
    assert max(magnitudes) > 65504


def test_weights_beyond_the_limit_stay_in_a_file_of_their_own(
    sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "MAX_EMBEDDED_BYTES", 1000)
    _, paths = sample
    onnx_export.save_proto(onnx.load(paths["text"]), tmp_path / "fp32.onnx")
    write_half(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx", "fp16")
    sizes = [(tmp_path / name).stat().st_size for name in ("fp32.onnx.data", "fp16.onnx.data")]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)
    feed = dict(pack_rows([default_tokenizer().encode_ids("一只猫")]))
    embeds = [open_session(path).run(None, feed)[0] for path in (tmp_path / "fp16.onnx", paths["text"])]
    assert float((embeds[0] * embeds[1]).sum()) >= MIN_HALF_COSINE


def test_what_cannot_be_cast_is_refused(sample, tmp_path: Path) -> None:
    """Another precision, and a file that is half already."""
    _, paths = sample
    with pytest.raises(ExportFailed, match="precision fp64: expected fp16 or bf16"):
        write_half(paths["text"], tmp_path / "fp64.onnx", "fp64")  # type: ignore[arg-type]
    write_half(paths["text"], tmp_path / "fp16.onnx", "fp16")
    with pytest.raises(ExportFailed, match=r"fp16\.onnx: tensor .* is float16 already"):
        write_half(tmp_path / "fp16.onnx", tmp_path / "again.onnx", "fp16")
