"""ONNX -> TensorRT plan: strongly typed, one optimisation profile over all batches that the server makes.

Written for TensorRT 10 and 11; precision is in the graph (builders/reduced_precision.py), never in a flag. The module
is a parameter: `tensorrt` builds for the GPU at hand, `tensorrt_rtx` ahead of time for GPUs that are not there, which
is how `make check-tensorrt` runs this very code on any machine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from builders.configs import MAX_BATCH_SIZE
from builders.towers import TowerKind
from tuwen.errors import InvalidInput, MissingDependency, TuwenError
from tuwen.files import atomic_path
from tuwen.specs import ModelSpec

# What TensorRT picks its kernels for: MUGE's mean of 7 characters with [CLS] and [SEP], and the longest text of eight.
USUAL_BATCH, USUAL_TOKENS, USUAL_LONGEST = 8, 9, 16
# Scratch memory a kernel may ask for while it is timed; a plan that needs more is worth nothing on a card of 8 GB.
WORKSPACE_BYTES = 4 << 30
INSTALL = "pip install --editable '.[gpu,tensorrt]', with TensorRT in the version of your Triton"


class PlanFailed(TuwenError):
    """TensorRT refuses a tower, or its plan does not compute what PyTorch computes; nothing is placed."""


@dataclass(frozen=True, order=True)
class ComputeCapability:
    """Of a GPU: 8.6 is an RTX 30, an A10 or an A40."""

    major: int
    minor: int

    def __str__(self) -> str:
        """As Triton writes it in `cc_model_filenames`."""
        return f"{self.major}.{self.minor}"

    @property
    def sm(self) -> str:
        return f"sm{self.major}{self.minor}"

    @property
    def plan_name(self) -> str:
        return f"model_{self.sm}.plan"


AMPERE = ComputeCapability(8, 0)
# Turing to Blackwell: all that Triton's TensorRT runs on and that stand in servers and desks.
COMPUTE_CAPABILITIES = tuple(
    ComputeCapability(*pair) for pair in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))
)


@dataclass(frozen=True)
class ShapeRange:
    """Least, usual and greatest shape of an input."""

    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]


@dataclass(frozen=True)
class PlanOptions:
    """How to build.

    Attributes:
        version_compatible: runs on later TensorRT too, where Triton was started with
            --backend-config=tensorrt,version-compatible=true; slower.
        hardware_compatible: runs on every GPU from Ampere on; slower.
        timing_cache: file of kernel timings, read and written; a second build of a like tower is several times faster.
        target: a GPU that is not there; `tensorrt_rtx` only.
    """

    version_compatible: bool = False
    hardware_compatible: bool = False
    workspace_bytes: int = WORKSPACE_BYTES
    timing_cache: Path | None = None
    target: ComputeCapability | None = None


@dataclass(frozen=True)
class BuiltPlan:
    """What came of it; the plan itself is in the file."""

    num_layers: int
    seconds: float
    size_bytes: int


def profile_shapes(spec: ModelSpec, kind: TowerKind) -> dict[str, ShapeRange]:
    """The bounds that config.pbtxt names: a batch of one to MAX_BATCH_SIZE, a text of one token to the longest.

    Texts lie end to end, so their first dimensions are the tokens of all, the number of texts and one, and the length
    of the longest; Triton's backend takes the least of the greatest first dimensions for the largest batch there is.

    Raises:
        InvalidInput: texts of this model are so short that the backend would take their length for that batch.
    """
    side, longest = spec.vision.resolution, min(spec.context_length, spec.text.max_positions)
    if kind == "image":
        batches = (1, USUAL_BATCH, MAX_BATCH_SIZE)
        return {"pixel_values": ShapeRange(*((batch, 3, side, side) for batch in batches))}
    if longest < MAX_BATCH_SIZE:
        raise InvalidInput(
            f"{spec.name}: texts of at most {longest} tokens; Triton's TensorRT backend needs {MAX_BATCH_SIZE} or more"
        )
    return {
        "input_ids": ShapeRange((1,), (USUAL_BATCH * USUAL_TOKENS,), (MAX_BATCH_SIZE * longest,)),
        "text_offsets": ShapeRange((2,), (USUAL_BATCH + 1,), (MAX_BATCH_SIZE + 1,)),
        "longest_text": ShapeRange((1,), (USUAL_LONGEST,), (longest,)),
    }


def import_tensorrt(name: str = "tensorrt") -> ModuleType:
    """The module.

    Raises:
        MissingDependency: it is not installed, or its libraries do not load.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # a wheel without its libraries raises either
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingDependency(f"TensorRT cannot be loaded ({reason}): {INSTALL}") from error


def build_plan(
    trt: ModuleType, onnx_path: Path, plan_path: Path, shapes: Mapping[str, ShapeRange], options: PlanOptions
) -> BuiltPlan:
    """Parse a tower and write its plan to `plan_path`.

    Raises:
        PlanFailed: the parser or the builder refuses; its own words are quoted.
    """
    log = make_log(trt)
    builder = trt.Builder(log)
    if builder is None:
        raise PlanFailed(f"TensorRT cannot start: {log.reason()}")
    # What it is from 11 on anyway: types are those of the graph, and no flag lowers them.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, onnx_path, network, log)
    _check_inputs(onnx_path, network, shapes)
    config = _make_config(trt, builder, shapes, options)
    started = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if plan is None:
        raise PlanFailed(f"{onnx_path.name}: TensorRT cannot build a plan of it: {log.reason()}")
    plan_path.write_bytes(memoryview(plan))
    if options.timing_cache is not None:
        _save_timing_cache(config, options.timing_cache)
    return BuiltPlan(network.num_layers, seconds, plan_path.stat().st_size)


def _parse(trt: ModuleType, onnx_path: Path, network: Any, log: Any) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(onnx_path)):  # by its path: weights above 2 GiB are in a file beside it
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    reasons = [f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors]
    raise PlanFailed(f"{onnx_path.name}: TensorRT cannot read it: {reasons[0] if reasons else log.reason()}")


def _check_inputs(onnx_path: Path, network: Any, shapes: Mapping[str, ShapeRange]) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if (names := [tensor.name for tensor in inputs]) != list(shapes):
        raise PlanFailed(f"{onnx_path.name}: has the inputs {', '.join(names)}; expected {', '.join(shapes)}")
    # Triton passes over such an input where it makes it itself, and captures no CUDA graph of such a model.
    if of_shapes := [tensor.name for tensor in inputs if tensor.is_shape_tensor]:
        raise PlanFailed(f"{onnx_path.name}: shapes depend on the values of {', '.join(of_shapes)}")


def _make_config(trt: ModuleType, builder: Any, shapes: Mapping[str, ShapeRange], options: PlanOptions) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    # fp32 means fp32. Whoever wants its speed for less precision asks for fp16, which is as coarse and faster.
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, options.target.sm.upper()), 0)
    if options.timing_cache is not None:
        _load_timing_cache(config, options.timing_cache)
    profile = builder.create_optimization_profile()
    for name, shape in shapes.items():
        profile.set_shape(name, shape.least, shape.usual, shape.most)
    config.add_optimization_profile(profile)
    return config


def _load_timing_cache(config: Any, path: Path) -> None:
    """Attach the timings in `path`, or none: a file of another GPU or version, or a broken one, is started anew."""
    content = path.read_bytes() if path.is_file() else b""
    for timings in (content, b""):
        cache = config.create_timing_cache(timings)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def _save_timing_cache(config: Any, path: Path) -> None:
    if (cache := config.get_timing_cache()) is not None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(memoryview(cache.serialize()))


def make_log(trt: ModuleType) -> Any:
    """A logger that keeps what TensorRT says of errors, for the sentence that the user gets."""

    class _Log(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self._errors.append(message)

        def reason(self) -> str:
            """The first error: those after it follow from it."""
            return self._errors[0] if self._errors else "it gives no reason"

    return _Log()
