"""A GPU that is not there: `tensorrt_rtx` builds for it ahead of time, and the plan's graph is run in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from builders.gpu_build import Gpu
from builders.half_numerics import write_twin
from builders.parity import open_session
from builders.plan_gate import Run
from builders.tensorrt_plan import ComputeCapability

AMPERE_86 = ComputeCapability(8, 6)


def tensorrt_rtx() -> ModuleType:
    """The module, or a skip that says how to have it."""
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: make .venv/.tensorrt")


def open_onnx(onnx_path: Path) -> Run:
    """Something that runs a feed: the file on ONNX Runtime."""
    session = open_session(onnx_path)
    names = [tensor.name for tensor in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, feed), strict=True))


@contextmanager
def run_reduced_onnx(trt: ModuleType, plan_path: Path) -> Iterator[Run]:
    """The arithmetic of the plan's graph on the CPU, its roundings made explicit; the plan itself must be one."""
    assert plan_path.stat().st_size > 10_000
    reduced = plan_path.with_name("reduced.onnx")
    if not reduced.exists():  # float32 is not reduced
        tower_dir = plan_path.parents[2] / f"small_vit_{plan_path.parent.name}_tower" / "1"
        yield open_onnx(tower_dir / "model.onnx")
        return
    write_twin(reduced, reduced.with_name("twin.onnx"))
    yield open_onnx(reduced.with_name("twin.onnx"))


def absent_gpu() -> Gpu:
    return Gpu(tensorrt_rtx(), AMPERE_86, target=AMPERE_86, open_plan=run_reduced_onnx)
