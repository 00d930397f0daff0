"""Pixels equal the published transform's, bad files say why."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tuwen.errors import InvalidInput
from tuwen.hub import image_transform
from tuwen.image_transform import MAX_IMAGE_BYTES, MAX_IMAGE_FRAMES, preprocess_image
from tuwen.specs import IMAGE_MEAN, IMAGE_STD


def photograph(width: int = 157, height: int = 98) -> Image.Image:
    """A deterministic picture with edges, gradients and noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 / width, y * 255 / height, 127 + 120 * np.sin(x * y / 300)], axis=-1)
    rgb[20:60, 30:90] = (250, 20, 60)
    return Image.fromarray((rgb + rng.normal(0, 8, rgb.shape)).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def published_transform(encoded: bytes, resolution: int) -> torch.Tensor:
    """torchvision's Resize, convert, ToTensor and Normalize, which cn_clip composes, in their own steps.

    torchvision's Resize of a PIL image is PIL's resize; ToTensor divides by 255; Normalize subtracts and divides.
    """
    image = Image.open(io.BytesIO(encoded)).resize((resolution, resolution), Image.Resampling.BICUBIC).convert("RGB")
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div(255)
    mean, std = torch.tensor(IMAGE_MEAN)[:, None, None], torch.tensor(IMAGE_STD)[:, None, None]
    return tensor.sub(mean).div(std)


def _with_alpha(image: Image.Image) -> Image.Image:
    alpha = Image.fromarray((np.indices(image.size[::-1]).sum(0) % 256).astype(np.uint8))
    image.putalpha(alpha)
    return image


def _rotated_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


FILES = {
    "rgb jpeg": encode(photograph(), "JPEG", quality=90),
    "rgb png": encode(photograph(), "PNG"),
    "grayscale": encode(photograph().convert("L"), "PNG"),
    "rgba": encode(_with_alpha(photograph()), "PNG"),
    "grayscale alpha": encode(_with_alpha(photograph()).convert("LA"), "PNG"),
    "palette": encode(photograph().quantize(64), "PNG"),
    "palette gif": encode(photograph().quantize(64), "GIF"),
    "cmyk": encode(photograph().convert("CMYK"), "JPEG"),
    "exif rotated": encode(photograph(), "JPEG", exif=_rotated_exif()),
    "one bit": encode(photograph().convert("1"), "PNG"),
    "16 bit": encode(Image.fromarray(np.arange(5000, dtype=np.uint16).reshape(50, 100)), "PNG"),
    "webp": encode(photograph(), "WEBP", lossless=True),
    "already R x R": encode(photograph(64, 64), "PNG"),
    "1 x 1": encode(photograph(1, 1), "PNG"),
}


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("resolution", [64, 224])
def test_pixels_equal_the_published_transform(name: str, resolution: int) -> None:
    ours = preprocess_image(FILES[name], resolution)
    assert ours.shape == (3, resolution, resolution)
    assert ours.dtype == np.float32
    assert np.array_equal(ours, published_transform(FILES[name], resolution).numpy())


def test_the_order_of_resize_and_convert_matters_for_palettes() -> None:
    """What the docstring says of cn_clip's order can be seen: converting first would give other pixels."""
    ours = preprocess_image(FILES["palette"], 224)
    converted_first = encode(Image.open(io.BytesIO(FILES["palette"])).convert("RGB"), "PNG")
    assert not np.array_equal(ours, preprocess_image(converted_first, 224))


def test_the_public_transform_takes_a_pil_image() -> None:
    transformed = image_transform(64)(Image.open(io.BytesIO(FILES["rgba"])))
    assert transformed.equal(torch.from_numpy(preprocess_image(FILES["rgba"], 64)))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "empty"),
        (b"garbage that is no picture", "not a readable picture"),
        (FILES["rgb jpeg"][:1500], "cannot be decoded: .*truncated"),
        (FILES["rgb png"][:2000], "cannot be decoded"),
        (png_header(20_000, 20_000), "pixels, the limit"),
        (png_header(9_000, 9_000), "9000 x 9000 pixels, the limit"),
        (b"\xff\xd8" + bytes(MAX_IMAGE_BYTES), "bytes, the limit"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a readable picture"),
    ],
    ids=["empty", "garbage", "truncated jpeg", "truncated png", "bomb", "large", "many bytes", "postscript"],
)
def test_a_bad_file_is_refused_with_its_reason(encoded: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)  # Pillow's own, which servers in this process change
    with pytest.raises(InvalidInput, match=reason):
        preprocess_image(encoded, 224)


def jpeg_of_many_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated: each costs a few bytes and a pass over all pixels."""
    encoded = encode(Image.new("L", (64, 64)), "JPEG", progressive=True)
    last_scan = encoded[encoded.rindex(b"\xff\xc4") : -2]
    return encoded[:-2] + last_scan * scans + b"\xff\xd9"


def animation(format: str, frames: int) -> bytes:
    pictures = [Image.new("RGB", (2, 2), (255 * (index % 2), index % 256, 0)) for index in range(frames)]
    return encode(pictures[0], format, save_all=True, append_images=pictures[1:])


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (jpeg_of_many_scans(100), "JPEG scans, the limit is 50"),
        (animation("PNG", MAX_IMAGE_FRAMES + 1), "1001 frames, the limit is 1000"),
        (animation("WEBP", MAX_IMAGE_FRAMES + 1), "1001 frames, the limit is 1000"),
    ],
    ids=["scans", "apng", "webp"],
)
def test_what_a_small_file_could_cost_is_bounded(encoded: bytes, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        preprocess_image(encoded, 64)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(format: str) -> None:
    assert np.array_equal(preprocess_image(animation(format, 3), 8), preprocess_image(animation(format, 1), 8))


LARGE = {
    "divides": photograph(2000, 1500),
    "does not divide": photograph(2001, 1503),
    "gray": photograph(2000, 1500).convert("L"),
}


@pytest.mark.parametrize("name", sorted(LARGE))
@pytest.mark.parametrize("resolution", [64, 224])
def test_a_drafted_jpeg_stays_close_to_the_exact_one(name: str, resolution: int) -> None:
    """Within 5 of 255, 10 in the outermost rows and columns: what DRAFT_FACTOR says of photographs."""
    encoded = encode(LARGE[name], "JPEG", quality=90)
    exact = preprocess_image(encoded, resolution)
    drafted = preprocess_image(encoded, resolution, draft=True)
    levels = np.abs(drafted - exact) * np.array(IMAGE_STD, np.float32)[:, None, None] * 255
    assert 0 < levels.max() <= 10.5
    assert levels[:, 2:-2, 2:-2].max() <= 5.5
    assert levels.mean() < 0.6


def test_a_large_cmyk_jpeg_is_not_drafted() -> None:
    encoded = encode(photograph(2001, 1503).convert("CMYK"), "JPEG")
    assert np.array_equal(preprocess_image(encoded, 64, draft=True), preprocess_image(encoded, 64))


@pytest.mark.parametrize("name", sorted(FILES))
def test_small_pictures_and_other_formats_are_not_drafted(name: str) -> None:
    assert np.array_equal(preprocess_image(FILES[name], 64, draft=True), preprocess_image(FILES[name], 64))


def test_pixels_are_written_where_they_are_asked_for() -> None:
    batch = np.zeros((2, 3, 64, 64), np.float32)
    preprocess_image(FILES["rgb png"], 64, out=batch[1])
    assert np.array_equal(batch[1], preprocess_image(FILES["rgb png"], 64))
    assert not batch[0].any()
