"""What RandAugment may do to pictures: float32 (b, 3, R, R) in [0, 1] and how much of it -> the same shape and range.

As Pillow's ImageOps, ImageEnhance and Image.transform do it, for a batch at a time; nothing here is random.
How far each goes is RandAugment's (arXiv 1909.13719), whose list this is; it has no mirroring.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# (b, 3, R, R) and a signed amount (b,) from -1 to 1, where 0 is no change -> (b, 3, R, R).
Change = Callable[[Tensor, Tensor], Tensor]

# Luma weights of ITU-R BT.601, as Pillow's "L" mode uses.
LUMA = torch.tensor([0.299, 0.587, 0.114])
# At an amount of 1; source: AutoAugment's ranges (arXiv 1805.09501), where a shift is 150 of 331 pixels.
_MAX_DEGREES, _MAX_SHEAR, _MAX_SHIFT, _MAX_FACTOR, _MAX_LOST_BITS = 30, 0.3, 0.45, 0.9, 4


def look_up(pixels: Tensor, matrix: Tensor) -> Tensor:
    """Warp by a bilinear lookup; what lies outside the picture is white.

    Args:
        matrix: (b, 2, 3), where each place of the result comes from; the picture's sides reach from -1 to 1.
    """
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    # Zero padding is white when white is zero.
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1


def blend(start: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """ImageEnhance's: 0 is `start`, 1 is `pixels`, 2 goes as far again; factor is (b,)."""
    return torch.lerp(start, pixels, factor[:, None, None, None]).clamp(0, 1)


def neighbourhood(pixels: Tensor, own_weight: int) -> Tensor:
    """Each pixel's 3 x 3, weighted (1, own_weight, 1) both ways: (b, 3, R, R) -> (b, 3, R - 2, R - 2).

    Sums of shifted pictures: a convolution of so few channels takes ten times as long on CPU.
    """
    rows = pixels[:, :, :-2] + own_weight * pixels[:, :, 1:-1] + pixels[:, :, 2:]
    return rows[..., :-2] + own_weight * rows[..., 1:-1] + rows[..., 2:]


def keep(pixels: Tensor, amount: Tensor) -> Tensor:
    return pixels


def autocontrast(pixels: Tensor, amount: Tensor) -> Tensor:
    """Each channel from 0 to 1, however little was asked for."""
    low, high = pixels.amin(dim=(2, 3), keepdim=True), pixels.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (pixels - low) / (high - low).clamp(min=1e-6), pixels)


def equalize(pixels: Tensor, amount: Tensor) -> Tensor:
    """Each channel's 256 values spread so that all are about as frequent, however little was asked for."""
    values = _bytes(pixels).long().flatten(2).flatten(0, 1)  # (3b, R * R)
    own_bins = values + 256 * torch.arange(len(values))[:, None]
    counts = torch.bincount(own_bins.flatten(), minlength=256 * len(values)).view(-1, 256)
    # Pillow leaves the brightest value out of the step, and a channel alone that has too few others.
    brightest = counts.gather(1, values.amax(dim=1, keepdim=True))
    step = (values.shape[1] - brightest) // 255
    table = (counts.cumsum(dim=1) - counts + step // 2) // step.clamp(min=1)
    spread = (table.clamp(max=255) / 255).gather(1, values).view_as(pixels)
    return torch.where((step > 0).view(*pixels.shape[:2], 1, 1), spread, pixels)


def solarize(pixels: Tensor, amount: Tensor) -> Tensor:
    """Invert what is bright: above white at 0, everything at 1."""
    threshold = (256 - 256 * amount.abs()) / 255
    return torch.where(pixels >= threshold[:, None, None, None], 1 - pixels, pixels)


def posterize(pixels: Tensor, amount: Tensor) -> Tensor:
    """Lose the lowest bits of each value: of 8, none at 0, four at 1."""
    step = 2 ** (_MAX_LOST_BITS * amount.abs()).round()[:, None, None, None]
    return torch.where(step > 1, (_bytes(pixels) / step).floor() * step / 255, pixels)


def colour(pixels: Tensor, amount: Tensor) -> Tensor:
    return blend(_luma(pixels), pixels, 1 + _MAX_FACTOR * amount)


def contrast(pixels: Tensor, amount: Tensor) -> Tensor:
    return blend(_luma(pixels).mean(dim=(2, 3), keepdim=True), pixels, 1 + _MAX_FACTOR * amount)


def brightness(pixels: Tensor, amount: Tensor) -> Tensor:
    return blend(torch.zeros(()), pixels, 1 + _MAX_FACTOR * amount)


def sharpness(pixels: Tensor, amount: Tensor) -> Tensor:
    """Away from Pillow's ImageFilter.SMOOTH, where a pixel counts 5 times, its neighbours once."""
    smooth = pixels.clone()  # Pillow leaves the outermost pixels as they are
    smooth[:, :, 1:-1, 1:-1] = (neighbourhood(pixels, own_weight=1) + 4 * pixels[:, :, 1:-1, 1:-1]) / 13
    return blend(smooth, pixels, 1 + _MAX_FACTOR * amount)


def rotate(pixels: Tensor, amount: Tensor) -> Tensor:
    angle = amount * math.radians(_MAX_DEGREES)
    return look_up(pixels, _matrices(angle.cos(), -angle.sin(), angle.sin(), angle.cos()))


def shear_x(pixels: Tensor, amount: Tensor) -> Tensor:
    one, zero = torch.ones_like(amount), torch.zeros_like(amount)
    return look_up(pixels, _matrices(one, _MAX_SHEAR * amount, zero, one))


def shear_y(pixels: Tensor, amount: Tensor) -> Tensor:
    one, zero = torch.ones_like(amount), torch.zeros_like(amount)
    return look_up(pixels, _matrices(one, zero, _MAX_SHEAR * amount, one))


def translate_x(pixels: Tensor, amount: Tensor) -> Tensor:
    return _translate(pixels, amount, axis=0)


def translate_y(pixels: Tensor, amount: Tensor) -> Tensor:
    return _translate(pixels, amount, axis=1)


CHANGES: tuple[Change, ...] = (
    keep, autocontrast, equalize, rotate, solarize, colour, posterize, contrast, brightness, sharpness,
    shear_x, shear_y, translate_x, translate_y,
)  # fmt: skip


def _bytes(pixels: Tensor) -> Tensor:
    """The values 0 to 255 of an 8-bit picture, still as float32."""
    return (pixels * 255).round()


def _luma(pixels: Tensor) -> Tensor:
    """(b, 3, R, R) -> (b, 1, R, R)."""
    return torch.einsum("c,bchw->bhw", LUMA, pixels)[:, None]


def _matrices(xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor) -> Tensor:
    """(b, 2, 3) of four (b,), which keep the middle in place."""
    zero = torch.zeros_like(xx)
    return torch.stack([xx, xy, zero, yx, yy, zero], dim=1).view(-1, 2, 3)


def _translate(pixels: Tensor, amount: Tensor, axis: int) -> Tensor:
    matrix = torch.eye(2, 3).repeat(len(pixels), 1, 1)
    matrix[:, axis, 2] = amount * _MAX_SHIFT * 2  # a side is 2 long
    return look_up(pixels, matrix)
