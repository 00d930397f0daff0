"""Augmentation: each setting does what its name says, and nothing when it is zero."""

from __future__ import annotations

import colorsys
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from training.augment import augment
from training.recipe import AugmentSection, load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 32
EVERYTHING = AugmentSection(
    crop_area=(0.3, 0.9), rand_augment_changes=3, rand_augment_strength=10,
    rotate_degrees=180, min_scale=0.5, max_scale=2, stretch=0.5, shear=0.5, translate=0.5, brightness=0.9,
    contrast=0.9, saturation=3, hue_degrees=180, grayscale=0.3, blur=0.5, erase=0.5,
)  # fmt: skip
EMOJI_TINY = Path(__file__).parents[2] / "training" / "recipes" / "emoji_tiny.toml"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_pixels(batch: int = 8, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.empty(batch, 3, SIDE, SIDE).uniform_(low, high, generator=seeded(99))


def changed_pictures(before: Tensor, after: Tensor) -> Tensor:
    """Bool (B,)."""
    return (after - before).abs().amax(dim=(1, 2, 3)) > 1e-4


@pytest.mark.parametrize("recipe", [
    AugmentSection(), AugmentSection(rand_augment_changes=2, rand_augment_strength=0), AugmentSection(crop_area=(1, 1)),
])  # fmt: skip
def test_zero_settings_change_nothing(recipe: AugmentSection) -> None:
    """And cost nothing: not a copy, not a number of the generator."""
    pixels, generator = random_pixels(), seeded()
    assert augment(pixels, recipe, generator) is pixels
    assert torch.equal(generator.get_state(), seeded().get_state())


@pytest.mark.parametrize("setting", ["blur", "erase", "grayscale"])
def test_a_probability_of_almost_nothing_changes_nothing(setting: str) -> None:
    """No picture was drawn, which is a batch of none for what changes them."""
    pixels = random_pixels()
    after = augment(pixels, AugmentSection.model_validate({setting: 1e-9}), seeded())
    assert not changed_pictures(pixels, after).any()


def test_the_range_stays() -> None:
    """Extreme settings on pixels that reach 0 and 1."""
    after = augment(random_pixels(64).mul(2).sub(0.5).clamp(0, 1), EVERYTHING, seeded())
    assert after.shape == (64, 3, SIDE, SIDE)
    assert torch.isfinite(after).all()
    assert after.min() >= 0
    assert after.max() <= 1


def test_the_generator_decides_and_nothing_else() -> None:
    """The same seed gives the same pictures, another others, and the global state is left alone."""
    pixels, state = random_pixels(), torch.get_rng_state()
    first = augment(pixels, EVERYTHING, seeded(1))
    torch.rand(1)
    assert torch.equal(first, augment(pixels, EVERYTHING, seeded(1)))
    assert changed_pictures(first, augment(pixels, EVERYTHING, seeded(2))).all()
    torch.set_rng_state(state)
    augment(pixels, EVERYTHING, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_each_picture_has_changes_of_its_own() -> None:
    """A batch of one picture repeated does not stay one."""
    after = augment(random_pixels(1).expand(8, -1, -1, -1), EVERYTHING, seeded())
    assert len({one.numpy().tobytes() for one in after}) == 8


def test_the_input_is_left_alone() -> None:
    pixels = random_pixels()
    before = pixels.clone()
    augment(pixels, EVERYTHING, seeded())
    assert torch.equal(pixels, before)


# --- where the picture lies -------------------------------------------------------------------------------------


def test_corners_are_white_after_a_rotation() -> None:
    """Black squares keep their centre; what turns into the corners is white, not black."""
    after = augment(torch.zeros(32, 3, SIDE, SIDE), AugmentSection(rotate_degrees=180), seeded())
    assert (after[:, :, SIDE // 2, SIDE // 2] <= 1e-5).all()
    corners = after[:, 0, 0, 0]
    assert (corners >= 1 - 1e-5).sum() >= 16  # of angles drawn from -180..180, few leave a corner covered


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_scale_is_the_pictures_size(scale: float) -> None:
    """A black square of 8 on white has sides of 8 * scale."""
    pixels = torch.ones(4, 3, SIDE, SIDE)
    pixels[:, :, 12:20, 12:20] = 0
    after = augment(pixels, AugmentSection(min_scale=scale, max_scale=scale), seeded())
    area = (1 - after[:, 0]).sum(dim=(1, 2))
    # Bilinear lookup at half size samples every other pixel: the edge may count for up to one pixel a side.
    assert area.sqrt() == pytest.approx(torch.full((4,), 8 * scale), abs=1)


@pytest.mark.parametrize("setting", ["stretch", "shear", "translate", "rotate_degrees"])
def test_warps_move_the_ink_and_keep_it(setting: str) -> None:
    """A dot in the middle goes elsewhere or changes shape, and about as much of it is left."""
    pixels = torch.ones(16, 3, SIDE, SIDE)
    pixels[:, :, 10:18, 13:25] = 0
    value = 30 if setting == "rotate_degrees" else 0.25
    after = augment(pixels, AugmentSection.model_validate({setting: value}), seeded())
    assert changed_pictures(pixels, after).sum() >= 14
    ink = (1 - after[:, 0]).sum(dim=(1, 2))
    assert ink == pytest.approx(torch.full((16,), 8.0 * 12.0), rel=0.1)  # area is kept, but for bilinear edges


def test_a_turned_picture_is_scaled_both_ways() -> None:
    """Turning and scaling at once keep shapes: a square of 16 at half size has an area of 64 at any angle."""
    pixels = torch.ones(16, 3, SIDE, SIDE)
    pixels[:, :, 8:24, 8:24] = 0
    settings = AugmentSection(rotate_degrees=180, min_scale=0.5, max_scale=0.5)
    area = (1 - augment(pixels, settings, seeded())[:, 0]).sum(dim=(1, 2))
    assert area == pytest.approx(torch.full((16,), 64.0), rel=0.1)  # bilinear edges


# --- crops ------------------------------------------------------------------------------------------------------


def coordinates(batch: int, side: int = SIDE) -> Tensor:
    """Pictures whose red is the column and whose green is the row, from 0 at one edge to 1 at the other."""
    places = (torch.arange(side) + 0.5) / side
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    return torch.stack([columns, rows, torch.zeros_like(rows)]).expand(batch, -1, -1, -1)


def corners(after: Tensor) -> Tensor:
    """(B, 2, 2) of crops of `coordinates`: left and top, right and bottom, by the steps within the crop."""
    side = after.shape[-1]
    left_top = torch.stack([after[:, 0, 8, 8], after[:, 1, 8, 8]], dim=1)
    right_bottom = torch.stack([after[:, 0, -9, -9], after[:, 1, -9, -9]], dim=1)
    step = (right_bottom - left_top) / (side - 17)
    return torch.stack([left_top - 8.5 * step, right_bottom + 8.5 * step], dim=1)


@pytest.mark.parametrize("area", [(0.9, 1.0), (0.3, 0.7), (0.05, 0.05)])
def test_a_crop_is_a_part_of_the_picture(area: tuple[float, float]) -> None:
    """Its area and its aspect ratio are within their limits, it lies inside, and all of this is used.

    To 1e-3 of the side: a cubic of 128 pixels bends a ramp by 0.02 of one.
    """
    found = corners(augment(coordinates(500, 128), AugmentSection(crop_area=area), seeded()))
    assert found.min() >= -1e-3
    assert found.max() <= 1 + 1e-3
    width, height = (found[:, 1] - found[:, 0]).unbind(dim=1)
    areas, ratios = width * height, width / height
    assert areas.min() >= area[0] - 2e-3
    assert areas.max() <= area[1] + 2e-3
    assert areas.mean() == pytest.approx(sum(area) / 2, abs=0.02 * (area[1] - area[0]) + 1e-3)
    limit = min(math.log(4 / 3), -math.log(area[0]))  # beyond, a crop is wider than the picture
    assert 0.9 * limit <= ratios.log().abs().max() <= limit + 5e-3
    assert ratios.log().mean() == pytest.approx(0, abs=0.02)
    middle = found.mean(dim=1)
    assert middle.mean(dim=0) == pytest.approx(torch.tensor([0.5, 0.5]), abs=0.02)
    assert found[:, 0].min() <= 0.01  # some begin at the edge
    assert found[:, 1].max() >= 0.99


def test_a_crop_is_enlarged_as_pillow_enlarges() -> None:
    """On smooth pictures: Pillow's cubic has other coefficients (-0.5, ours -0.75), seen only where values jump."""
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)
    settings = AugmentSection(crop_area=(0.5, 0.9))
    boxes = corners(augment(coordinates(8, 64), settings, seeded())).flatten(1) * 64
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).expand(8, -1, -1, -1) / 255
    for ours, box in zip(augment(pixels, settings, seeded()), boxes.clamp(0, 64).tolist(), strict=True):
        resized = picture.resize((64, 64), Image.Resampling.BICUBIC, box=tuple(box))
        theirs = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
        assert (ours - theirs).abs().mean() <= 1 / 255
        assert (ours - theirs)[:, 2:-2, 2:-2].abs().max() <= 5 / 255


# --- RandAugment --------------------------------------------------------------------------------------------------


def test_so_many_changes_are_drawn() -> None:
    """One of 14 leaves a picture alone; two rounds leave 1 in 14 x 14."""
    pixels = random_pixels(1, 0.2, 0.8).expand(700, -1, -1, -1)
    settings = AugmentSection(rand_augment_changes=1, rand_augment_strength=5)
    kept = 700 - int(changed_pictures(pixels, augment(pixels, settings, seeded())).sum())
    assert 25 <= kept <= 80  # 50, give or take more than 3.5 standard deviations
    twice = settings.model_copy(update={"rand_augment_changes": 2})
    assert 700 - int(changed_pictures(pixels, augment(pixels, twice, seeded())).sum()) <= 14


def test_strength_is_how_far_they_go() -> None:
    """Of the same draws, the stronger ones are further from the picture."""
    pixels = random_pixels(100)

    def distance(strength: float) -> float:
        settings = AugmentSection(rand_augment_changes=1, rand_augment_strength=strength)
        return float((augment(pixels, settings, seeded()) - pixels).abs().mean())

    assert distance(1) < distance(4) < distance(10)


def test_changes_go_both_ways() -> None:
    """Brighter and darker, to the left and to the right."""
    pixels = torch.full((1400, 3, SIDE, SIDE), 0.5)  # 50 expected of each change in each direction
    settings = AugmentSection(rand_augment_changes=1, rand_augment_strength=3)
    means = augment(pixels, settings, seeded())[:, :, 16, 16].mean(dim=1)
    assert (means < 0.4).sum() >= 25
    assert (means > 0.6).sum() >= 25
    bar = torch.ones(1400, 3, SIDE, SIDE)
    bar[:, :, :, 14:18] = 0
    ink = 1 - augment(bar, settings, seeded()).mean(dim=(1, 2))
    place = (ink * torch.arange(SIDE)).sum(dim=1) / ink.sum(dim=1).clamp(min=1e-6)
    assert (place < 13).sum() >= 25
    assert (place > 18).sum() >= 25


# --- left and right -----------------------------------------------------------------------------------------------


def test_left_and_right_stay_apart_in_the_recipe_that_ships() -> None:
    """左 and 右 are different captions: nothing mirrors."""
    recipe = load_recipe(EMOJI_TINY).augment.model_copy(update={"erase": 0.0, "brightness": 0.0, "contrast": 0.0})
    pixels = torch.ones(64, 3, SIDE, SIDE)
    pixels[:, :, :, : SIDE // 2] = 0
    after = augment(pixels, recipe, seeded()).mean(dim=(1, 2))
    assert (after[:, 10] < after[:, 22]).all()


def test_nothing_mirrors() -> None:
    """Crops and every change of RandAugment but inversion: what is left of a picture's middle stays left."""
    settings = AugmentSection(crop_area=(0.5, 1), rand_augment_changes=1, rand_augment_strength=6)
    after = augment(coordinates(600), settings, seeded())
    across = after[:, 0, 8:24, 20] - after[:, 0, 8:24, 12]
    solarized = 1 / 14
    assert (across.mean(dim=1) < 0).float().mean() <= solarized + 0.03


# --- colour -----------------------------------------------------------------------------------------------------


def test_grayscale_is_the_luma() -> None:
    """All channels become Pillow's L: ITU-R BT.601."""
    pixels = random_pixels()
    after = augment(pixels, AugmentSection(grayscale=1), seeded())
    luma = 0.299 * pixels[:, 0] + 0.587 * pixels[:, 1] + 0.114 * pixels[:, 2]
    assert (after - luma[:, None]).abs().max() <= 1e-5


@pytest.mark.parametrize("setting", ["grayscale", "blur", "erase"])
def test_a_probability_is_a_share_of_the_pictures(setting: str) -> None:
    """Of 400 at 0.25, 100 give or take 4.6 standard deviations."""
    pixels = random_pixels(400)
    after = augment(pixels, AugmentSection.model_validate({setting: 0.25}), seeded())
    assert 60 <= int(changed_pictures(pixels, after).sum()) <= 140


def test_hue_turns_about_the_grey_axis() -> None:
    """The mean of R, G and B and the distance from grey stay; the hue itself moves within the limit."""
    pixels = random_pixels(64, 0.35, 0.65)  # far from 0 and 1, where clamping would break the circle
    after = augment(pixels, AugmentSection(hue_degrees=30), seeded())
    grey_before, grey_after = pixels.mean(dim=1, keepdim=True), after.mean(dim=1, keepdim=True)
    assert torch.allclose(grey_before, grey_after, atol=1e-5)
    assert torch.allclose((pixels - grey_before).norm(dim=1), (after - grey_after).norm(dim=1), atol=1e-5)
    cosine = torch.cosine_similarity(pixels - grey_before, after - grey_after, dim=1).amin(dim=(1, 2))
    assert cosine.min() >= 0.866 - 1e-3  # cos 30 degrees
    assert cosine.min() < 0.99  # some turned
    grey = torch.full((8, 3, SIDE, SIDE), 0.4)
    assert (augment(grey, AugmentSection(hue_degrees=180), seeded()) - grey).abs().max() <= 1e-5


def test_a_full_turn_of_hues_reaches_all_colours() -> None:
    """Red pictures come out red, green and blue."""
    pixels = torch.tensor([0.6, 0.4, 0.4])[None, :, None, None].expand(64, 3, SIDE, SIDE)
    after = augment(pixels, AugmentSection(hue_degrees=180), seeded())[:, :, 16, 16]
    hues = [colorsys.rgb_to_hsv(*colour)[0] for colour in after.tolist()]
    assert {round(hue * 3) % 3 for hue in hues} == {0, 1, 2}


def test_saturation_keeps_the_luma() -> None:
    """Colours fade or glow, their brightness does not."""
    pixels = random_pixels(32, 0.4, 0.6)
    after = augment(pixels, AugmentSection(saturation=1), seeded())
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert torch.allclose((pixels * weights).sum(dim=1), (after * weights).sum(dim=1), atol=1e-5)
    spread = after.std(dim=1).mean(dim=(1, 2)) / pixels.std(dim=1).mean(dim=(1, 2))
    assert spread.min() < 0.7
    assert spread.max() > 1.4
    assert spread.max() <= 2.72  # e


def test_brightness_adds_and_contrast_multiplies_about_the_middle() -> None:
    """One offset, or one gain about 0.5, for the whole of a picture."""
    pixels = random_pixels(16, 0.4, 0.6)
    offset = augment(pixels, AugmentSection(brightness=0.3), seeded()) - pixels
    assert offset.std(dim=(1, 2, 3)).max() <= 1e-5
    assert 0.1 < offset.abs().max() <= 0.3 + 1e-5
    gain = (augment(pixels, AugmentSection(contrast=0.3), seeded()) - 0.5).flatten(1).norm(dim=1)
    gain = gain / (pixels - 0.5).flatten(1).norm(dim=1)
    assert ((gain >= 0.7 - 1e-4) & (gain <= 1.3 + 1e-4)).all()
    assert gain.max() - gain.min() > 0.2


# --- blur and erasing ---------------------------------------------------------------------------------------------


def test_blur_spreads_a_dot_over_its_neighbours() -> None:
    """One white pixel becomes 3 x 3 that add up to it."""
    pixels = torch.zeros(2, 3, SIDE, SIDE)
    pixels[:, :, 16, 16] = 1
    after = augment(pixels, AugmentSection(blur=1), seeded())
    assert after[:, :, 15:18, 15:18].sum(dim=(2, 3)) == pytest.approx(torch.ones(2, 3), abs=1e-4)
    assert after[:, :, 16, 16] == pytest.approx(torch.full((2, 3), 0.25), abs=1e-4)
    plain = torch.full((2, 3, SIDE, SIDE), 0.4)  # the border is blurred with itself, not with black
    assert (augment(plain, AugmentSection(blur=1), seeded()) - plain).abs().max() <= 1e-5


def test_erase_paints_one_rectangle_of_one_colour() -> None:
    """Up to half the side each way; the rest of the picture is as it was."""
    pixels = random_pixels(32)
    after = augment(pixels, AugmentSection(erase=1), seeded())
    for before, erased in zip(pixels, after, strict=True):
        area = (erased - before).abs().amax(dim=0) > 1e-4
        rows, columns = area.any(dim=1).nonzero().ravel(), area.any(dim=0).nonzero().ravel()
        top, bottom, left, right = int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])
        assert bottom - top + 1 <= SIDE // 2 + 1
        assert right - left + 1 <= SIDE // 2 + 1
        patch = erased[:, top : bottom + 1, left : right + 1]
        assert (patch - patch[:, :1, :1]).abs().max() == 0
