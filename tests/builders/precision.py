"""A low-precision graph through TensorRT's parser and builder, which need no GPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from builders.onnx_export import INPUT_NAMES
from builders.tensorrt_plan import ComputeCapability, PlanOptions, build_plan, profile_shapes
from builders.towers import TowerKind
from tests.builders.gpu import tensorrt_rtx
from tuwen.specs import ModelSpec

ADA = ComputeCapability(8, 9)  # the first with fp8


def build_strongly_typed(path: Path, spec: ModelSpec) -> int:
    """Size of the engine; fails with TensorRT's reason."""
    inputs = [one.name for one in onnx.load(path, load_external_data=False).graph.input]
    kind: TowerKind = "text" if inputs == INPUT_NAMES["text"] else "image"
    with tempfile.TemporaryDirectory() as folder:
        options = PlanOptions(target=ADA)
        return build_plan(tensorrt_rtx(), path, Path(folder, "plan"), profile_shapes(spec, kind), options).size_bytes
