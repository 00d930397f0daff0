"""Random changes to a batch of pictures, drawn anew for each: float32 (B, 3, R, R) in [0, 1] -> the same.

One batch at a time in torch, so that a small model does not wait for a picture library.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from training.recipe import AugmentSection

# Luma weights of ITU-R BT.601, as Pillow's "L" mode uses.
_LUMA = torch.tensor([0.299, 0.587, 0.114])


def augment(pixels: Tensor, recipe: AugmentSection, generator: torch.Generator) -> Tensor:
    """Apply `recipe` to float32 pixels (B, 3, R, R) in [0, 1]; uncovered corners become white."""
    pixels = _warp(pixels, recipe, generator)
    pixels = _colour(pixels, recipe, generator)
    pixels = _blur(pixels, recipe.blur, generator)
    return _erase(pixels, recipe.erase, generator)


def _uniform(batch: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(batch).uniform_(low, high, generator=generator)


def _chosen(batch: int, probability: float, generator: torch.Generator) -> Tensor:
    """Bool (B, 1, 1, 1): which pictures a change befalls."""
    return (torch.rand(batch, generator=generator) < probability)[:, None, None, None]


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
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    # Zero padding is white when white is zero.
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1


def _colour(pixels: Tensor, recipe: AugmentSection, generator: torch.Generator) -> Tensor:
    """Hue, saturation and grey by one 3 x 3 matrix a picture; brightness and contrast by a gain and an offset."""
    batch = len(pixels)
    hue = _uniform(batch, -1, 1, generator) * math.radians(recipe.hue_degrees)
    saturation = (_uniform(batch, -1, 1, generator) * recipe.saturation).exp()
    saturation = saturation * (torch.rand(batch, generator=generator) >= recipe.grayscale)
    grey = _LUMA.expand(3, 3)  # each channel becomes the luma
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
    chosen = _chosen(len(pixels), probability, generator)
    kernel = torch.tensor([1.0, 2.0, 1.0])
    weight = (kernel[:, None] * kernel[None, :] / 16).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), weight, groups=3)
    return torch.where(chosen, blurred, pixels)


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
