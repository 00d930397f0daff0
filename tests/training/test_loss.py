"""The contrastive loss: CLIP's own with one caption a picture, the mean over positives with several."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from training.loss import contrastive_loss


def unit_rows(count: int, seed: int, width: int = 8) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def matrix(*rows: str) -> Tensor:
    """Bool matrix, x where true."""
    return torch.tensor([[character == "x" for character in row] for row in rows])


def loss_by_hand(image_embeds: Tensor, text_embeds: Tensor, scale: float, positives: Tensor) -> float:
    """arXiv 2004.11362, L_out, written with plain sums, both directions."""
    logits = (scale * image_embeds @ text_embeds.t()).tolist()

    def one_direction(rows: list[list[float]], relevant: list[list[bool]]) -> float:
        total = 0.0
        for row, wanted in zip(rows, relevant, strict=True):
            log_sum = math.log(sum(math.exp(value) for value in row))
            chosen = [value - log_sum for value, one in zip(row, wanted, strict=True) if one]
            total -= sum(chosen) / len(chosen)
        return total / len(rows)

    columns = [list(column) for column in zip(*logits, strict=True)]
    return (one_direction(logits, positives.tolist()) + one_direction(columns, positives.t().tolist())) / 2


def test_one_caption_a_picture_is_clips_symmetric_cross_entropy() -> None:
    """arXiv 2103.00020, figure 3: labels are the row numbers."""
    image_embeds, text_embeds = unit_rows(6, 0), unit_rows(6, 1)
    logits, labels = 5 * image_embeds @ text_embeds.t(), torch.arange(6)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    loss = contrastive_loss(image_embeds, text_embeds, torch.tensor(5.0), torch.eye(6).bool())
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)  # the same sums in float32, in another order


@pytest.mark.parametrize(
    "positives",
    [matrix("xx.", "..x"), matrix("xx.", ".xx"), matrix("xxx", "xxx"), matrix("x..", ".xx", "x.x", ".x.")],
    ids=["several captions", "a shared caption", "all belong together", "more pictures than captions"],
)
def test_several_positives_share_the_target_evenly(positives: Tensor) -> None:
    """Both directions are averaged over their own positives."""
    image_embeds, text_embeds = unit_rows(len(positives), 2), unit_rows(positives.shape[1], 3)
    loss = contrastive_loss(image_embeds, text_embeds, torch.tensor(7.0), positives)
    assert loss.item() == pytest.approx(loss_by_hand(image_embeds, text_embeds, 7.0, positives), abs=1e-5)


def test_its_gradient_pulls_positives_together() -> None:
    """Free embeddings that follow the gradient end with every positive closer than every negative."""
    positives = matrix("xx...", "..x..", ".x.xx")
    images, texts = unit_rows(3, 4).requires_grad_(), unit_rows(5, 5).requires_grad_()
    similarities = images.detach() @ texts.detach().t()
    assert similarities[positives].min() < similarities[~positives].max()
    optimizer = torch.optim.Adam([images, texts], lr=0.1)
    for _ in range(40):
        loss = contrastive_loss(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), torch.tensor(10.0), positives)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    similarities = F.normalize(images.detach(), dim=-1) @ F.normalize(texts.detach(), dim=-1).t()
    assert similarities[positives].min() > similarities[~positives].max()


def test_a_scale_of_zero_leaves_a_guess() -> None:
    """Without a scale every caption is equally likely: ln T one way, ln B the other."""
    loss = contrastive_loss(unit_rows(3, 6), unit_rows(5, 7), torch.tensor(0.0), matrix("xx...", "..x..", ".x.xx"))
    assert loss.item() == pytest.approx((math.log(3) + math.log(5)) / 2, abs=1e-6)


@pytest.mark.parametrize(("aligned", "sign"), [(True, -1), (False, 1)])
def test_the_scale_is_learned(aligned: bool, sign: int) -> None:
    """A sharper scale pays where positives are closest, and costs where they are not."""
    scale = torch.tensor(3.0, requires_grad=True)
    texts = torch.eye(4) if aligned else torch.eye(4).roll(1, dims=0)
    contrastive_loss(torch.eye(4), texts, scale, torch.eye(4).bool()).backward()
    assert scale.grad is not None
    assert scale.grad.sign().item() == sign
