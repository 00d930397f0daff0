"""model.dali: the preprocessing as a DALI pipeline, for a GPU, or its twin for the CPU, from one definition.

    python -m builders.dali_pipeline --resolution 224 --out model_repository/preprocess_image_224/1/model.dali

image uint8 (size,), an encoded file -> pixel_values float32 (3, R, R). Triton's dali backend knows input and output by
the names given here. Serialising needs no GPU.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from builders.configs import MAX_BATCH_SIZE, Device
from tuwen.errors import MissingDependency
from tuwen.files import atomic_file
from tuwen.specs import IMAGE_MEAN, IMAGE_STD

INPUT, OUTPUT = "image", "pixel_values"
# Of the pipeline as it is written; Triton's `num_threads` parameter replaces it.
_NUM_THREADS = 4


def write_pipeline(resolution: int, path: Path, device: Device) -> None:
    """Write the serialised pipeline, whole or not at all.

    Args:
        device: gpu decodes JPEG and resizes there; cpu is the same graph for a machine without one.
    Raises:
        MissingDependency: DALI is not installed.
    """
    serialized = _define(resolution, device).serialize()
    with atomic_file(path) as file:
        file.write(serialized)


def _define(resolution: int, device: Device) -> Any:
    dali, fn, types = _import_dali()
    pipeline = dali.Pipeline(
        batch_size=MAX_BATCH_SIZE,
        num_threads=_NUM_THREADS,
        device_id=None,  # the server's to choose
        output_dtype=[types.FLOAT],
        output_ndim=[3],
    )
    with pipeline:
        files = fn.external_source(name=INPUT, device="cpu", dtype=types.UINT8, ndim=1)
        pixels = fn.decoders.image(
            files,
            device="mixed" if device == "gpu" else "cpu",
            output_type=types.RGB,
            **_as_in_training(dali),
            jpeg_fancy_upsampling=True,  # chroma as Pillow interpolates it, on a GPU too
        )
        # Rounded to uint8, as Pillow's: without, overshooting edges differ by 14 levels instead of 6.
        pixels = fn.resize(
            pixels, size=(resolution, resolution), interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.UINT8
        )
        pixel_values = fn.crop_mirror_normalize(
            pixels,
            name=OUTPUT,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * each for each in IMAGE_MEAN],
            std=[255 * each for each in IMAGE_STD],
        )
        pipeline.set_outputs(pixel_values)
    return pipeline


def _as_in_training(dali: Any) -> dict[str, bool]:
    """Pictures stay as they lie. DALI 1.53 and 2.0 never turn them and know no such argument; Triton 25.10 has 1.51."""
    has_argument = dali.backend.GetSchema("decoders__Image").HasArgument("adjust_orientation")
    return {"adjust_orientation": False} if has_argument else {}


def _import_dali() -> tuple[Any, Any, Any]:
    try:
        return tuple(importlib.import_module(f"nvidia.dali{part}") for part in ("", ".fn", ".types"))  # type: ignore[return-value]
    except ImportError:
        raise MissingDependency("model.dali needs NVIDIA DALI: pip install 'tuwen[gpu]'") from None


def main(
    resolution: Annotated[int, typer.Option()],
    out: Annotated[Path, typer.Option()],
    device: Annotated[Device, typer.Option()] = "gpu",
) -> None:
    """Write model.dali."""
    write_pipeline(resolution, out, device)


if __name__ == "__main__":
    typer.run(main)
