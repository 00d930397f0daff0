"""The NVIDIA GPU at hand, asked through the driver alone: needs neither CUDA's toolkit nor a CUDA build of PyTorch."""

from __future__ import annotations

import ctypes

from builders.tensorrt_plan import ComputeCapability
from tuwen.errors import MissingDependency

_DRIVER = "libcuda.so.1"
# Source: cuda.h, CUdevice_attribute.
_MAJOR, _MINOR = 75, 76


def compute_capability() -> ComputeCapability:
    """Of the first GPU that CUDA_VISIBLE_DEVICES leaves.

    Raises:
        MissingDependency: there is no driver, or no GPU it can use.
    """
    driver = _load_driver()
    device, major, minor = (ctypes.c_int() for _ in range(3))
    calls = (
        (driver.cuInit, 0),
        (driver.cuDeviceGet, ctypes.byref(device), 0),
        (driver.cuDeviceGetAttribute, ctypes.byref(major), _MAJOR, device),
        (driver.cuDeviceGetAttribute, ctypes.byref(minor), _MINOR, device),
    )
    for call, *arguments in calls:
        if code := call(*arguments):
            raise MissingDependency(
                f"no NVIDIA GPU that can be used (CUDA error {code}); `nvidia-smi` should list one, and a container "
                "needs --gpus all"
            )
    return ComputeCapability(major.value, minor.value)


def _load_driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(_DRIVER)
    except OSError:
        raise MissingDependency(
            f"no NVIDIA driver here ({_DRIVER} is missing): a plan is built on the GPU that will run it; a container "
            "needs --gpus all"
        ) from None
