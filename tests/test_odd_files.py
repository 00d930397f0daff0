"""What a file, or a stream of texts, may cost a server: found by `python -m perf.fuzz`, or by looking for it."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.test_image_transform import encode, photograph
from tuwen.errors import InvalidInput
from tuwen.image_transform import MAX_IMAGE_SIDE, MAX_PLAIN_PPM_BYTES, preprocess_image
from tuwen.tokenizer import _CLEAN, _SPLIT, MAX_TABLE_ENTRIES, split_words


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def after_start(encoded: bytes, inserted: bytes) -> bytes:
    """The file with something between its signature, and a PNG's header, and the rest."""
    at = 33 if encoded.startswith(b"\x89PNG") else 2
    return encoded[:at] + inserted + encoded[at:]


JPEG, PNG = encode(photograph(), "JPEG"), encode(photograph(), "PNG")


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (after_start(JPEG, b"\xff\xe1\x00\x02" * 400_000), "too many parts"),
        (after_start(JPEG, b"\xff" * 400_000), "too many parts"),
        (after_start(JPEG, b"\xff\xfe\x00\x02" + bytes(400_000)), "too many parts"),
        (after_start(PNG, chunk(b"gAMA", b"\0\0\0\1") * 400_000), "too many parts"),
        (encode(Image.new("L", (MAX_IMAGE_SIDE + 1, 1)), "PNG"), "65536 x 1 pixels, the limit of a side is 65535"),
        (encode(Image.new("L", (1, MAX_IMAGE_SIDE + 1)), "PNG"), "the limit of a side"),
        (b"P3 2000 2000 255 " + b"1 " * (MAX_PLAIN_PPM_BYTES // 2), "plain-text PPM of 4194321 bytes"),
    ],
    ids=["segments", "fill bytes", "junk", "chunks", "wide", "tall", "plain ppm"],
)
def test_what_would_cost_seconds_is_refused(encoded: bytes, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        preprocess_image(encoded, 224)


def test_the_longest_side_is_accepted() -> None:
    assert preprocess_image(encode(Image.new("L", (MAX_IMAGE_SIDE, 1)), "PNG"), 8).shape == (3, 8, 8)


def test_a_large_png_in_small_chunks_is_accepted() -> None:
    """12 MB in libpng's pieces of 8 kB: an honest file stays far from the limit of reads."""
    noise = np.random.default_rng(0).integers(0, 255, (2000, 2000, 3), dtype=np.uint8)
    whole = encode(Image.fromarray(noise), "PNG", compress_level=0)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in noise), 0)
    pieces = b"".join(chunk(b"IDAT", packed[at : at + 8192]) for at in range(0, len(packed), 8192))
    assert np.array_equal(preprocess_image(whole[:33] + pieces + chunk(b"IEND", b""), 64), preprocess_image(whole, 64))


def test_every_character_there_is_does_not_fill_the_memory() -> None:
    for start in range(0, 0x110000, 0x1000):
        split_words("".join(map(chr, range(start, start + 0x1000))))
        assert len(_CLEAN) <= MAX_TABLE_ENTRIES
        assert len(_SPLIT) <= MAX_TABLE_ENTRIES
    assert split_words("一只Äpfel!") == ["一", "只", "apfel", "!"]


def test_counting_reads_changes_no_pixel_of_a_file_on_disk() -> None:
    """Pillow looks at what kind of file it is given; a TIFF is read through libtiff."""
    encoded = encode(photograph(), "TIFF", compression="tiff_lzw")
    direct = Image.open(io.BytesIO(encoded)).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(preprocess_image(encoded, 64), preprocess_image(encode(direct, "PNG"), 64))
