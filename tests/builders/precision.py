"""A TensorRT that builds without a GPU."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from perf.tensorrt_tower import profile_shapes
from tuwen.specs import ModelSpec


def tensorrt_rtx() -> ModuleType:
    """Its parser and builder need no GPU."""
    return pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx, which builds engines without a GPU")


def build_strongly_typed(path: Path, spec: ModelSpec) -> int:
    """Size of the engine for SM89, the first with fp8; fails with TensorRT's reason."""
    trt = tensorrt_rtx()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(each).desc() for each in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    names = [network.get_input(each).name for each in range(network.num_inputs)]
    for name, shapes in profile_shapes(spec, names).items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return int(plan.nbytes)
