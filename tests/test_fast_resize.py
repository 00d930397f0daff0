"""The fast resize beside Pillow's: on photographs, on black and white, on parts of a picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.test_image_transform import encode, photograph
from tuwen import fast_resize
from tuwen.fast_resize import is_fast, resize_fast
from tuwen.image_transform import preprocess_image, resize_image

pytestmark = pytest.mark.skipif(fast_resize.cykooz_resizer is None, reason="cykooz-resizer has no wheel here")

BOXES = (None, (0, 0, 900.5, 700.25), (13.5, 7.75, 800, 650.5))


def levels_apart(image: Image.Image, resolution: int, box: tuple[float, float, float, float] | None) -> np.ndarray:
    fast = resize_fast(image, resolution, box).astype(int)
    return np.abs(fast - resize_image(image, resolution, box))


@pytest.mark.parametrize("box", BOXES, ids=str)
@pytest.mark.parametrize("resolution", [64, 224])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_photograph_is_within_one_level(
    mode: str, resolution: int, box: tuple[float, float, float, float] | None
) -> None:
    apart = levels_apart(photograph(1000, 750).convert(mode), resolution, box)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.02


@pytest.mark.parametrize("size", [(672, 672), (900, 700), (1120, 1999), (5000, 672), (1999, 1501)])
def test_black_and_white_is_within_two_levels(size: tuple[int, int]) -> None:
    """Where a resize overshoots most, and clipping between the passes shows: 22 levels without it."""
    noise = np.random.default_rng(0).integers(0, 2, (size[1], size[0], 3), dtype=np.uint8) * 255
    assert levels_apart(Image.fromarray(noise), 224, None).max() <= 2


def test_tall_pictures_and_other_modes_are_left_to_pillow() -> None:
    assert [is_fast(photograph(100, height)) for height in (100, 199, 200, 1000)] == [True, True, False, False]
    assert [is_fast(photograph(8, 8).convert(mode)) for mode in ("RGB", "L", "RGBA", "CMYK", "P", "1")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


def test_without_the_library_pillow_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode(photograph(1000, 750), "JPEG", quality=90)
    fast = preprocess_image(encoded, 224, draft=True)
    monkeypatch.setattr(fast_resize, "cykooz_resizer", None)
    plain = preprocess_image(encoded, 224, draft=True)
    assert 0 < np.abs(fast - plain).max() < 0.02  # a level is 0.015
