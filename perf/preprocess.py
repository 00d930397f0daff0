"""How much faster is serving's preprocessing than the published transform, and what does that do to the pixels?

    python -m perf.preprocess            # the library, one thread; needs scikit-image and scikit-learn for photographs

Both sides of a comparison are run in turn, and the medians and their ratio printed; then the deviation of drafted
JPEGs from the exact pixels over photographs, in levels of 255.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from perf.published import published_transform
from perf.rounds import alternate, medians, milliseconds_of
from perf.workload import encode_jpeg, photographs
from tuwen.image_transform import preprocess_image
from tuwen.specs import IMAGE_STD

ROUNDS = 15
SIZES = ((2000, 1500), (640, 480), (224, 168), (64, 64))
# Sizes whose sides 2, 4 and 8 divide, and sizes they do not.
DEVIATION_SIZES = ((4000, 3000), (2000, 1500), (1999, 1501), (1333, 1000), (4001, 3001))


def compare(encoded: bytes, resolution: int) -> list[float]:
    """Median milliseconds of the published transform, of ours, and of ours as it is served."""
    out = np.empty((3, resolution, resolution), np.float32)
    sides: dict[str, Callable[[], object]] = {
        "published": partial(published_transform, encoded, resolution),
        "exact": partial(preprocess_image, encoded, resolution, out=out),
        "served": partial(preprocess_image, encoded, resolution, draft=True, out=out),
    }
    found = alternate({name: milliseconds_of(side) for name, side in sides.items()}, ROUNDS)
    return list(medians(found).values())


def report_times(pictures: dict[str, Image.Image], resolution: int) -> None:
    print(f"R = {resolution}: median ms of {len(pictures)} photographs x {ROUNDS}")
    print("     size  published  exact  served  ratio")
    for width, height in SIZES:
        rows = [compare(encode_jpeg(picture, (width, height)), resolution) for picture in pictures.values()]
        published, exact, served = (statistics.median(column) for column in zip(*rows, strict=True))
        ratio = published / served
        print(f"{width:4d}x{height:<4d}  {published:9.2f}  {exact:5.2f}  {served:6.2f}  {ratio:5.2f}", flush=True)


def deviation(encoded: bytes, resolution: int) -> npt.NDArray[np.float32]:
    """Levels of 255, (3, R, R), by which the drafted picture differs from the exact one."""
    exact = preprocess_image(encoded, resolution)
    drafted = preprocess_image(encoded, resolution, draft=True)
    levels = np.abs(drafted - exact) * (np.array(IMAGE_STD, np.float32)[:, None, None] * 255)
    return levels.round()


def report_deviation(pictures: dict[str, Image.Image], resolution: int) -> None:
    print(f"R = {resolution}: drafted against exact, levels of 255\n     size  max  max inside  mean  worst picture")
    for size in DEVIATION_SIZES:
        found = [
            (levels.max(), levels[:, 2:-2, 2:-2].max(), levels.mean(), name)
            for name, picture in pictures.items()
            for levels in (deviation(encode_jpeg(picture, size, chroma), resolution) for chroma in (0, 2))
        ]
        worst, inside = max(found), max(row[1] for row in found)
        mean = statistics.mean(float(row[2]) for row in found)
        print(f"{size[0]:4d}x{size[1]:<4d}  {worst[0]:3.0f}  {inside:10.0f}  {mean:.2f}  {worst[3]}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    pictures = dict(photographs())
    for resolution in (224, 64):
        report_times(pictures, resolution)
        report_deviation(pictures, resolution)


if __name__ == "__main__":
    main()
