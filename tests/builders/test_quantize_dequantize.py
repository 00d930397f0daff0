"""int8 and fp8 towers: Q/DQ where it should be, what it costs on Emoji-CN, and that TensorRT takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto

from builders.half_numerics import write_twin
from builders.quantize import MAX_RECALL_LOSS, QuantizationCost, measure_cost, open_embed
from builders.quantize_dequantize import QuantizedType, calibration_feeds, write_quantized
from builders.towers import TOWERS, ExportFailed, TowerKind
from tests.builders.precision import build_strongly_typed
from tests.shapes import shape_pairs, write_pairs
from tuwen.model import ChineseCLIP

NUMBERS: dict[QuantizedType, int] = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
# Measured: 0.9986 and 0.9963 in int8, 0.9980 and 0.9933 in fp8.
MIN_COSINE: dict[TowerKind, float] = {"text": 0.997, "image": 0.99}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=list(NUMBERS))
def quantized(
    request: pytest.FixtureRequest,
    sample: tuple[ChineseCLIP, dict[TowerKind, Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[QuantizedType, dict[TowerKind, Path]]:
    model, fp32 = sample
    paths = {kind: tmp_path_factory.mktemp(request.param) / f"{kind}.onnx" for kind in TOWERS}
    for kind, path in paths.items():
        write_quantized(fp32[kind], path, kind, model.spec, request.param)
    return request.param, paths


def test_products_with_weights_are_quantized(quantized) -> None:
    """All but the first of pictures and the last; on both sides, in the one type; weights are stored in it."""
    dtype, paths = quantized
    for kind, path in paths.items():
        graph = gs.import_onnx(onnx.load(path))
        products = [
            node
            for node in graph.nodes
            if node.op in ("Gemm", "Conv", "MatMul") and {"Softmax", "Mul"}.isdisjoint(_sources(node))
        ]
        bare = [node for node in products if set(_sources(node)[:2]) != {"DequantizeLinear"}]
        assert len(products) > 10
        assert len(bare) == (2 if kind == "image" else 1), [node.name for node in bare]
        stored = {each.name: each.data_type for each in onnx.load(path).graph.initializer}
        weights = [node for node in graph.nodes if node.op == "DequantizeLinear" and node.inputs[0].name in stored]
        assert {stored[node.inputs[0].name] for node in weights} == {NUMBERS[dtype]}
        assert all((len(node.inputs[1].shape) == 1) is (dtype == "int8") for node in weights)


def _sources(node: gs.Node) -> list[str]:
    """What makes each input: an operator, looking through casts and moves of attention; "" for a constant."""
    found = []
    for tensor in node.inputs:
        while tensor.inputs and tensor.inputs[0].op in ("Cast", "Transpose", "Reshape"):
            tensor = tensor.inputs[0].inputs[0]
        found.append(tensor.inputs[0].op if tensor.inputs else "")
    return found


def test_the_cost_on_emoji_cn(quantized, sample, tmp_path: Path) -> None:
    """Run as the graph stands, each rounding made: recall is what is lost least."""
    model, fp32 = sample
    twins = {kind: tmp_path / f"{kind}.onnx" for kind in TOWERS}
    for kind, path in quantized[1].items():
        write_twin(path, twins[kind])
    exact, low = ({kind: open_embed(paths[kind], optimise=False) for kind in TOWERS} for paths in (fp32, twins))
    cost = measure_cost(exact, low, model.spec.vision.resolution, model.spec.text.max_positions)
    assert isinstance(cost, QuantizationCost)
    assert all(cost.min_cosine[kind] >= MIN_COSINE[kind] for kind in TOWERS), cost
    assert cost.recall_at_10 >= cost.recall_at_10_fp32 - MAX_RECALL_LOSS, cost


def test_tensorrt_builds_it(quantized, sample) -> None:
    for path in quantized[1].values():
        assert build_strongly_typed(path, sample[0].spec) > 1_000_000


def test_a_quarter_of_the_size(quantized, sample) -> None:
    """Of the picture tower, which is all products; of the text tower nine tenths are word embeddings, in float16."""
    assert quantized[1]["image"].stat().st_size < 0.3 * sample[1]["image"].stat().st_size


def test_calibration_on_pairs_of_ones_own(sample, tmp_path: Path) -> None:
    """Any set of pairs will do; the scales are those of its activations."""
    model, fp32 = sample
    write_pairs(tmp_path, "train", shape_pairs())
    scales = []
    for folder in ({"folder": tmp_path, "split": "train"}, {}):
        feeds = list(calibration_feeds(model.spec, "image", **folder))
        write_quantized(fp32["image"], tmp_path / "int8.onnx", "image", model.spec, "int8", feeds)
        graph = onnx.load(tmp_path / "int8.onnx").graph
        activation = next(node for node in graph.node if node.op_type == "QuantizeLinear")
        scales += [onnx.numpy_helper.to_array(each) for each in graph.initializer if each.name == activation.input[1]]
    assert 0 < scales[0] != scales[1]


def test_without_input_there_is_no_scale(sample, tmp_path: Path) -> None:
    model, fp32 = sample
    for feeds in ([], [{"pixel_values": np.full((1, 3, 64, 64), np.nan, np.float32)}]):
        with pytest.raises(
            ExportFailed, match=r"image\.onnx: calibration saw no finite number in .*; give it real input"
        ):
            write_quantized(fp32["image"], tmp_path / "int8.onnx", "image", model.spec, "int8", iter(feeds))
    assert not list(tmp_path.iterdir())
