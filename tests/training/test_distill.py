"""Losses between a student and its teacher: against plain sums, and the same however many processes share them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.shares import POSITIVES, UNREADABLE, World, world
from training import loss
from training.distill import DistillHead, feature_loss, logit_loss

pytestmark = pytest.mark.usefixtures("one_thread")
Shared = Callable[[World, World, int], list[Tensor]]
TEACHER_WIDTH = 12


def student_and_teacher(
    unreadable: tuple[int, ...] = (), width: int = TEACHER_WIDTH, dtype: torch.dtype = torch.float32
) -> tuple[World, World]:
    teacher = world(unreadable=unreadable, scale=11.0, seed=10, width=width, dtype=dtype)
    taught = replace(teacher, **{name: getattr(teacher, name).detach() for name in ("image_embeds", "text_embeds")})
    return world(unreadable=unreadable, dtype=dtype), replace(taught, scale=teacher.scale.detach())


def feature_shares(student: World, teacher: World, num_processes: int, head: DistillHead | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    head = head or DistillHead(student.image_embeds.shape[1], teacher.image_embeds.shape[1]).to(student.scale.dtype)
    pairs = zip(student.shares(num_processes), teacher.shares(num_processes), strict=True)
    return [feature_loss(mine, theirs, targets, head) for (mine, targets), (theirs, _) in pairs]


def logit_shares(student: World, teacher: World, num_processes: int) -> list[Tensor]:
    pairs = zip(student.shares(num_processes), teacher.shares(num_processes), strict=True)
    return [logit_loss(mine, theirs, targets) for (mine, targets), (theirs, _) in pairs]


LOSSES = pytest.mark.parametrize("shares_of", [feature_shares, logit_shares], ids=["feature", "logit"])


def described(given: World) -> list[int]:
    """Captions of a readable picture."""
    return [column for column in range(given.positives.shape[1]) if given.positives[given.is_readable, column].any()]


@pytest.mark.parametrize("unreadable", [(), UNREADABLE])
def test_features_are_compared_by_their_cosine(unreadable: tuple[int, ...]) -> None:
    """Of equal width as they are: the mean over pictures and the mean over captions, each half."""
    student, teacher = student_and_teacher(unreadable, width=8)

    def mean_distance(mine: Tensor, theirs: Tensor, rows: list[int]) -> float:
        return sum(1 - float(mine[row].detach() @ theirs[row]) for row in rows) / len(rows)

    readable = student.is_readable.nonzero()[:, 0].tolist()
    images = mean_distance(student.image_embeds, teacher.image_embeds, readable)
    texts = mean_distance(student.text_embeds, teacher.text_embeds, described(student))
    (value,) = feature_shares(student, teacher, 1)
    assert value.item() == pytest.approx((images + texts) / 2, abs=1e-6)


def test_another_width_goes_through_a_learned_map() -> None:
    """One a side; a head that maps the student onto the teacher brings the loss to 0, in the end."""
    student, teacher = student_and_teacher(width=3)
    head = DistillHead(8, 3)
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == {
        "image.weight": (3, 8), "text.weight": (3, 8)
    }  # fmt: skip
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        (value,) = feature_shares(student, teacher, 1, head)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    # Seven pictures have a map of 8 numbers to any 3; nine captions nearly.
    assert losses[-1] < 0.05 < 0.5 < losses[0]


def test_equal_widths_need_no_map() -> None:
    assert not list(DistillHead(8, 8).parameters())


@pytest.mark.parametrize("unreadable", [(), UNREADABLE])
def test_logits_are_compared_row_by_row(unreadable: tuple[int, ...]) -> None:
    """KL(teacher || student) in both directions, each with its own scale; columns of unreadable pictures are none."""
    student, teacher = student_and_teacher(unreadable)
    readable = student.is_readable

    def logits(given: World) -> Tensor:
        images, texts = given.image_embeds.detach().double(), given.text_embeds.detach().double()
        return (given.scale.detach() * images @ texts.t())[readable]

    def divergence(mine: list[float], theirs: list[float]) -> float:
        my_sum, their_sum = (sum(math.exp(value) for value in row) for row in (mine, theirs))
        pairs = [(math.exp(a) / my_sum, math.exp(b) / their_sum) for a, b in zip(mine, theirs, strict=True)]
        return sum(q * math.log(q / p) for p, q in pairs)

    def mean_divergence(mine: Tensor, theirs: Tensor) -> float:
        rows = zip(mine.tolist(), theirs.tolist(), strict=True)
        return sum(divergence(*row) for row in rows) / len(mine)

    mine, theirs, captions = logits(student), logits(teacher), described(student)
    expected = (mean_divergence(mine, theirs) + mean_divergence(mine.t()[captions], theirs.t()[captions])) / 2
    (value,) = logit_shares(student, teacher, 1)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_a_student_like_its_teacher_is_done() -> None:
    """Both losses are 0; another scale alone makes other logits."""
    teacher = world(scale=50.0)
    assert feature_shares(teacher, teacher, 1)[0].item() == pytest.approx(0, abs=1e-6)
    assert logit_shares(teacher, teacher, 1)[0].item() == pytest.approx(0, abs=1e-5)
    assert logit_shares(world(scale=5.0), teacher, 1)[0].item() > 0.1


@LOSSES
@pytest.mark.parametrize("unreadable", [(), UNREADABLE])
@pytest.mark.parametrize("num_processes", [2, 3, 8])
def test_processes_share_the_work(shares_of: Shared, unreadable: tuple[int, ...], num_processes: int) -> None:
    """Their losses sum to the one of a single process, and so do their gradients."""
    student, teacher = student_and_teacher(unreadable)
    (whole,), shared = shares_of(student, teacher, 1), shares_of(student, teacher, num_processes)
    assert len({part.item() for part in shared}) > 1
    assert sum(part.item() for part in shared) == pytest.approx(whole.item(), rel=1e-6)
    expected = torch.autograd.grad(whole, student.leaves, allow_unused=True, materialize_grads=True)
    summed = torch.autograd.grad(torch.stack(shared).sum(), student.leaves, allow_unused=True, materialize_grads=True)
    assert expected[0].any()
    for one, other in zip(summed, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # float32, summed in another order


def test_the_map_of_processes_has_the_gradient_of_one() -> None:
    """Summed over them: what a trainer all-reduces."""
    student, teacher = student_and_teacher(UNREADABLE)
    head = DistillHead(8, TEACHER_WIDTH)
    grads = [
        torch.autograd.grad(torch.stack(feature_shares(student, teacher, count, head)).sum(), list(head.parameters()))
        for count in (1, 3)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@LOSSES
def test_an_unreadable_picture_has_no_part(shares_of: Shared) -> None:
    """Whatever student and teacher make of it, which may be nothing at all, loss and gradients are the same."""
    results = []
    for factor in (1.0, 0.0):
        student, teacher = student_and_teacher(UNREADABLE)
        with torch.no_grad():
            student.image_embeds[list(UNREADABLE)] *= factor
            teacher.image_embeds[list(UNREADABLE)] *= factor
        (value,) = shares_of(student, teacher, 1)
        grads = torch.autograd.grad(value, student.leaves[:2])
        assert not grads[0][list(UNREADABLE)].any()
        results.append((value, *grads))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@LOSSES
def test_a_batch_without_a_readable_picture_costs_nothing(shares_of: Shared) -> None:
    """Zero, and gradients of zero, never NaN."""
    student, teacher = student_and_teacher(tuple(range(len(POSITIVES))))
    (value,) = shares_of(student, teacher, 1)
    assert value.item() == 0
    assert not any(grad.any() for grad in torch.autograd.grad(value, student.leaves[:2]))


@LOSSES
def test_the_gradient_is_that_of_finite_differences(shares_of: Shared) -> None:
    """In double precision, of both sides and of the scale."""
    student, teacher = student_and_teacher(UNREADABLE, dtype=torch.float64)

    def value(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor) -> Tensor:
        given = replace(student, image_embeds=image_embeds, text_embeds=text_embeds, scale=scale)
        return shares_of(given, teacher, 2)[0] + 0 * scale

    assert torch.autograd.gradcheck(value, student.leaves)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = student_and_teacher(UNREADABLE)
    (whole,) = logit_shares(student, teacher, 1)
    monkeypatch.setattr(loss, "MAX_BLOCK_ENTRIES", 2 * POSITIVES.shape[1])
    (blocks,) = logit_shares(student, teacher, 1)
    assert blocks.item() == pytest.approx(whole.item(), rel=1e-6)
    grads = [torch.autograd.grad(value, student.leaves) for value in (whole, blocks)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [8, TEACHER_WIDTH])
def test_a_student_follows_its_teacher(width: int) -> None:
    """By its logits alone, of whatever width, it ranks captions as the teacher does."""
    student, teacher = student_and_teacher(width=width)
    images, texts = (nn.Parameter(side.detach().clone()) for side in student.leaves[:2])
    optimizer = torch.optim.Adam([images, texts], lr=0.05)
    for _ in range(150):
        given = replace(
            student,
            image_embeds=F.normalize(images, dim=-1),
            text_embeds=F.normalize(texts, dim=-1),
            scale=teacher.scale,
        )
        (value,) = logit_shares(given, teacher, 1)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    best = (images @ texts.t()).argmax(dim=1)
    assert torch.equal(best, (teacher.image_embeds @ teacher.text_embeds.t()).argmax(dim=1))
    assert value.item() < 0.1
