"""Are TensorRT's Python bindings those of the libnvinfer beside them, and is DALI there? Else exit 1 with a sentence.

python3 check_gpu_builder.py        # run while the image of the GPU builder is built; needs no GPU
"""

from __future__ import annotations

import ctypes
import importlib
import sys


def bindings_version() -> str:
    """major.minor.patch of the Python package."""
    import tensorrt

    return ".".join(tensorrt.__version__.split(".")[:3])


def library_version(library: ctypes.CDLL) -> str:
    """major.minor.patch of libnvinfer, which tells it as one number: 101303 is 10.13.3."""
    number = library.getInferLibVersion()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def complaint(bindings: str, library: str) -> str | None:
    """What to change, if they differ."""
    if bindings == library:
        return None
    return (
        f"Triton's image has TensorRT {library}, docker/requirements/builder-gpu.txt asks for {bindings}: "
        f"set tensorrt_cu13_bindings to a {library} there, because plans are bound to the version that made them"
    )


def main() -> None:
    bindings = bindings_version()  # loads the library too
    library = library_version(ctypes.CDLL(f"libnvinfer.so.{bindings.split('.')[0]}"))
    if differs := complaint(bindings, library):
        sys.exit(differs)
    dali = importlib.import_module("nvidia.dali")
    print(f"TensorRT {library}, DALI {dali.__version__}")


if __name__ == "__main__":
    main()
