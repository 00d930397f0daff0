"""Random changes to a batch of pictures, drawn anew for each: float32 (B, 3, R, R) in [0, 1] -> the same.

One batch at a time in torch, so that a small model does not wait for a picture library.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from training.pixel_changes import CHANGES, LUMA, look_up, neighbourhood
from training.recipe import AugmentSection

# Of a crop's aspect ratio, as ln; source: CLIP's and Chinese-CLIP's random resized crop, 3/4 to 4/3.
_MAX_LOG_RATIO = math.log(4 / 3)


def augment(pixels: Tensor, recipe: AugmentSection, generator: torch.Generator) -> Tensor:
    """Apply `recipe` to float32 pixels (B, 3, R, R) in [0, 1]; uncovered corners become white.

    What it draws depends on the generator, the recipe and B alone. With everything off, `pixels` itself comes back.
    """
    before = pixels
    if recipe.crop_area != (1, 1):
        pixels = _crop(pixels, recipe.crop_area, generator)
    if _warps(recipe):
        pixels = _warp(pixels, recipe, generator)
    if recipe.rand_augment_changes and recipe.rand_augment_strength:
        pixels = _rand_augment(pixels, recipe.rand_augment_changes, recipe.rand_augment_strength, generator)
    if _recolours(recipe):
        pixels = _colour(pixels, recipe, generator)
    if recipe.blur:
        pixels = _blur(pixels, recipe.blur, generator)
    if recipe.erase:
        pixels = _erase(pixels, recipe.erase, generator)
    # A lookup's weights add up to 1 only nearly.
    return pixels if pixels is before else pixels.clamp(0, 1)


def _warps(recipe: AugmentSection) -> bool:
    moves = (recipe.rotate_degrees, recipe.stretch, recipe.shear, recipe.translate)
    return any(moves) or (recipe.min_scale, recipe.max_scale) != (1, 1)


def _recolours(recipe: AugmentSection) -> bool:
    return any((recipe.hue_degrees, recipe.saturation, recipe.grayscale, recipe.contrast, recipe.brightness))


def _uniform(batch: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(batch).uniform_(low, high, generator=generator)


def _chosen(batch: int, probability: float, generator: torch.Generator) -> Tensor:
    """Bool (B, 1, 1, 1): which pictures a change befalls."""
    return (torch.rand(batch, generator=generator) < probability)[:, None, None, None]


def _crop(pixels: Tensor, area: tuple[float, float], generator: torch.Generator) -> Tensor:
    """A random part of each picture, enlarged to all of it by one bicubic lookup."""
    batch = len(pixels)
    log_area = _uniform(batch, *area, generator).log()
    # Only ratios whose crop is as narrow and as low as the picture: nothing has to be drawn again.
    limit = (-log_area).clamp(max=_MAX_LOG_RATIO)
    log_ratio = limit * _uniform(batch, -1, 1, generator)
    size = (torch.stack([log_area + log_ratio, log_area - log_ratio], dim=1) / 2).exp()  # (B, 2), of sides of 1
    middle = (1 - size) * torch.stack([_uniform(batch, -1, 1, generator) for _ in range(2)], dim=1)
    grid = F.affine_grid(torch.cat([size.diag_embed(), middle[:, :, None]], dim=2), list(pixels.shape), False)
    return F.grid_sample(pixels, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(0, 1)


def _rand_augment(pixels: Tensor, changes: int, strength: float, generator: torch.Generator) -> Tensor:
    """So many changes a picture, drawn with replacement; pictures that drew the same go through it together."""
    drawn = torch.randint(len(CHANGES), (changes, len(pixels)), generator=generator)
    signs = 2 * torch.randint(2, (changes, len(pixels)), generator=generator) - 1
    pixels = pixels.clone()
    for numbers, amounts in zip(drawn, signs * (strength / 10), strict=True):
        for number, change in enumerate(CHANGES):
            chosen = (numbers == number).nonzero().squeeze(1)
            if len(chosen):
                pixels[chosen] = change(pixels[chosen], amounts[chosen])
    return pixels


def _warp(pixels: Tensor, recipe: AugmentSection, generator: torch.Generator) -> Tensor:
    """Rotate, scale, stretch, shear and shift by one bilinear lookup."""
    batch = len(pixels)

    def draw(low: float, high: float) -> Tensor:
        return _uniform(batch, low, high, generator)

    angle = draw(-1, 1) * math.radians(recipe.rotate_degrees)
    scale = draw(math.log(recipe.min_scale), math.log(recipe.max_scale) + 1e-9).exp()
    stretch = (draw(-1, 1) * recipe.stretch).exp()
    shear = draw(-1, 1) * recipe.shear
    scale_x, scale_y = scale * stretch, scale / stretch
    cos, sin = angle.cos(), angle.sin()
    # grid_sample asks where each output pixel comes from: the inverse of what happens to the picture.
    matrix = torch.stack(
        [
            torch.stack([cos / scale_x, (sin + shear) / scale_x, draw(-1, 1) * recipe.translate], dim=-1),
            torch.stack([-sin / scale_y, cos / scale_y, draw(-1, 1) * recipe.translate], dim=-1),
        ],
        dim=1,
    )
    return look_up(pixels, matrix)


def _colour(pixels: Tensor, recipe: AugmentSection, generator: torch.Generator) -> Tensor:
    """Hue, saturation and grey by one 3 x 3 matrix a picture; brightness and contrast by a gain and an offset."""
    batch = len(pixels)
    hue = _uniform(batch, -1, 1, generator) * math.radians(recipe.hue_degrees)
    saturation = (_uniform(batch, -1, 1, generator) * recipe.saturation).exp()
    saturation = saturation * (torch.rand(batch, generator=generator) >= recipe.grayscale)
    grey = LUMA.expand(3, 3)  # each channel becomes the luma
    matrix = grey + saturation[:, None, None] * (_hue_rotation(hue) - grey)
    gain = 1 + _uniform(batch, -1, 1, generator) * recipe.contrast
    offset = _uniform(batch, -1, 1, generator) * recipe.brightness
    mixed = torch.einsum("bij,bjhw->bihw", matrix, pixels)
    return ((mixed - 0.5) * gain[:, None, None, None] + 0.5 + offset[:, None, None, None]).clamp(0, 1)


def _hue_rotation(angle: Tensor) -> Tensor:
    """(B, 3, 3): rotation of RGB about the grey axis (Rodrigues' formula)."""
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    onto_axis = torch.full((3, 3), 1 / 3)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return cos * torch.eye(3) + sin * cross + (1 - cos) * onto_axis


def _blur(pixels: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    chosen = _chosen(len(pixels), probability, generator).flatten().nonzero().squeeze(1)
    blurred = neighbourhood(F.pad(pixels[chosen], (1, 1, 1, 1), mode="replicate"), own_weight=2) / 16
    return pixels.index_copy(0, chosen, blurred)


def _erase(pixels: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Paint over a rectangle of up to half the side with one random colour (arXiv 1708.04896)."""
    batch, _, height, width = pixels.shape

    def inside(size: int) -> Tensor:
        low = _uniform(batch, 0, 0.8, generator) * size
        high = low + _uniform(batch, 0.1, 0.5, generator) * size
        position = torch.arange(size)
        return (position >= low[:, None]) & (position < high[:, None])

    rows, columns = inside(height), inside(width)
    area = rows[:, None, :, None] & columns[:, None, None, :] & _chosen(batch, probability, generator)
    colour = torch.rand(batch, 3, 1, 1, generator=generator)
    return torch.where(area, colour, pixels)
