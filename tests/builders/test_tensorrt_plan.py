"""Plans are built by the real parser and builder of `tensorrt_rtx`, for a GPU that is not there."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from builders.configs import MAX_BATCH_SIZE
from builders.cuda_device import compute_capability
from builders.onnx_export import INPUT_NAMES, export_tower
from builders.plan_runner import open_plan
from builders.reduced_precision import write_half
from builders.tensorrt_plan import (
    COMPUTE_CAPABILITIES,
    ComputeCapability,
    PlanFailed,
    PlanOptions,
    build_plan,
    import_tensorrt,
    profile_shapes,
)
from builders.towers import TOWERS, TowerKind
from tests.builders.gpu import AMPERE_86, tensorrt_rtx
from tests.conftest import SMALL_SPECS, random_model
from tuwen.errors import InvalidInput, MissingDependency
from tuwen.specs import SPECS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # tensorrt_rtx accepts a timing cache, and gives one back, but has no use for it.
    pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning"),
]

API = json.loads(Path(__file__).with_name("tensorrt_api.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with text.onnx and image.onnx of a small model."""
    folder = tmp_path_factory.mktemp("exported")
    model = random_model(SMALL_SPECS["vit"])
    for kind in TOWERS:
        export_tower(model, kind, 7, folder / f"{kind}.onnx")
    return folder


def build_small(trt: ModuleType, exported: Path, kind: TowerKind, plan: Path, options: PlanOptions) -> Any:
    return build_plan(trt, exported / f"{kind}.onnx", plan, profile_shapes(SMALL_SPECS["vit"], kind), options)


@pytest.mark.parametrize("kind", TOWERS)
def test_a_plan_is_built_and_its_timings_are_kept(exported: Path, tmp_path: Path, kind: TowerKind) -> None:
    """Layers, size, and a cache that a second build reads; a broken one is started anew."""
    trt, cache = tensorrt_rtx(), tmp_path / "timing.cache"
    for content in (None, b"no cache"):
        if content is not None:
            cache.write_bytes(content)
        built = build_small(trt, exported, kind, tmp_path / "plan", PlanOptions(target=AMPERE_86, timing_cache=cache))
        assert built.num_layers > 50
        assert built.size_bytes == (tmp_path / "plan").stat().st_size > 10_000
        assert cache.stat().st_size > 50
        assert cache.read_bytes() != content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan", "timing.cache"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_low_precision_graph_is_built(exported: Path, tmp_path: Path, dtype: Any) -> None:
    """Strongly typed: its weights take half the room, without any flag."""
    trt, options = tensorrt_rtx(), PlanOptions(target=AMPERE_86)
    full = build_small(trt, exported, "text", tmp_path / "fp32", options)
    write_half(exported / "text.onnx", tmp_path / "text.onnx", dtype)
    half = build_small(trt, tmp_path, "text", tmp_path / "half", options)
    assert half.size_bytes < 0.7 * full.size_bytes


def test_no_input_is_a_shape_tensor(exported: Path) -> None:
    """Else Triton would neither make the batch inputs nor capture CUDA graphs; the builder refuses such a graph."""
    trt = tensorrt_rtx()
    network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(0)
    assert trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR)).parse_from_file(str(exported / "text.onnx"))
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    assert [(one.name, one.is_shape_tensor) for one in inputs] == [(name, False) for name in INPUT_NAMES["text"]]


def test_a_shape_that_depends_on_values_is_refused(tmp_path: Path) -> None:
    values = [onnx.helper.make_tensor_value_info("sizes", onnx.TensorProto.INT64, [1])]
    out = [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [None])]
    node = onnx.helper.make_node("ConstantOfShape", ["sizes"], ["out"])
    graph = onnx.helper.make_graph([node], "g", values, out)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "text.onnx")
    shapes = {"sizes": replace(profile_shapes(SPECS["ViT-B-16"], "text")["text_offsets"])}
    with pytest.raises(PlanFailed, match=r"^text\.onnx: shapes depend on the values of sizes$"):
        build_plan(tensorrt_rtx(), tmp_path / "text.onnx", tmp_path / "plan", shapes, PlanOptions(target=AMPERE_86))


def test_a_refusal_is_one_sentence_and_leaves_no_plan(exported: Path, tmp_path: Path) -> None:
    """A file that is none; an operator it does not know; a profile that cannot be."""
    trt, options = tensorrt_rtx(), PlanOptions(target=AMPERE_86)
    (tmp_path / "image.onnx").write_bytes(b"not ONNX")
    with pytest.raises(PlanFailed, match=r"^image\.onnx: TensorRT cannot read it: .+"):
        build_small(trt, tmp_path, "image", tmp_path / "plan", options)
    proto = onnx.load(exported / "image.onnx")
    first = next(node for node in proto.graph.node if node.op_type == "LayerNormalization")
    first.op_type = "Det"
    del first.input[1:]
    onnx.save(proto, tmp_path / "image.onnx")
    with pytest.raises(PlanFailed, match=r"^image\.onnx: TensorRT cannot read it: .*Det"):
        build_small(trt, tmp_path, "image", tmp_path / "plan", options)
    shapes = profile_shapes(SMALL_SPECS["resnet"], "image")  # 64 pixels where the tower has 32
    with pytest.raises(PlanFailed, match=r"^image\.onnx: TensorRT cannot build a plan of it: .+"):
        build_plan(trt, exported / "image.onnx", tmp_path / "plan", shapes, options)
    assert not (tmp_path / "plan").exists()


def test_other_inputs_than_expected_are_refused(exported: Path, tmp_path: Path) -> None:
    shapes = profile_shapes(SMALL_SPECS["vit"], "image")
    with pytest.raises(PlanFailed, match=r"text\.onnx: has the inputs input_ids, .*; expected pixel_values$"):
        build_plan(tensorrt_rtx(), exported / "text.onnx", tmp_path / "plan", shapes, PlanOptions(target=AMPERE_86))


@pytest.mark.parametrize("architecture", sorted(SPECS))
def test_the_profile_reaches_from_one_item_to_the_servers_largest_batch(architecture: str) -> None:
    """And Triton, which takes the least of the greatest first dimensions for it, finds no smaller one."""
    spec = SPECS[architecture]
    for kind in TOWERS:
        shapes = profile_shapes(spec, kind)
        assert list(shapes) == INPUT_NAMES[kind]
        for shape in shapes.values():
            assert all(a <= b <= c for a, b, c in zip(shape.least, shape.usual, shape.most, strict=True))
        assert min(shape.most[0] for shape in shapes.values()) >= MAX_BATCH_SIZE
    longest = min(spec.context_length, spec.text.max_positions)
    assert profile_shapes(spec, "text")["input_ids"].most == (MAX_BATCH_SIZE * longest,)


def test_texts_shorter_than_the_batch_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"texts of at most 16 tokens; .* needs 32 or more$"):
        profile_shapes(replace(SPECS["Tiny-RN"], context_length=16), "text")


def test_a_capability_is_written_as_triton_and_as_the_file_have_it() -> None:
    assert (str(AMPERE_86), AMPERE_86.plan_name) == ("8.6", "model_sm86.plan")
    assert ComputeCapability(12, 0).plan_name == "model_sm120.plan"
    assert list(COMPUTE_CAPABILITIES) == sorted(set(COMPUTE_CAPABILITIES))


def test_a_missing_wheel_is_one_sentence_with_the_command() -> None:
    with pytest.raises(
        MissingDependency,
        match=r"^TensorRT cannot be loaded \(No module .*\): pip install --editable '\.\[gpu,tensorrt\]'",
    ):
        import_tensorrt("tensorrt_of_another_world")


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_a_missing_driver_is_one_sentence() -> None:
    with pytest.raises(MissingDependency, match=r"^no NVIDIA .*--gpus all$"):
        compute_capability()


# --- the calls, held against the real TensorRT ----------------------------------------------------------------------


# Made by a call of TensorRT's, and watched in their turn.
WATCHED = (
    "Builder", "IBuilderConfig", "INetworkDefinition", "IOptimizationProfile", "ITensor", "ITimingCache", "OnnxParser",
    "ParserError", "Runtime",
)  # fmt: skip


class Recorder:
    """Stands before an object of TensorRT's, notes `Class.member` of all that is touched, and hands it on."""

    def __init__(self, target: Any, touched: set[str]) -> None:
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "_touched", touched)

    def _note(self, name: str) -> None:
        is_module = isinstance(self._target, ModuleType)
        owner = self._target if isinstance(self._target, type) else type(self._target)
        self._touched.add(name if is_module else f"{owner.__name__}.{name}")

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return self._target.__version__
        self._note(name)
        found = getattr(self._target, name)
        # A class to inherit from has to be itself.
        return Recorder(found, self._touched) if callable(found) and name != "ILogger" else found

    def __setattr__(self, name: str, value: Any) -> None:
        self._note(name)
        setattr(self._target, name, value)

    def __call__(self, *arguments: Any) -> Any:
        made = self._target(*(one._target if isinstance(one, Recorder) else one for one in arguments))
        return Recorder(made, self._touched) if type(made).__name__ in WATCHED else made


def touch_everything(trt: Any, exported: Path, folder: Path) -> None:
    """A build with every option, a file that cannot be read, and a plan that cannot be loaded without its GPU."""
    (folder / "text.onnx").write_bytes(b"not ONNX")
    options = PlanOptions(target=AMPERE_86, timing_cache=folder / "cache", hardware_compatible=True)
    build_small(trt, exported, "text", folder / "plan", options)
    with suppress(PlanFailed):  # this wheel lacks the lean runtime that such a plan takes along
        build_small(trt, exported, "text", folder / "plan", replace(options, version_compatible=True))
    with pytest.raises(PlanFailed):
        build_small(trt, folder, "text", folder / "plan", options)
    (folder / "plan").write_bytes(b"no plan")
    with (
        pytest.raises(PlanFailed, match=r"^plan: TensorRT .* cannot load it on this GPU: .+"),
        open_plan(trt, folder / "plan"),
    ):
        pass


def test_every_call_is_one_that_tensorrt_has(exported: Path, tmp_path: Path) -> None:
    """What real builds touch is in TensorRT 10 and 11 both.

    tensorrt_api.json lists what the bindings 10.13, 10.16 and 11.4 have in common, read once from their own wheels.
    """
    touched: set[str] = set()
    touch_everything(Recorder(tensorrt_rtx(), touched), exported, tmp_path)
    assert touched >= {"Builder.build_serialized_network", "ITimingCache.serialize", "ParserError.desc", "Runtime"}
    ahead_of_time = set(API["only_tensorrt_rtx"])
    assert ahead_of_time <= touched
    assert sorted(touched - ahead_of_time - set(API["members"])) == []
