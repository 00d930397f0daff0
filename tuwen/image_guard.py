"""Encoded picture -> a file that DALI decodes, to what `preprocess_image` would see. No torch.

    guard_image(encoded, 224) -> bytes

One file that DALI refuses fails all its batch-mates, and what it reads in another way gives other pixels. So only
ordinary JPEGs go on to it, which a GPU decodes, each read to its end before. All else is decoded and resized here, as
without a GPU, and handed over as a PPM of R x R, in which DALI's resize changes nothing; of PNG, WebP, GIF and the rest
a GPU decodes none.
"""

from __future__ import annotations

from PIL import Image

from tuwen.image_transform import open_image, read_drafted, refusals

# A batch of 32 then takes 1.6 GB of a GPU's memory at most; what is larger is drafted here, which is fast.
MAX_PASSED_PIXELS = 2**24
_BASELINE, _PROGRESSIVE, _SCAN = 0xC0, 0xC2, 0xDA
_HEADER_SEGMENTS = {*range(0xE0, 0xF0), 0xDB, 0xC4, 0xDD, 0xFE}  # APPn, DQT, DHT, DRI, COM
# Horizontal and vertical sampling of luma where chroma has 1 x 1: 4:4:4, 4:2:2 and 4:2:0.
_SAMPLINGS = ((1, 1), (2, 1), (2, 2))


def guard_image(encoded: bytes, resolution: int) -> bytes:
    """The file itself if it is an ordinary, intact JPEG, else a PPM of R x R with the pixels `preprocess_image` takes.

    Raises:
        InvalidInput: what `preprocess_image` refuses, with its sentence.
    """
    with refusals():
        image = open_image(encoded)
        if _is_ordinary_jpeg(image, encoded):
            # All of the entropy-coded data is read, though of each block the mean alone is computed: half the time.
            image.draft(None, (1, 1))
            image.load()
            return encoded
    return b"P6 %d %d 255\n" % (resolution, resolution) + read_drafted(encoded, resolution).tobytes()


def _is_ordinary_jpeg(image: Image.Image, encoded: bytes) -> bool:
    """Whether it is one of the kinds that every decoder reads alike: grey or YCbCr, 8 bits, no odd sampling."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
        return False
    if image.width * image.height > MAX_PASSED_PIXELS or _frame_marker(encoded) not in (_BASELINE, _PROGRESSIVE):
        return False
    components = image.layer  # type: ignore[attr-defined]  # (id, horizontal, vertical sampling, table) of each
    if image.mode == "L":
        return len(components) == 1
    # Decoders guess the colour space of a file that tells it in none of these ways, or in two that differ.
    is_ycbcr = "jfif" in image.info or "adobe" in image.info or [each[0] for each in components] == [1, 2, 3]
    samplings = [component[1:3] for component in components]
    is_usual = samplings[0] in _SAMPLINGS and samplings[1:] == [(1, 1)] * 2
    return is_usual and is_ycbcr and image.info.get("adobe_transform", 1) == 1


def _frame_marker(encoded: bytes) -> int | None:
    """The marker that says how a JPEG is coded; None if anything odd stands before its first scan.

    Pillow skips what is between two segments; other decoders refuse such a file.
    """
    frame, at = None, 2
    while encoded[at : at + 1] == b"\xff" and at + 4 <= len(encoded):
        marker, size = encoded[at + 1], int.from_bytes(encoded[at + 2 : at + 4])
        if marker == _SCAN:
            return frame
        if marker not in _HEADER_SEGMENTS:
            if frame is not None:
                return None
            frame = marker
        at += 2 + size
    return None
