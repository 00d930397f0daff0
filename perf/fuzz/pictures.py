"""Small valid pictures of every format and mode that the server reads: what the mutations start from."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image

_EXIF_ORIENTATION = 0x0112


@lru_cache(maxsize=1)
def seed_pictures() -> tuple[tuple[str, bytes], ...]:
    """(format, encoded file) of each; the first half of the list are the three formats most sent."""
    rgb, gray = _picture(37, 23), _picture(37, 23).convert("L")
    palette, bit = rgb.quantize(16), gray.convert("1")
    transparent = _with_alpha(rgb)
    deep = Image.fromarray(np.arange(29 * 17, dtype=np.uint16).reshape(17, 29) * 131)
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = 6
    frames = [_picture(12 + index, 11).resize((12, 11)) for index in range(3)]
    files = [
        ("JPEG", _encode(rgb, "JPEG", quality=80)),
        ("JPEG", _encode(rgb, "JPEG", quality=30, subsampling=0, restart_marker_blocks=2)),
        ("JPEG", _encode(rgb, "JPEG", progressive=True)),
        ("JPEG", _encode(gray, "JPEG", progressive=True)),
        ("JPEG", _encode(gray, "JPEG")),
        ("JPEG", _encode(rgb.convert("CMYK"), "JPEG")),
        ("JPEG", _encode(rgb, "JPEG", exif=exif, icc_profile=b"icc" * 20, dpi=(72, 72))),
        ("JPEG", _encode(_picture(450, 420), "JPEG", quality=5)),  # large enough to be drafted at R = 64
        ("PNG", _encode(rgb, "PNG")),
        ("PNG", _encode(gray, "PNG")),
        ("PNG", _encode(palette, "PNG")),
        ("PNG", _encode(palette, "PNG", transparency=3, bits=4)),
        ("PNG", _encode(bit, "PNG")),
        ("PNG", _encode(deep, "PNG")),
        ("PNG", _encode(transparent, "PNG")),
        ("PNG", _encode(transparent.convert("LA"), "PNG")),
        ("PNG", _encode(rgb, "PNG", transparency=(1, 2, 3))),
        ("PNG", _encode(frames[0], "PNG", save_all=True, append_images=frames[1:])),
        ("WEBP", _encode(rgb, "WEBP", quality=70)),
        ("WEBP", _encode(rgb, "WEBP", lossless=True)),
        ("WEBP", _encode(transparent, "WEBP", quality=50)),
        ("WEBP", _encode(transparent, "WEBP", exif=exif, lossless=True)),
        ("WEBP", _encode(frames[0], "WEBP", save_all=True, append_images=frames[1:])),
        ("GIF", _encode(palette, "GIF")),
        ("GIF", _encode(frames[0], "GIF", save_all=True, append_images=frames[1:])),
        ("BMP", _encode(rgb, "BMP")),
        ("BMP", _encode(palette, "BMP")),
        ("BMP", _encode(bit, "BMP")),
        *(("TIFF", _encode(rgb, "TIFF", compression=name)) for name in ("raw", "tiff_lzw", "tiff_deflate", "jpeg")),
        ("TIFF", _encode(rgb.convert("CMYK"), "TIFF")),
        ("TIFF", _encode(bit, "TIFF", compression="group4")),
        ("TIFF", _encode(gray.convert("F"), "TIFF")),
        ("TIFF", _encode(deep, "TIFF")),
        *(("TIFF", _encode(rgb.convert(mode), "TIFF")) for mode in ("YCbCr", "RGBX", "LA", "P", "I")),
        ("TIFF", _encode(Image.frombytes("LAB", rgb.size, rgb.tobytes()), "TIFF")),
        ("PPM", _encode(rgb, "PPM")),
        ("PPM", _encode(gray, "PPM")),
        ("PPM", _encode(bit, "PPM")),
        ("PPM", b"P3 3 2 255 " + b"12 200 7 " * 6),
    ]
    return tuple(files)


def _picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 / width, y * 255 / height, 127 + 120 * np.sin(x * y / 30)], axis=-1)
    return Image.fromarray((rgb + rng.normal(0, 8, rgb.shape)).clip(0, 255).astype(np.uint8))


def _with_alpha(image: Image.Image) -> Image.Image:
    copy = image.copy()
    copy.putalpha(Image.fromarray((np.indices(image.size[::-1]).sum(0) * 4 % 256).astype(np.uint8)))
    return copy


def _encode(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()
