"""Encoded picture -> pixel_values float32 (3, R, R): the one definition all stages share. No torch.

Equal to cn_clip's: resize to R x R bicubic *in the picture's own mode* (a palette picture by nearest neighbour,
RGBA with premultiplied alpha, CMYK as CMYK: what Pillow does for each), only then convert to RGB, scale to
[0, 1] and normalise by CLIP's mean and std. The aspect ratio is not kept, EXIF orientation is not applied,
transparency is dropped. Source: Chinese-CLIP cn_clip/clip/utils.py, image_transform.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from tuwen.errors import InvalidInput
from tuwen.fast_resize import is_fast, resize_fast
from tuwen.specs import IMAGE_MEAN, IMAGE_STD

MAX_IMAGE_BYTES = 32 * 2**20
MAX_IMAGE_PIXELS = 64 * 10**6  # 192 MB once decoded to RGB; any camera's photograph fits
# The largest side a JPEG can have. Pillow's resize costs memory by rows and columns: 1 x 64,000,000 pixels in a PNG of
# 311 kB took 7.6 s and 3.7 GB.
MAX_IMAGE_SIDE = 65_535
MAX_IMAGE_FRAMES = 1000
# Encoders write up to about twenty scans; each costs a pass over the whole picture, however few bytes it has:
# 300 scans in a file of 79 kB kept Pillow busy for 4.7 s.
MAX_JPEG_SCANS = 50
# Pillow walks through the parts of a file in Python, some a byte at a time: 30 MB of fill bytes took 14 s, 7 million
# empty segments 10 s. A PNG of MAX_IMAGE_BYTES in libpng's chunks of 8 kB needs some 12,000 reads.
MAX_FILE_READS = 100_000
# Numbers written out as text: 30 MB took 4.7 s.
MAX_PLAIN_PPM_BYTES = 4 * 2**20
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# A drafted JPEG keeps at least this many times R on both sides. `python -m perf.preprocess` measures what that
# does to the pixels: at 3 photographs stay within 5 of 255 inside the outermost row and column, at 2 within 10.
DRAFT_FACTOR = 3

_PLAIN_PPM = (b"P1", b"P2", b"P3")
_SCAN_MARKER = b"\xff\xda"  # cannot occur within a scan: there 0xff is always followed by 0 or a restart marker
_MEAN = np.array(IMAGE_MEAN, np.float32)[:, None, None]
_STD = np.array(IMAGE_STD, np.float32)[:, None, None]

Box = tuple[float, float, float, float]


def decode_image(encoded: bytes) -> Image.Image:
    """Decode a picture file of bounded size; the first frame of an animation.

    Raises:
        InvalidInput: empty, too large, of an unknown format, truncated or corrupt. The sentence says which.
    """
    with refusals():
        image = open_image(encoded)
        image.load()
    return image


def decode_drafted(encoded: bytes, resolution: int) -> tuple[Image.Image, Box | None]:
    """As `decode_image`, but a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size.

    Returns:
        The picture, and the part of it that the file's own size covers; None where that is the whole.
    """
    with refusals():
        image = open_image(encoded)
        least = DRAFT_FACTOR * resolution
        # Not CMYK: four scaled channels multiply in the conversion to RGB, which brought a corner off by 16 of 255.
        drafted = image.draft(None, (least, least)) if image.mode in ("RGB", "L") else None
        image.load()
    # A side that the scale does not divide is rounded up: the box leaves out what lies beyond the picture.
    return image, drafted[1] if drafted else None


class _CountedReads(io.BytesIO):
    """A file that may be read so many times, however short the reads."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_FILE_READS:
            raise InvalidInput(f"image has too many parts: more than {MAX_FILE_READS} reads")
        return super().read(size)


@contextmanager
def refusals() -> Iterator[None]:
    """Turns whatever a decoder raises into InvalidInput."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large and of odd files; the checks here decide
            yield
    except UnidentifiedImageError:
        raise InvalidInput(f"image is not a readable picture file (formats: {', '.join(IMAGE_FORMATS)})") from None
    except Image.DecompressionBombError:
        raise InvalidInput(f"image has more than {MAX_IMAGE_PIXELS} pixels, the limit") from None
    except InvalidInput:
        raise
    except Exception as error:  # a decoder may raise anything on a corrupt file; all of it is the file's fault
        raise InvalidInput(f"image cannot be decoded: {error}") from None


def open_image(encoded: bytes) -> Image.Image:
    """The header alone, within all bounds; nothing is decoded yet."""
    if not encoded:
        raise InvalidInput("image is empty, expected an encoded picture file")
    if len(encoded) > MAX_IMAGE_BYTES:
        raise InvalidInput(f"image has {len(encoded)} bytes, the limit is {MAX_IMAGE_BYTES}")
    if encoded.startswith(_PLAIN_PPM) and len(encoded) > MAX_PLAIN_PPM_BYTES:
        raise InvalidInput(f"image is a plain-text PPM of {len(encoded)} bytes, the limit is {MAX_PLAIN_PPM_BYTES}")
    image = Image.open(_CountedReads(encoded), formats=IMAGE_FORMATS)
    _check_size(image)
    _check_frames(image)
    # A scan of any other JPEG costs its own bytes; only a progressive one can say much with few.
    if "progressive" in image.info:
        _check_scans(encoded)
    return image


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise InvalidInput(f"image has {width} x {height} pixels, the limit is {MAX_IMAGE_PIXELS} in all")
    if max(width, height) > MAX_IMAGE_SIDE:
        raise InvalidInput(f"image has {width} x {height} pixels, the limit of a side is {MAX_IMAGE_SIDE}")
    if width == 0 or height == 0:
        raise InvalidInput(f"image has {width} x {height} pixels, expected at least 1 x 1")


def _check_frames(image: Image.Image) -> None:
    # These headers say how many. GIF and TIFF would have to be read to the end to be counted; Pillow does not read
    # past their first frame, so that the others cost nothing but their bytes.
    frames = getattr(image, "n_frames", 1) if image.format in ("WEBP", "PNG", "MPO") else 1
    if frames > MAX_IMAGE_FRAMES:
        raise InvalidInput(f"image has {frames} frames, the limit is {MAX_IMAGE_FRAMES}")


def _check_scans(encoded: bytes) -> None:
    scans = encoded.count(_SCAN_MARKER)
    if scans > MAX_JPEG_SCANS:
        raise InvalidInput(f"image has {scans} JPEG scans, the limit is {MAX_JPEG_SCANS}")


def resize_image(image: Image.Image, resolution: int, box: Box | None = None) -> npt.NDArray[np.uint8]:
    """uint8 (R, R, 3): resized in its own mode, then RGB."""
    return np.asarray(image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box).convert("RGB"))


def read_drafted(encoded: bytes, resolution: int) -> npt.NDArray[np.uint8]:
    """uint8 (R, R, 3) of a picture file, close to the published transform's and soon done; see DRAFT_FACTOR.

    A JPEG of at least DRAFT_FACTOR times R on both sides may be decoded at a fraction of its size and is resized by
    `resize_fast`; all else is exact.

    Raises:
        InvalidInput: see `decode_image`.
    """
    image, box = decode_drafted(encoded, resolution)
    is_large_jpeg = image.format in ("JPEG", "MPO") and min(image.size) >= DRAFT_FACTOR * resolution
    resize = resize_fast if is_large_jpeg and is_fast(image) else resize_image
    return resize(image, resolution, box)


def normalize_pixels(
    pixels: npt.NDArray[np.uint8], out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """float32 (3, R, R) of uint8 (R, R, 3): the same three roundings as ToTensor and Normalize."""
    planes = pixels.transpose(2, 0, 1)
    normalized = np.empty(planes.shape, np.float32) if out is None else out
    np.divide(planes, np.float32(255), out=normalized, dtype=np.float32)
    normalized -= _MEAN
    normalized /= _STD
    return normalized


def transform_image(image: Image.Image, resolution: int) -> npt.NDArray[np.float32]:
    """pixel_values float32 (3, R, R) of a decoded picture."""
    return normalize_pixels(resize_image(image, resolution))


def preprocess_image(
    encoded: bytes, resolution: int, *, draft: bool = False, out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """pixel_values float32 (3, R, R) of an encoded picture file.

    Args:
        draft: as `read_drafted`: a large JPEG faster, and no longer equal to the published transform to the bit.
        out: float32 (3, R, R) to write to.
    Raises:
        InvalidInput: see `decode_image`.
    """
    pixels = read_drafted(encoded, resolution) if draft else resize_image(decode_image(encoded), resolution)
    return normalize_pixels(pixels, out)
