"""Encoded picture -> pixel_values float32 (3, R, R): the one definition all stages share. No torch.

Equal to cn_clip's: resize to R x R bicubic *in the picture's own mode* (a palette picture by nearest neighbour,
RGBA with premultiplied alpha, CMYK as CMYK: what Pillow does for each), only then convert to RGB, scale to
[0, 1] and normalise by CLIP's mean and std. The aspect ratio is not kept, EXIF orientation is not applied,
transparency is dropped. Source: Chinese-CLIP cn_clip/clip/utils.py, image_transform.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from tuwen.errors import InvalidInput
from tuwen.specs import IMAGE_MEAN, IMAGE_STD

MAX_IMAGE_BYTES = 32 * 2**20
MAX_IMAGE_PIXELS = 64 * 10**6  # 192 MB once decoded to RGB; any camera's photograph fits
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# Normalised value of each byte, per channel: float32 (3, 256). The same three roundings as ToTensor and Normalize.
_NORMALIZED = (
    (np.arange(256, dtype=np.float32) / np.float32(255))[None, :] - np.array(IMAGE_MEAN, np.float32)[:, None]
) / np.array(IMAGE_STD, np.float32)[:, None]


def decode_image(encoded: bytes) -> Image.Image:
    """Decode a picture file of bounded size; the first frame of an animation.

    Raises:
        InvalidInput: empty, too large, of an unknown format, truncated or corrupt. The sentence says which.
    """
    if not encoded:
        raise InvalidInput("image is empty, expected an encoded picture file")
    if len(encoded) > MAX_IMAGE_BYTES:
        raise InvalidInput(f"image has {len(encoded)} bytes, the limit is {MAX_IMAGE_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of a large picture; the check below decides
            image = Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS)
        _check_size(image)
        image.load()
    except UnidentifiedImageError:
        raise InvalidInput(f"image is not a readable picture file (formats: {', '.join(IMAGE_FORMATS)})") from None
    except Image.DecompressionBombError:
        raise InvalidInput(f"image has far more than {MAX_IMAGE_PIXELS} pixels, the limit") from None
    except InvalidInput:
        raise
    except Exception as error:  # a decoder may raise anything on a corrupt file; all of it is the file's fault
        raise InvalidInput(f"image cannot be decoded: {error}") from None
    return image


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise InvalidInput(f"image has {width} x {height} pixels, the limit is {MAX_IMAGE_PIXELS} in all")
    if width == 0 or height == 0:
        raise InvalidInput(f"image has {width} x {height} pixels, expected at least 1 x 1")


def resize_image(image: Image.Image, resolution: int) -> npt.NDArray[np.uint8]:
    """uint8 (R, R, 3): resized in its own mode, then RGB."""
    return np.asarray(image.resize((resolution, resolution), Image.Resampling.BICUBIC).convert("RGB"))


def normalize_pixels(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """float32 (3, R, R) of uint8 (R, R, 3)."""
    return np.stack([_NORMALIZED[channel][pixels[..., channel]] for channel in range(3)])


def transform_image(image: Image.Image, resolution: int) -> npt.NDArray[np.float32]:
    """pixel_values float32 (3, R, R) of a decoded picture."""
    return normalize_pixels(resize_image(image, resolution))


def preprocess_image(encoded: bytes, resolution: int) -> npt.NDArray[np.float32]:
    """pixel_values float32 (3, R, R) of an encoded picture file.

    Raises:
        InvalidInput: see `decode_image`.
    """
    return transform_image(decode_image(encoded), resolution)
