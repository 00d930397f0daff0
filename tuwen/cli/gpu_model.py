"""`tuwen build --profile gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tuwen.cli.console import stderr, stdout

if TYPE_CHECKING:
    from builders.gpu_build import GpuBuildResult
    from builders.plan_gate import PlanPrecision
    from tuwen.cli.model import Precision


def build_for_gpu(
    checkpoint: Path,
    name: str | None,
    repository: Path,
    model_version: int,
    precision: Precision | None,
    compatible: tuple[bool, bool],
    if_changed: bool,
    as_json: bool,
) -> None:
    """Build plans, and say how close they are to PyTorch.

    Args:
        compatible: with later versions of TensorRT, with other GPUs.
    """
    from builders.gpu_build import DEFAULT_PRECISION, build_gpu
    from builders.tensorrt_plan import PlanOptions

    options = PlanOptions(*compatible)
    wanted: PlanPrecision = DEFAULT_PRECISION if precision is None else precision.value
    with stderr.status("building") as status:
        result = build_gpu(checkpoint, name, repository, model_version, status.update, wanted, options, if_changed)
    if as_json:
        print(json.dumps(_to_json(result)))
    elif result.is_current:
        stdout.print(f"{_where(result)}: current, nothing was made", soft_wrap=True)
    else:
        _print(result)


def _where(result: GpuBuildResult) -> str:
    cpu = result.cpu
    return f"{cpu.repository}/{cpu.name}, version {cpu.version}, {result.plan_name}"


def _to_json(result: GpuBuildResult) -> dict[str, object]:
    parity = {kind: vars(result.parity(kind)) for kind in result.plans}
    return {
        "name": result.cpu.name,
        "fingerprint": result.cpu.fingerprint,
        "plan": result.plan_name,
        "parity": parity,
        "is_current": result.is_current,
    }


def _print(result: GpuBuildResult) -> None:
    for kind, record in result.plans.items():
        parity = result.parity(kind)
        stdout.print(
            f"{result.cpu.place.tower_dir(kind) / result.plan_name}: {record['precision']}, TensorRT "
            f"{record['tensorrt']['version']}, {record['size_bytes'] / 1e6:.0f} MB in {record['build_seconds']:.0f} s; "
            f"cosine with PyTorch {parity.min_cosine:.6f}, with ONNX Runtime {parity.min_cosine_onnx:.6f}",
            soft_wrap=True,
        )
    stdout.print(f"fingerprint {result.cpu.fingerprint}; now run: docker compose --profile gpu up")
