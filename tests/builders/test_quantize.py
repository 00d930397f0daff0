"""int8: the sample passes the gate and is what is placed; what loses too much places nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from builders import quantize
from builders.build import BuildResult, build
from builders.parity import open_session
from builders.quantize import MIN_COSINE, QuantizationCost
from builders.towers import TOWERS, ExportFailed
from tuwen.errors import InvalidInput
from tuwen.tokenizer import default_tokenizer, pack_rows

SAMPLE = Path(__file__).parents[2] / "samples" / "emoji_tiny"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    return build(SAMPLE, repository=tmp_path_factory.mktemp("int8"), precision="int8")


def tower_dir(result: BuildResult, kind: str) -> Path:
    return result.repository / f"{result.name}_{kind}_tower" / "1"


def test_build_json_tells_the_precision_and_its_cost(built: BuildResult) -> None:
    for kind in TOWERS:
        record = json.loads((tower_dir(built, kind) / "build.json").read_text(encoding="utf-8"))
        assert record["precision"] == "int8"
        assert record["int8_against_fp32"]["min_cosine"][kind] >= MIN_COSINE
        assert record["int8_against_fp32"]["num_images"] > 600


def test_every_matrix_of_the_text_towers_layers_is_int8(built: BuildResult) -> None:
    graph = onnx.load(tower_dir(built, "text") / "model.onnx").graph
    weights = {each.name: each for each in graph.initializer}
    float_matrices = [
        node.name
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm") and any(name in weights for name in node.input)
    ]
    assert float_matrices == []
    assert {node.op_type for node in graph.node} & {"MatMulInteger", "DynamicQuantizeMatMul"}


def test_only_what_is_served_is_placed(built: BuildResult) -> None:
    for kind in TOWERS:
        assert sorted(path.name for path in tower_dir(built, kind).iterdir()) == [
            ".gitkeep", "build.json", "model.onnx"
        ]  # fmt: skip


def test_int8_keeps_the_fingerprint(built: BuildResult) -> None:
    """Its vectors may be compared with float32's: an index need not be embedded again."""
    session = open_session(tower_dir(built, "text") / "model.onnx")
    embeds, fingerprint, _ = session.run(None, dict(pack_rows([default_tokenizer().encode_ids("猫")])))
    assert int(fingerprint[0, 0]) == built.fingerprint
    assert np.linalg.norm(embeds[0]) == pytest.approx(1, abs=1e-6)


def test_what_loses_too_much_places_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "MIN_COSINE", 0.99999)
    with pytest.raises(ExportFailed, match=r"int8: cosine 0\.99.*nothing was placed"):
        build(SAMPLE, repository=tmp_path, precision="int8")
    assert not list(tmp_path.rglob("model.onnx"))


@pytest.mark.parametrize(
    ("cosine", "recall", "passes"), [(0.9991, 0.500, True), (0.9989, 0.500, False), (0.9991, 0.494, False)]
)
def test_the_gate(cosine: float, recall: float, passes: bool) -> None:
    cost = QuantizationCost({"text": cosine, "image": 1.0}, recall, 0.5, num_images=600, num_texts=2000)
    assert cost.passed is passes


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="precision int4: expected fp32 or int8"):
        build(SAMPLE, repository=tmp_path, precision="int4")  # type: ignore[arg-type]
