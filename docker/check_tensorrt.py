"""Are TensorRT's Python bindings those of the libnvinfer beside them? Exits 1 with a sentence if not.

    python3 check_tensorrt.py        # run while the image of the GPU builder is built
"""

from __future__ import annotations

import ctypes
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
    sys.exit(complaint(bindings, library))


if __name__ == "__main__":
    main()
