"""Checkpoint -> TensorRT plans of both towers, for the GPU at hand, beside the ONNX of the CPU build.

tuwen build --checkpoint samples/emoji_tiny --profile gpu
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import get_args

import numpy as np
import numpy.typing as npt

from builders.build import BuildResult, build, resolve_checkpoint
from builders.build_record import Place, Record, read_record, sha256, tool_versions
from builders.cuda_device import compute_capability
from builders.feeds import Feed
from builders.half_numerics import first_overflow
from builders.plan_gate import PlanParity, PlanPrecision, Run, gate_batches, measure_plan
from builders.plan_runner import open_plan, require_runner
from builders.quantize import MAX_RECALL_LOSS, Embed, measure_cost, open_embed
from builders.quantize_dequantize import write_quantized
from builders.reduced_precision import write_half
from builders.tensorrt_plan import (
    AMPERE,
    COMPUTE_CAPABILITIES,
    BuiltPlan,
    ComputeCapability,
    PlanFailed,
    PlanOptions,
    build_plan,
    import_tensorrt,
    profile_shapes,
)
from builders.towers import TOWERS, TowerKind
from tuwen.checkpoint import load_checkpoint
from tuwen.errors import InvalidInput
from tuwen.files import sync, write_text
from tuwen.model import ChineseCLIP
from tuwen.specs import ModelSpec

DEFAULT_PRECISION: PlanPrecision = "fp16"
# First GPUs whose matrix units take the type. Source: CUDA's programming guide, "Compute Capabilities".
_FIRST_CAPABILITY: dict[PlanPrecision, ComputeCapability] = {"bf16": AMPERE, "fp8": ComputeCapability(8, 9)}
_ONNX, _PLAN = "reduced.onnx", "model.plan"

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Gpu:
    """What builds plans and what runs them.

    Attributes:
        target: a GPU that is not there, with a module that builds ahead of time; `open_plan` is then something else.
    """

    trt: ModuleType
    capability: ComputeCapability
    target: ComputeCapability | None = None
    open_plan: Callable[[ModuleType, Path], AbstractContextManager[Run]] = open_plan


@dataclass(frozen=True)
class GpuBuildResult:
    """The CPU build beneath, and the record of each plan; `is_current`: they stood there already."""

    cpu: BuildResult
    plan_name: str
    plans: dict[TowerKind, Record] = field(default_factory=dict)
    is_current: bool = False

    def parity(self, kind: TowerKind) -> PlanParity:
        return PlanParity(**self.plans[kind]["parity"])


def find_gpu() -> Gpu:
    """The first GPU, and TensorRT.

    Raises:
        MissingDependency: either is missing, in a sentence with the way out.
    """
    capability = compute_capability()
    require_runner()  # not after minutes of building
    return Gpu(capability=capability, trt=import_tensorrt())


def build_gpu(
    checkpoint: Path,
    name: str | None,
    repository: Path,
    model_version: int = 1,
    on_stage: OnStage = lambda stage: None,
    precision: PlanPrecision = DEFAULT_PRECISION,
    options: PlanOptions = PlanOptions(),  # noqa: B008 - frozen
    if_changed: bool = False,
    find_gpu: Callable[[], Gpu] = find_gpu,
) -> GpuBuildResult:
    """Build the CPU model where it is not current, then both plans; neither is placed unless both pass the gate.

    Plans are measured against float32, so that the CPU model of this name and version is float32 afterwards; an int8
    one in its place is replaced.

    Args:
        if_changed: build no plans either where those that stand there are what would be made.
    Raises:
        MissingDependency: there is no GPU, driver or TensorRT; the CPU model stays, and can be served.
        InvalidInput: as `build`, and for a precision that the GPU does not have.
        ExportFailed, PlanFailed: a tower or a plan does not compute what PyTorch computes.
    """
    if precision not in get_args(PlanPrecision):
        raise InvalidInput(f"precision {precision}: expected {', '.join(get_args(PlanPrecision))}")
    checkpoint = resolve_checkpoint(checkpoint)
    cpu = build(checkpoint, name, repository, model_version, on_stage, "fp32", if_changed=True)
    gpu = find_gpu()
    _check_target(precision, gpu.capability, options)
    plan_name, pipeline = gpu.capability.plan_name, pipeline_path(repository, cpu.resolution)
    expected = {kind: _expected_record(cpu.place, kind, precision, gpu, options) for kind in TOWERS}
    if if_changed and pipeline.is_file() and (plans := _current_plans(cpu.place, plan_name, expected)):
        return GpuBuildResult(cpu, plan_name, plans, is_current=True)
    on_stage("writing the preprocessing pipeline")
    _write_pipeline(cpu.resolution, pipeline)
    options = _complete(options, repository, gpu)
    plans = _build_plans(load_checkpoint(checkpoint), cpu.place, precision, gpu, options, expected, on_stage)
    return GpuBuildResult(cpu, plan_name, plans)


def _build_plans(
    model: ChineseCLIP,
    place: Place,
    precision: PlanPrecision,
    gpu: Gpu,
    options: PlanOptions,
    expected: dict[TowerKind, Record],
    on_stage: OnStage,
) -> dict[TowerKind, Record]:
    """Build, measure and place both; returns their records, which are the expected ones with what was measured."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=place.repository) as staging_name:
        records: dict[TowerKind, Record] = {}
        for kind in TOWERS:
            folder = Path(staging_name, kind)
            folder.mkdir()
            measured = _build_tower(model, kind, place, precision, gpu, options, folder, on_stage)
            records[kind] = expected[kind] | measured
        if precision in ("int8", "fp8"):
            on_stage(f"comparing {precision} with float32 on Emoji-CN")
            cost = _check_recall(model.spec, place, precision, gpu, Path(staging_name))
            records = {kind: record | {"against_fp32": cost} for kind, record in records.items()}
        on_stage("placing")
        for kind, record in records.items():
            plan = Path(staging_name, kind, _PLAN)
            _place(plan, record, place.tower_dir(kind), _names(gpu.capability, options))
    return records


def _check_target(precision: PlanPrecision, capability: ComputeCapability, options: PlanOptions) -> None:
    first = _FIRST_CAPABILITY.get(precision)
    if first is not None and capability < first:
        raise InvalidInput(f"precision {precision}: needs compute capability {first}, this GPU has {capability}")
    if capability not in COMPUTE_CAPABILITIES:
        known = ", ".join(map(str, COMPUTE_CAPABILITIES))
        raise InvalidInput(
            f"this GPU has compute capability {capability}, for which configs/gpu.pbtxt names no plan; it knows {known}"
        )
    if options.hardware_compatible and capability < AMPERE:
        raise InvalidInput(f"--hardware-compatible: needs compute capability {AMPERE}, this GPU has {capability}")
    if options.hardware_compatible and precision == "fp8":
        raise InvalidInput("--hardware-compatible: not with fp8, which GPUs before 8.9 do not have; take fp16")


def pipeline_path(repository: Path, resolution: int) -> Path:
    """Where Triton's DALI backend reads it."""
    return repository / f"preprocess_image_{resolution}" / "1" / "model.dali"


def _write_pipeline(resolution: int, path: Path) -> None:
    from builders.dali_pipeline import write_pipeline

    write_pipeline(resolution, path, "gpu")


def _complete(options: PlanOptions, repository: Path, gpu: Gpu) -> PlanOptions:
    """The target, and a timing cache in a hidden folder, which Triton does not load and a volume keeps."""
    cache = repository / ".tensorrt" / f"timing_{gpu.capability.sm}_{gpu.trt.__version__}.cache"
    return replace(options, target=gpu.target, timing_cache=options.timing_cache or cache)


def _build_tower(
    model: ChineseCLIP,
    kind: TowerKind,
    place: Place,
    precision: PlanPrecision,
    gpu: Gpu,
    options: PlanOptions,
    folder: Path,
    on_stage: OnStage,
) -> Record:
    """Reduce, build and measure one tower in `folder`; what was measured goes into its record."""
    onnx_path = place.tower_dir(kind) / "model.onnx"
    on_stage(f"casting the {kind} tower to {precision}")
    reduced = reduce_tower(onnx_path, folder / _ONNX, kind, model.spec, precision)
    on_stage(f"building the {kind} tower's plan for {gpu.capability.sm}, minutes for a large one")
    built = build_plan(gpu.trt, reduced, folder / _PLAN, profile_shapes(model.spec, kind), options)
    on_stage(f"comparing the {kind} tower's plan with PyTorch and ONNX Runtime")
    with gpu.open_plan(gpu.trt, folder / _PLAN) as run:
        find_overflow = partial(first_overflow, reduced)
        parity = measure_plan(run, onnx_path, kind, precision, gate_batches(model, kind), find_overflow)
    return _measured_record(built, parity)


def reduce_tower(onnx_path: Path, out_path: Path, kind: TowerKind, spec: ModelSpec, precision: PlanPrecision) -> Path:
    """The tower in `precision`: at `out_path`, or the float32 file as it is."""
    if precision == "fp32":
        return onnx_path
    if precision == "fp16" or precision == "bf16":
        write_half(onnx_path, out_path, precision)
    else:
        write_quantized(onnx_path, out_path, kind, spec, precision)
    return out_path


def _expected_record(place: Place, kind: TowerKind, precision: PlanPrecision, gpu: Gpu, options: PlanOptions) -> Record:
    """All that decides what a plan is. A record with other values, or with fewer, is of another plan."""
    record = read_record(place.tower_dir(kind) / "build.json") or {}
    return {
        "architecture": record["architecture"],
        "tower": kind,
        "fingerprint": record["fingerprint"],
        "onnx_sha256": sha256(place.tower_dir(kind) / "model.onnx"),
        "precision": precision,
        "compute_capability": str(gpu.capability),
        "tensorrt": {"module": gpu.trt.__name__, "version": gpu.trt.__version__},
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
        "workspace_bytes": options.workspace_bytes,
        "tools": tool_versions(),
    }


def _check_recall(spec: ModelSpec, place: Place, precision: PlanPrecision, gpu: Gpu, staging: Path) -> Record:
    """What the precision costs in retrieval, which a cosine does not tell.

    Raises:
        PlanFailed: more than MAX_RECALL_LOSS.
    """
    exact = {kind: open_embed(place.tower_dir(kind) / "model.onnx") for kind in TOWERS}
    with ExitStack() as stack:
        low: dict[TowerKind, Embed] = {}
        for kind in TOWERS:
            run = stack.enter_context(gpu.open_plan(gpu.trt, staging / kind / _PLAN))
            low[kind] = partial(_embed, run, f"{kind}_embeds")
        cost = measure_cost(exact, low, spec.vision.resolution, min(spec.context_length, spec.text.max_positions))
    if not cost.keeps_recall:
        raise PlanFailed(
            f"{precision}: recall@10 {cost.recall_at_10:.1%} where float32 has {cost.recall_at_10_fp32:.1%}; expected "
            f"a loss of at most {100 * MAX_RECALL_LOSS:.1f} points, so nothing was placed"
        )
    return asdict(cost)


def _embed(run: Run, name: str, feed: Feed) -> npt.NDArray[np.float32]:
    return run(feed)[name]


def _measured_record(built: BuiltPlan, parity: PlanParity) -> Record:
    return {
        "parity": asdict(parity),
        "num_layers": built.num_layers,
        "build_seconds": round(built.seconds, 1),
        "size_bytes": built.size_bytes,
    }


def _current_plans(place: Place, plan_name: str, expected: dict[TowerKind, Record]) -> dict[TowerKind, Record]:
    """The records of both plans, if they are of what is expected and the plans are there; else nothing."""
    found: dict[TowerKind, Record] = {}
    for kind, wanted in expected.items():
        plan = place.tower_dir(kind) / plan_name
        record = read_record(plan.with_suffix(".json")) or {}
        is_same = all(record.get(key) == value for key, value in wanted.items())
        if not is_same or not plan.is_file() or plan.stat().st_size != record.get("size_bytes"):
            return {}
        found[kind] = record
    return found


def _names(capability: ComputeCapability, options: PlanOptions) -> list[str]:
    """File names for the plan, that of its own GPU first; one for every GPU has the names of all of them."""
    others = [one for one in COMPUTE_CAPABILITIES if options.hardware_compatible and one >= AMPERE]
    return list(dict.fromkeys(one.plan_name for one in (capability, *others)))


def _place(plan: Path, record: Record, folder: Path, names: list[str]) -> None:
    """Put a plan where Triton reads it. Its record goes first and comes last: a kill leaves none, not a wrong one."""
    for name in names:
        (folder / name).with_suffix(".json").unlink(missing_ok=True)
    sync(plan)
    for name in names:
        temporary = folder / f".{name}.{os.getpid()}"
        try:
            os.link(plan, temporary)
        except OSError:  # some volumes have no hard links
            shutil.copyfile(plan, temporary)
        os.replace(temporary, folder / name)
    for name in names:
        write_text((folder / name).with_suffix(".json"), json.dumps(record, indent=2) + "\n")
