"""What counts as an image on the way in, and its encoded file on the way out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from tuwen_client.errors import InvalidInput

ImageLike: TypeAlias = "str | Path | bytes | Image.Image | npt.NDArray[np.uint8]"

# Lossless, and in the picture's own mode: the server resizes in that mode, so a conversion here would move pixels.
# WebP where it can be: a photograph of 640 x 480 took half as long to encode as by PNG at its fastest level, and less
# to decode, at four fifths of the size. `exact` keeps the colours under transparency, which the server drops.
_WEBP: dict[str, Any] = {"format": "WEBP", "lossless": True, "quality": 0, "method": 0, "exact": True}
_PNG: dict[str, Any] = {"format": "PNG", "compress_level": 1}
_TIFF: dict[str, Any] = {"format": "TIFF"}
_ENCODINGS = {"RGB": _WEBP} | dict.fromkeys(("1", "L", "LA", "P", "RGBA", "I;16"), _PNG)
_ENCODINGS |= dict.fromkeys(("CMYK", "YCbCr", "LAB", "PA"), _TIFF)  # neither WebP nor PNG holds these
_MAX_WEBP_SIDE = 16_383  # source: the WebP container specification


def encode_image_file(image: ImageLike) -> bytes:
    """The file to send: bytes as they are, a path's content, a picture or array losslessly encoded.

    Args:
        image: encoded bytes, a path, a PIL image, or uint8 (H, W, 3), (H, W, 4), (H, W, 1) or (H, W).
    Raises:
        InvalidInput: the path cannot be read, nothing is in it, or the array or object is none of these.
    """
    if isinstance(image, bytes):
        encoded = image
    elif isinstance(image, (str, Path)):
        encoded = _read(Path(image))
    elif isinstance(image, np.ndarray):
        encoded = _encode(_from_array(image))
    elif isinstance(image, Image.Image):
        encoded = _encode(image)
    else:
        kind = type(image).__name__
        raise InvalidInput(f"a {kind} is no image; expected a path, bytes, a PIL image or a uint8 array")
    if not encoded:
        raise InvalidInput("image is empty, expected an encoded picture file")
    return encoded


def describe_image(image: object) -> str:
    """A few words that tell one image from another in an error."""
    if isinstance(image, (str, Path)):
        return str(image)
    if isinstance(image, bytes):
        return f"{len(image)} bytes"
    if isinstance(image, np.ndarray):
        return f"{image.dtype} array {image.shape}"
    if isinstance(image, Image.Image):
        return f"{image.mode} picture of {image.width} x {image.height}"
    return type(image).__name__


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InvalidInput(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _encode(picture: Image.Image) -> bytes:
    if 0 in picture.size:
        raise InvalidInput(f"picture has {picture.width} x {picture.height} pixels, expected at least 1 x 1")
    options = _ENCODINGS.get(picture.mode)
    if options is None:
        raise InvalidInput(f"picture has mode {picture.mode}, expected one of {', '.join(_ENCODINGS)}: convert it")
    if options is _WEBP and max(picture.size) > _MAX_WEBP_SIDE:
        options = _PNG
    file = io.BytesIO()
    try:
        picture.save(file, **options)
    except (OSError, SyntaxError, ValueError) as error:  # a lazily opened file is decoded here, and may be broken
        raise InvalidInput(f"picture cannot be encoded: {error}") from error
    return file.getvalue()


def _from_array(array: npt.NDArray[np.uint8]) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        raise InvalidInput(f"array is {array.dtype} {array.shape}, expected uint8 (H, W), (H, W, 3) or (H, W, 4)")
    return Image.fromarray(array.squeeze(2) if array.ndim == 3 and channels == 1 else array)
