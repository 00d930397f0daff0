"""docker/check_gpu_builder.py: the sentence by which an image with two TensorRTs is not built."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.deploy.compose_file import ROOT


@pytest.fixture
def script() -> ModuleType:
    path = Path(ROOT, "docker", "check_gpu_builder.py")
    spec = importlib.util.spec_from_file_location("check_gpu_builder", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("number", "version"), [(101303, "10.13.3"), (100900, "10.9.0"), (110400, "11.4.0")])
def test_a_library_s_number_is_its_version(script: ModuleType, number: int, version: str) -> None:
    """Source: NvInferVersion.h, NV_TENSORRT_VERSION: major x 10000 + minor x 100 + patch, since TensorRT 10."""
    assert script.library_version(SimpleNamespace(getInferLibVersion=lambda: number)) == version


def test_two_versions_are_one_sentence(script: ModuleType) -> None:
    assert script.complaint("10.13.3", "10.13.3") is None
    assert "TensorRT 10.14.1" in script.complaint("10.13.3", "10.14.1")


def test_the_number_is_read_from_the_library_itself(script: ModuleType) -> None:
    """tensorrt-rtx has the same function; its number must be its package's version."""
    trt = pytest.importorskip("tensorrt_rtx")
    mapped = {
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libtensorrt_rtx" in line
    }
    library = next((path for path in mapped if "onnxparser" not in path), None)
    assert library, mapped
    assert script.library_version(ctypes.CDLL(library)) == ".".join(trt.__version__.split(".")[:3])
