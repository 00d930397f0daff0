"""Pillow's bicubic resize, several times as fast and within a level of 255 of it, 2 between black and white. No torch.

The library goes over columns first; Pillow over rows, and clips to [0, 255] in between, which edges show. So each pass
is a call of its own, in Pillow's order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

try:
    import cykooz_resizer
except ImportError:  # it has no wheel for Linux on ARM
    cykooz_resizer = None


def is_fast(image: Image.Image) -> bool:
    """Whether `resize_fast` takes this picture here; all others are Pillow's own.

    Of a picture twice as tall as wide, Pillow 13 goes over columns first, and earlier versions do not.
    """
    return cykooz_resizer is not None and image.mode in ("RGB", "L") and image.height < 2 * image.width


def resize_fast(
    image: Image.Image, resolution: int, box: tuple[float, float, float, float] | None = None
) -> npt.NDArray[np.uint8]:
    """uint8 (R, R, 3) of an RGB or L picture, loaded, or of the part of it in `box`; at least 3 R on both sides.

    Of smaller pictures, and larger results, some pixels are further from Pillow's.
    """
    width, height = image.size
    left, top, right, bottom = box or (0, 0, width, height)
    # Four bytes a pixel, the fourth unused, as Pillow keeps them: to be copied out they need not be packed.
    kind = cykooz_resizer.PixelType.U8 if image.mode == "L" else cykooz_resizer.PixelType.U8x4
    pixels = image.tobytes() if image.mode == "L" else image.tobytes("raw", "RGBX")
    whole = cykooz_resizer.ImageData(width, height, kind, pixels)
    narrow = cykooz_resizer.ImageData(resolution, height, kind)
    small = cykooz_resizer.ImageData(resolution, resolution, kind)
    _resize(whole, narrow, cykooz_resizer.CropBox(left, 0, right - left, height))
    _resize(narrow, small, cykooz_resizer.CropBox(0, top, resolution, bottom - top))
    resized = np.frombuffer(small.get_buffer(), np.uint8).reshape(resolution, resolution, -1)
    return np.broadcast_to(resized, (resolution, resolution, 3)) if image.mode == "L" else resized[..., :3]


def _resize(source: object, target: object, part: object) -> None:
    bicubic = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.catmull_rom)  # Pillow's: a = -0.5
    options = cykooz_resizer.ResizeOptions(bicubic, use_alpha=False, crop_box=part)
    cykooz_resizer.Resizer().resize(source, target, options)
