"""What the guard lets through, what it decodes itself, and that it refuses exactly what the transform refuses."""

from __future__ import annotations

import io
from random import Random

import numpy as np
import pytest
from PIL import Image

from perf.fuzz.mutations import mutate_picture
from perf.fuzz.pictures import seed_pictures
from tests.test_image_transform import FILES, encode, jpeg_of_many_scans, photograph
from tuwen import image_guard
from tuwen.errors import InvalidInput
from tuwen.image_guard import guard_image
from tuwen.image_transform import preprocess_image

R = 64
JPEG = FILES["rgb jpeg"]
_SCAN, _ADOBE = b"\xff\xda", b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"


def insert_before_scan(encoded: bytes, part: bytes) -> bytes:
    at = encoded.index(_SCAN)
    return encoded[:at] + part + encoded[at:]


def without_jfif(encoded: bytes, component_ids: bytes = b"\1\2\3") -> bytes:
    """A JPEG as many cameras write it: nothing but its components' ids tells the colour space."""
    size = int.from_bytes(encoded[4:6])
    bare = bytearray(encoded[:2] + encoded[4 + size :])
    frame, scan = bare.index(b"\xff\xc0"), bare.index(_SCAN)
    for index, component_id in enumerate(component_ids):
        bare[frame + 10 + 3 * index] = bare[scan + 5 + 2 * index] = component_id
    return bytes(bare)


ORDINARY = {
    "4:2:0": JPEG,
    "4:2:2": encode(photograph(), "JPEG", subsampling=1),
    "4:4:4": encode(photograph(), "JPEG", subsampling=0),
    "progressive": encode(photograph(), "JPEG", progressive=True),
    "grey": encode(photograph().convert("L"), "JPEG"),
    "restart markers": encode(photograph(), "JPEG", restart_marker_blocks=3),
    "EXIF orientation": FILES["exif rotated"],
    "ICC profile": encode(photograph(), "JPEG", icc_profile=b"icc" * 50),
    "no JFIF": without_jfif(JPEG),
    "Adobe YCbCr": JPEG[:2] + _ADOBE + b"\1" + JPEG[2:],
}
ODD = {
    "CMYK": FILES["cmyk"],
    "RGB": encode(photograph(), "JPEG", keep_rgb=True),
    "Adobe says RGB, JFIF YCbCr": JPEG[:2] + _ADOBE + b"\0" + JPEG[2:],
    "unknown colour space": without_jfif(JPEG, b"\0\1\2"),
    "4:4:0": JPEG.replace(b"\x03\x01\x22\x00", b"\x03\x01\x12\x00"),
    "junk between segments": insert_before_scan(JPEG, b"junk"),
    "extended": JPEG.replace(b"\xff\xc0", b"\xff\xc1"),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_jpeg_goes_on_as_it_is(name: str) -> None:
    assert guard_image(ORDINARY[name], R) == ORDINARY[name]


OTHERS = {name: encoded for name, encoded in FILES.items() if name not in ("rgb jpeg", "exif rotated")} | ODD


@pytest.mark.parametrize("name", OTHERS)
def test_all_else_becomes_the_pixels_of_the_transform(name: str) -> None:
    encoded = OTHERS[name]
    guarded = guard_image(encoded, R)
    assert guarded.startswith(b"P6 64 64 255\n")
    assert len(guarded) == len(b"P6 64 64 255\n") + 3 * R * R
    assert np.array_equal(preprocess_image(guarded, R), preprocess_image(encoded, R))


def test_a_picture_too_large_for_a_batch_on_a_gpu_is_decoded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_guard, "MAX_PASSED_PIXELS", photograph().width * photograph().height - 1)
    guarded = guard_image(JPEG, R)
    assert np.array_equal(preprocess_image(guarded, R), preprocess_image(JPEG, R, draft=True))


def test_a_drafted_picture_keeps_to_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,001 columns at a half are 501, the last of which lies half beyond the picture."""
    monkeypatch.setattr(image_guard, "MAX_PASSED_PIXELS", 1)
    encoded = encode(photograph(1001, 777), "JPEG")
    assert np.array_equal(preprocess_image(guard_image(encoded, R), R), preprocess_image(encoded, R, draft=True))


def outcome(encoded: bytes, resolution: int, check: bool) -> str:
    try:
        guard_image(encoded, resolution) if check else preprocess_image(encoded, resolution, draft=True)
    except InvalidInput as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    "encoded", [b"", b"<html></html>", JPEG[:1500], jpeg_of_many_scans(60), FILES["rgb png"][:900]]
)
def test_a_bad_file_is_refused_with_the_transforms_sentence(encoded: bytes) -> None:
    assert outcome(encoded, R, check=True) == outcome(encoded, R, check=False) != "accepted"


def test_damaged_files_are_refused_where_the_transform_refuses_them() -> None:
    """Though of a JPEG the guard computes an eighth only: what it reads is the same."""
    rng, seeds = Random(0), [*seed_pictures(), *(("JPEG", encoded) for encoded in ORDINARY.values())]
    refused = 0
    for _ in range(1500):
        format, encoded = rng.choice(seeds)
        damaged = mutate_picture(rng, format, encoded, rng.choice(seeds)[1])
        expected = outcome(damaged, R, check=False)
        assert outcome(damaged, R, check=True) == expected
        refused += expected != "accepted"
    assert 300 < refused < 1400, "both answers were compared"


def test_every_jpeg_on_the_way_has_its_header_in_order() -> None:
    """DALI's parser refuses a file with anything between two segments, which Pillow and libjpeg skip."""
    damaged = insert_before_scan(JPEG, b"\0")
    assert Image.open(io.BytesIO(damaged)).size == photograph().size
    assert guard_image(damaged, R).startswith(b"P6")
