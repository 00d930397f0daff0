"""Losses on features: against plain sums, against CLIP's own, and the same however many processes share the work."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.training.shares import POSITIVES, UNREADABLE, World, matrix, unit_rows, world
from training import loss
from training.loss import (
    Features,
    SigmoidHead,
    Targets,
    batch_accuracy,
    contrastive_rows,
    count_rows,
    sigmoid_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")
BIAS = -2.0
Loss = Callable[[Features, Targets], Tensor]


def sigmoid_with_bias(features: Features, targets: Targets) -> Tensor:
    return sigmoid_rows(features, targets, torch.tensor(BIAS, dtype=features.scale.dtype))


LOSSES = pytest.mark.parametrize("loss_of", [contrastive_rows, sigmoid_with_bias], ids=["contrastive", "sigmoid"])


def contrastive_by_hand(given: World) -> float:
    """arXiv 2004.11362, L_out, with plain sums in double precision: both directions, readable pictures alone."""
    readable = given.is_readable
    logits = (
        float(given.scale.detach()) * given.image_embeds.detach().double() @ given.text_embeds.detach().double().t()
    )

    def one_direction(rows: list[list[float]], relevant: list[list[bool]]) -> float:
        costs = []
        for row, wanted in zip(rows, relevant, strict=True):
            log_sum = math.log(sum(math.exp(value) for value in row))
            chosen = [value - log_sum for value, one in zip(row, wanted, strict=True) if one]
            if chosen:
                costs.append(-sum(chosen) / len(chosen))
        return sum(costs) / len(costs)

    logits, positives = logits[readable], given.positives[readable]
    images = one_direction(logits.tolist(), positives.tolist())
    return (images + one_direction(logits.t().tolist(), positives.t().tolist())) / 2


def sigmoid_by_hand(given: World) -> float:
    """arXiv 2303.15343, equation 1, with plain sums in double precision."""
    total, num_images = 0.0, 0
    for image, wanted, is_readable in zip(
        given.image_embeds.detach().double(), given.positives.tolist(), given.is_readable.tolist(), strict=True
    ):
        if not is_readable:
            continue
        num_images += 1
        for text, one in zip(given.text_embeds.detach().double(), wanted, strict=True):
            sign = 1 if one else -1
            total -= math.log(1 / (1 + math.exp(-sign * (float(given.scale.detach()) * float(image @ text) + BIAS))))
    return total / num_images


@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_one_caption_a_picture_is_the_published_loss(scale: float) -> None:
    """arXiv 2103.00020, figure 3, and Chinese-CLIP's trainer: labels are the row numbers."""
    given = world(torch.eye(6).bool(), scale=scale)
    logits, labels = given.scale * given.image_embeds @ given.text_embeds.t(), torch.arange(6)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    value = contrastive_rows(*given.share(0, 1))
    assert value.shape == ()
    # The same sums in float32, in another order; logits of up to 100 are exact to 4e-6.
    assert value.item() == pytest.approx(expected.item(), abs=1e-6 if scale < 10 else 1e-5)


@pytest.mark.parametrize(
    "positives",
    [
        matrix("xx.", "..x"),
        matrix("xx.", ".xx"),
        matrix("xxx", "xxx"),
        matrix("x..", ".xx", "x.x", ".x."),
        POSITIVES,
    ],
    ids=["several captions", "a shared caption", "all belong together", "more pictures than captions", "many"],
)
def test_several_positives(positives: Tensor) -> None:
    """Contrastive spreads the target evenly over them, in both directions; sigmoid asks for each."""
    given = world(positives, seed=2)
    # Sums of some ten float32 of size 10.
    assert contrastive_rows(*given.share(0, 1)).item() == pytest.approx(contrastive_by_hand(given), abs=1e-5)
    assert sigmoid_with_bias(*given.share(0, 1)).item() == pytest.approx(sigmoid_by_hand(given), rel=1e-5)


def test_an_unreadable_picture_counts_for_nothing() -> None:
    """Neither as a row nor as a negative; a caption that describes no other is a negative alone."""
    given = world(unreadable=UNREADABLE)
    assert contrastive_rows(*given.share(0, 1)).item() == pytest.approx(contrastive_by_hand(given), abs=1e-5)
    assert sigmoid_with_bias(*given.share(0, 1)).item() == pytest.approx(sigmoid_by_hand(given), rel=1e-5)


@LOSSES
def test_an_unreadable_picture_has_no_gradient(loss_of: Loss) -> None:
    """And whatever its features are, the loss and all other gradients stay the same."""
    results = []
    for seed in (20, 30):
        given = world(unreadable=UNREADABLE)
        with torch.no_grad():
            given.image_embeds[list(UNREADABLE)] = unit_rows(len(UNREADABLE), seed)
        value = loss_of(*given.share(0, 1))
        results.append((value, *torch.autograd.grad(value, given.leaves)))
        assert not results[-1][1][list(UNREADABLE)].any()
        assert results[-1][1][0].any()
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@LOSSES
@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_a_batch_without_a_readable_picture_costs_nothing(loss_of: Loss, scale: float) -> None:
    """Zero, and gradients of zero, never NaN."""
    given = world(unreadable=tuple(range(len(POSITIVES))), scale=scale)
    value = loss_of(*given.share(0, 1))
    assert value.item() == 0
    assert not any(grad.any() for grad in torch.autograd.grad(value, given.leaves))


@LOSSES
@pytest.mark.parametrize("unreadable", [(), UNREADABLE])
@pytest.mark.parametrize("num_processes", [2, 3, 8])
def test_processes_share_the_work(loss_of: Loss, unreadable: tuple[int, ...], num_processes: int) -> None:
    """Their losses sum to the one of a single process, and so do their gradients; also with more than pictures."""
    given = world(unreadable=unreadable, scale=20.0)
    whole = loss_of(*given.share(0, 1))
    shared = [loss_of(*share) for share in given.shares(num_processes)]
    assert len({part.item() for part in shared}) > 1
    assert sum(part.item() for part in shared) == pytest.approx(whole.item(), rel=1e-6)
    expected = torch.autograd.grad(whole, given.leaves)
    summed = torch.autograd.grad(torch.stack(shared).sum(), given.leaves)
    for one, other in zip(summed, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # float32, summed in another order


@LOSSES
def test_the_gradient_is_that_of_finite_differences(loss_of: Loss) -> None:
    """In double precision, of both sides and of the scale."""
    given = world(unreadable=UNREADABLE, dtype=torch.float64)

    def value(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor) -> Tensor:
        return loss_of(*replace(given, image_embeds=image_embeds, text_embeds=text_embeds, scale=scale).share(0, 2))

    assert torch.autograd.gradcheck(value, given.leaves)


@LOSSES
def test_blocks_of_rows_change_nothing(loss_of: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss and its gradients are the same, and nothing of the whole matrix's size is kept for them."""
    given = world(unreadable=UNREADABLE, scale=20.0)
    whole = loss_of(*given.share(0, 1))
    expected = torch.autograd.grad(whole, given.leaves)
    monkeypatch.setattr(loss, "MAX_BLOCK_ENTRIES", 2 * POSITIVES.shape[1])
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    features, targets = given.share(0, 1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        blocks = loss_of(features, targets)
    assert not [shape for shape in kept if shape[-1:] in ((POSITIVES.shape[0],), (POSITIVES.shape[1],))]
    assert blocks.item() == pytest.approx(whole.item(), rel=1e-6)
    for one, other in zip(torch.autograd.grad(blocks, given.leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_rows_are_counted() -> None:
    """A process's own: pictures that are readable, and captions of such."""
    _, targets = world(unreadable=UNREADABLE).share(0, 1)
    assert (targets.num_images, targets.num_texts) == (5, 7)
    parts = [count_rows(targets.positives) for _, targets in world(unreadable=UNREADABLE).shares(3)]
    assert torch.stack(parts).sum(dim=0).tolist() == [5, 7]


@LOSSES
def test_its_gradient_pulls_positives_together(loss_of: Loss) -> None:
    """Free embeddings that follow the gradient end with every positive closer than every negative."""
    positives = matrix("xx...", "..x..", ".x.xx")
    given = world(positives, scale=10.0, seed=4)
    similarities = given.image_embeds.detach() @ given.text_embeds.detach().t()
    assert similarities[positives].min() < similarities[~positives].max()
    optimizer = torch.optim.Adam(given.leaves[:2], lr=0.1)
    for _ in range(40):
        normalised = replace(
            given,
            image_embeds=F.normalize(given.image_embeds, dim=-1),
            text_embeds=F.normalize(given.text_embeds, dim=-1),
        )
        optimizer.zero_grad()
        loss_of(*normalised.share(0, 1)).backward()
        optimizer.step()
    images, texts = (F.normalize(side.detach(), dim=-1) for side in given.leaves[:2])
    similarities = images @ texts.t()
    assert similarities[positives].min() > similarities[~positives].max()


def test_a_scale_of_zero_leaves_a_guess() -> None:
    """Without a scale every caption is equally likely: ln T one way, ln B the other."""
    value = contrastive_rows(*world(matrix("xx...", "..x..", ".x.xx"), scale=0.0).share(0, 1))
    assert value.item() == pytest.approx((math.log(3) + math.log(5)) / 2, abs=1e-6)


@pytest.mark.parametrize(("aligned", "sign"), [(True, -1), (False, 1)])
def test_the_scale_is_learned(aligned: bool, sign: int) -> None:
    """A sharper scale pays where positives are closest, and costs where they are not."""
    given = world(torch.eye(4).bool(), scale=3.0)
    texts = torch.eye(4) if aligned else torch.eye(4).roll(1, dims=0)
    value = contrastive_rows(*replace(given, image_embeds=torch.eye(4), text_embeds=texts).share(0, 1))
    (grad,) = torch.autograd.grad(value, given.scale)
    assert grad.sign().item() == sign


def test_the_bias_is_learned() -> None:
    """It starts at -10, and falls where negatives are called positives."""
    head = SigmoidHead()
    assert head.bias.item() == -10
    with torch.no_grad():
        head.bias.fill_(3)
    sigmoid_rows(*world(torch.eye(6).bool(), scale=1.0).share(0, 1), head.bias).backward()
    assert head.bias.grad is not None
    assert head.bias.grad > 0
    given = world(unreadable=UNREADABLE, dtype=torch.float64)
    bias = torch.tensor(BIAS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda bias: sigmoid_rows(*given.share(0, 2), bias), (bias,))


@pytest.mark.parametrize("num_processes", [1, 3])
def test_batch_accuracy(num_processes: int) -> None:
    """Shares of the rows with positives: two of three pictures, one of the two captions of a readable picture."""
    first, second, third, fourth = torch.eye(4)
    # The third picture is unreadable, and would be the first caption's closest.
    images = torch.stack([first, second, 2 * first, fourth])
    texts = torch.stack([first, 0.9 * first + 0.4 * second, 0.8 * third + 0.6 * fourth])
    given = replace(world(matrix("x..", ".x.", "..x", "x.."), unreadable=(2,)), image_embeds=images, text_embeds=texts)
    parts = [batch_accuracy(*share) for share in given.shares(num_processes)]
    assert sum(part.image_to_text for part in parts) == pytest.approx(2 / 3)
    assert sum(part.text_to_image for part in parts) == pytest.approx(1 / 2)
