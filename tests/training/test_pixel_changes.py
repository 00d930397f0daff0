"""RandAugment's changes, each against Pillow's, on random pictures."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from training import pixel_changes
from training.pixel_changes import CHANGES, Change

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE, BATCH = 40, 6
AMOUNTS = [-1.0, -0.9, -0.35, 0.5, 0.9, 1.0]
# Pillow rounds to a whole value of 255 after each of the few operations of a change.
ROUNDING = 2.1 / 255
# One value more or less on either side of a threshold or in a table is another value altogether: 8 bits are exact.
EXACT = 1e-5


def random_pictures(seed: int) -> list[Image.Image]:
    """Of 8 bits, each with a contrast and a mean of its own."""
    generator = np.random.default_rng(seed)
    pictures = []
    for _ in range(BATCH):
        low, high = sorted(generator.choice(256, 2, replace=False))
        pictures.append(Image.fromarray(generator.integers(low, high + 1, (SIDE, SIDE, 3), dtype=np.uint8)))
    return pictures


def to_pixels(pictures: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(one)) for one in pictures]).permute(0, 3, 1, 2) / 255


def both(change: Change, pillow: Callable[[Image.Image, float], Image.Image], seed: int) -> tuple[Tensor, Tensor]:
    """Ours, of the batch at once with an amount each, and Pillow's, of each picture."""
    pictures = random_pictures(seed)
    ours = change(to_pixels(pictures), torch.tensor(AMOUNTS))
    theirs = to_pixels([pillow(one, amount) for one, amount in zip(pictures, AMOUNTS, strict=True)])
    return ours, theirs


def enhance(kind: type[ImageEnhance._Enhance]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda picture, amount: kind(picture).enhance(1 + 0.9 * amount)


PILLOW: dict[Change, tuple[Callable[[Image.Image, float], Image.Image], float]] = {
    pixel_changes.keep: (lambda picture, amount: picture, 0),
    pixel_changes.autocontrast: (lambda picture, amount: ImageOps.autocontrast(picture), ROUNDING),
    pixel_changes.equalize: (lambda picture, amount: ImageOps.equalize(picture), EXACT),
    pixel_changes.solarize: (
        lambda picture, amount: ImageOps.solarize(picture, math.ceil(256 - 256 * abs(amount))), EXACT,
    ),
    pixel_changes.posterize: (lambda picture, amount: ImageOps.posterize(picture, 8 - round(4 * abs(amount))), EXACT),
    pixel_changes.colour: (enhance(ImageEnhance.Color), ROUNDING),
    pixel_changes.contrast: (enhance(ImageEnhance.Contrast), ROUNDING),
    pixel_changes.brightness: (enhance(ImageEnhance.Brightness), ROUNDING),
    pixel_changes.sharpness: (enhance(ImageEnhance.Sharpness), ROUNDING),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("change", PILLOW, ids=lambda change: change.__name__)
def test_values_are_pillows(change: Change, seed: int) -> None:
    """At both signs and both ends of the scale."""
    pillow, tolerance = PILLOW[change]
    ours, theirs = both(change, pillow, seed)
    assert (ours - theirs).abs().max() <= tolerance
    if change is not pixel_changes.keep:
        assert (
            theirs - to_pixels(random_pictures(seed))
        ).abs().max() > 0.05  # Pillow changed something: posterize takes 15 of 255 at most


def about_the_middle(xx: float, xy: float, yx: float, yy: float, x: float = 0, y: float = 0) -> tuple[float, ...]:
    """Image.transform's six numbers for a matrix about the picture's middle and a shift, in shares of the side."""
    half = SIDE / 2
    return (xx, xy, half - half * (xx + xy) + SIDE * x, yx, yy, half - half * (yx + yy) + SIDE * y)


def turn(amount: float) -> tuple[float, ...]:
    angle = math.radians(30 * amount)
    return about_the_middle(math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle))


WARPS: dict[Change, Callable[[float], tuple[float, ...]]] = {
    pixel_changes.rotate: turn,
    pixel_changes.shear_x: lambda amount: about_the_middle(1, 0.3 * amount, 0, 1),
    pixel_changes.shear_y: lambda amount: about_the_middle(1, 0, 0.3 * amount, 1),
    pixel_changes.translate_x: lambda amount: about_the_middle(1, 0, 0, 1, x=0.45 * amount),
    pixel_changes.translate_y: lambda amount: about_the_middle(1, 0, 0, 1, y=0.45 * amount),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("change", WARPS, ids=lambda change: change.__name__)
def test_places_are_pillows(change: Change, seed: int) -> None:
    """Where the lookup touches no border, of which Pillow makes an edge and we a fade into white."""

    def transform(picture: Image.Image, amount: float) -> Image.Image:
        white = (255,) * len(picture.getbands())
        return picture.transform(
            picture.size, Image.Transform.AFFINE, WARPS[change](amount), Image.Resampling.BILINEAR, fillcolor=white
        )

    inner = Image.new("RGB", (SIDE, SIDE), "white")
    inner.paste((0, 0, 0), (1, 1, SIDE - 1, SIDE - 1))
    ours, theirs = both(change, transform, seed)
    covered = to_pixels([transform(inner, amount) for amount in AMOUNTS]) == 0
    assert covered.float().mean() > 0.4
    assert ((ours - theirs).abs() * covered).max() <= ROUNDING
    outside = to_pixels([transform(Image.new("RGB", (SIDE, SIDE)), amount) for amount in AMOUNTS]) == 1
    far = outside & (change(torch.zeros(BATCH, 3, SIDE, SIDE), torch.tensor(AMOUNTS)) == 1)
    assert far.float().sum() > 0.7 * outside.float().sum() > 0
    assert (ours[far] == 1).all()


def test_every_change_is_compared() -> None:
    assert set(CHANGES) == {*PILLOW, *WARPS}


def test_a_picture_of_one_colour_survives() -> None:
    """Neither a division by a contrast of 0 nor a step of 0 values."""
    pixels = torch.full((1, 3, SIDE, SIDE), 0.4)
    for change in (pixel_changes.autocontrast, pixel_changes.equalize):
        assert torch.equal(change(pixels, torch.ones(1)), pixels)


def test_an_amount_of_nothing_is_nothing() -> None:
    """But for the two that have no amount. 1e-5: a lookup at the pixels' own places, in float32."""
    pixels = to_pixels(random_pictures(0))
    for change in set(CHANGES) - {pixel_changes.autocontrast, pixel_changes.equalize}:
        assert (change(pixels, torch.zeros(BATCH)) - pixels).abs().max() <= 1e-5, change


def test_the_input_is_left_alone() -> None:
    pixels = to_pixels(random_pictures(0))
    before = pixels.clone()
    for change in CHANGES:
        change(pixels, torch.tensor(AMOUNTS))
        assert torch.equal(pixels, before), change
