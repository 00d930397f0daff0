"""Losses on features: what pictures (B) and captions (T) that belong together should look like, of W processes.

    features = Features(image_embeds, text_embeds, all_image_embeds, all_text_embeds, scale)
    loss = contrastive_rows(features, targets)       # summed over the processes it is the loss of the global batch

Contrastive is CLIP's symmetric cross-entropy (arXiv 2103.00020, figure 3); with several positives each row's target
is spread evenly over them (arXiv 2004.11362, L_out). Sigmoid is SigLIP's (arXiv 2303.15343). Everything is float32:
call it outside autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from training.batch import Positives

# Entries of a similarity matrix that exist at a time, 4 MiB of float32: memory must not grow with the square of the
# global batch.
MAX_BLOCK_ENTRIES = 2**20

# Where SigLIP starts: most pairs are negatives, and so it says. Source: arXiv 2303.15343, section 3.2.
SIGMOID_LOGIT_SCALE = math.log(10)
SIGMOID_BIAS = -10.0


@dataclass(frozen=True)
class Features:
    """One model's at a step: this process's rows, and those of all processes in the order of their ranks.

    Without local loss a process's own are all.

    Attributes:
        image_embeds: (b, D), unit length.
        text_embeds: (t, D), unit length.
        all_image_embeds: (B, D).
        all_text_embeds: (T, D).
        scale: (), the exponentiated logit_scale.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    all_image_embeds: Tensor
    all_text_embeds: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Targets:
    """What the rows of `Features` are asked for.

    A row without positives, as an unreadable picture's or a caption's that describes no other, counts for nothing.

    Attributes:
        positives: of readable pictures alone, see `readable_positives`.
        is_readable: bool (B,), of all processes; a picture that is not is nobody's negative.
        num_images, num_texts: rows with positives, of all processes, see `count_rows`.
    """

    positives: Positives
    is_readable: Tensor
    num_images: int
    num_texts: int


def readable_positives(positives: Positives, is_readable: Tensor, all_is_readable: Tensor) -> Positives:
    """Those among readable pictures: bool (b,) of this process's, (B,) of all."""
    return Positives(
        image_rows=positives.image_rows & is_readable[:, None],
        text_rows=positives.text_rows & all_is_readable,
    )


def count_rows(positives: Positives) -> Tensor:
    """int64 (2,): this process's pictures and captions with a positive. Summed over processes it is for `Targets`."""
    return torch.stack([positives.image_rows.any(dim=1).sum(), positives.text_rows.any(dim=1).sum()])


def contrastive_rows(features: Features, targets: Targets) -> Tensor:
    """This process's share of the mean of the image-to-text and text-to-image losses, a scalar."""
    positives = targets.positives
    image_loss = _cross_entropy(
        features.image_embeds, features.all_text_embeds, features.scale, positives.image_rows, None
    )
    text_loss = _cross_entropy(
        features.text_embeds, features.all_image_embeds, features.scale, positives.text_rows, targets.is_readable
    )
    return (image_loss / max(1, targets.num_images) + text_loss / max(1, targets.num_texts)) / 2


def _cross_entropy(own: Tensor, others: Tensor, scale: Tensor, positives: Tensor, is_column: Tensor | None) -> Tensor:
    """Summed over the rows with positives: own (n, D), others (N, D), positives bool (n, N), is_column bool (N,)."""

    def cost(rows: slice, logits: Tensor, scratch: Scratch) -> Tensor:
        # As numbers: arithmetic between bools and floats copies the bools first.
        wanted, of_wanted = scratch[0].copy_(positives[rows]), scratch[1]
        num_wanted = wanted.sum(dim=1, keepdim=True)
        is_row = num_wanted > 0
        wanted /= num_wanted.clamp_(min=1)
        hide_columns_(logits, is_column)
        logits -= logits.amax(dim=1, keepdim=True)
        agreement = torch.mul(logits, wanted, out=of_wanted).sum(dim=1, keepdim=True)
        sums = logits.exp_().sum(dim=1, keepdim=True)
        logits.div_(sums).sub_(wanted).mul_(is_row)
        return ((sums.log() - agreement) * is_row).sum()

    return sum_over_blocks(cost, own, others, scale)


# --- without the whole matrix ---------------------------------------------------------------------------------------

# Two more tensors of a block's shape, to write to.
Scratch = tuple[Tensor, Tensor]
# What a block of rows costs, (): given which, and their logits (n, N), in whose place it leaves its gradient by them.
Cost = Callable[[slice, Tensor, Scratch], Tensor]


def sum_over_blocks(cost: Cost, own: Tensor, others: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """What all rows cost, (), whose logits are scale * own (n, D) @ others (N, D) transposed + bias."""
    total: Tensor = _BlockSum.apply(cost, own, others, scale, bias)  # type: ignore[no-untyped-call]
    return total


class _BlockSum(torch.autograd.Function):
    """Finds the gradients of a block while it is there: they are no larger than the features.

    All blocks lie in the same memory. Left to autograd, which allocates each anew, a batch of 4096 grew the process by
    270 MB, not 68: the allocator seldom finds freed memory of that size again.
    """

    @staticmethod
    def forward(ctx: Any, cost: Cost, own: Tensor, others: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        own_grad, others_grad, scale_grad, bias_grad = grads = [
            torch.zeros_like(value) for value in (own, others, scale, scale)
        ]
        total = torch.zeros_like(scale)
        blocks = list(blocks_of(len(own), len(others)))
        longest = blocks[0].stop if blocks else 0  # a process may be without a caption
        memory = [own.new_empty(longest, len(others)) for _ in range(3)]
        for rows in blocks:
            scaled = scale * own[rows]
            logits, *scratch = (part[: len(scaled)] for part in memory)
            torch.mm(scaled, others.t(), out=logits)
            if bias is not None:
                logits += bias
            total += cost(rows, logits, (scratch[0], scratch[1]))
            pull = logits @ others
            own_grad[rows] = scale * pull
            others_grad.addmm_(logits.t(), scaled)
            scale_grad += (own[rows] * pull).sum()
            bias_grad += logits.sum()
        ctx.save_for_backward(*(grads if bias is not None else grads[:3]))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        own, others, scale, *bias = (grad_output * grad for grad in ctx.saved_tensors)
        return None, own, others, scale, bias[0] if bias else None


def blocks_of(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Rows of a matrix, so many at a time that a block has at most MAX_BLOCK_ENTRIES."""
    size = max(1, MAX_BLOCK_ENTRIES // max(1, num_columns))
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def hide_columns_(logits: Tensor, is_column: Tensor | None) -> None:
    """Those that do not count are as far away as can be."""
    if is_column is not None:
        # Not -inf: the softmax of a row of those alone is NaN, and so is its gradient.
        logits.masked_fill_(~is_column, torch.finfo(logits.dtype).min)


# --- sigmoid --------------------------------------------------------------------------------------------------------


class SigmoidHead(nn.Module):
    """The bias of the sigmoid loss. No part of the model: it is saved with the training state, not in the result.

    Scale and bias belong together: a run that starts sets logit_scale to SIGMOID_LOGIT_SCALE, also for weights that
    were trained with the contrastive loss, whose 100 beside this bias would call every pair a positive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(SIGMOID_BIAS))


def sigmoid_rows(features: Features, targets: Targets, bias: Tensor) -> Tensor:
    """This process's pictures with all captions, each pair judged by itself; summed over processes it is the whole.

    Args:
        bias: (), added to every logit.
    Returns:
        A scalar: the sum over pairs by the number of pictures.
    """
    positives = targets.positives.image_rows

    def cost(rows: slice, logits: Tensor, scratch: Scratch) -> Tensor:
        is_row = positives[rows].any(dim=1, keepdim=True)
        signs = scratch[0].copy_(positives[rows]).mul_(2).sub_(1)
        logits.mul_(signs).neg_()
        # -log sigmoid(x) is log(1 + exp(-x)).
        costs = torch.logaddexp(logits, logits.new_zeros(()), out=scratch[1]).mul_(is_row).sum()
        logits.sigmoid_().mul_(signs).neg_().mul_(is_row)
        return costs

    total = sum_over_blocks(cost, features.image_embeds, features.all_text_embeds, features.scale, bias)
    return total / max(1, targets.num_images)


# --- accuracy -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchAccuracy:
    """The share of rows whose closest is a positive; in a process its part, which sums to the whole."""

    image_to_text: float
    text_to_image: float


@torch.no_grad()
def batch_accuracy(features: Features, targets: Targets) -> BatchAccuracy:
    """How often this process's rows find a positive among the features of all. Chance depends on the batch size."""
    positives = targets.positives
    image_hits = _hits(features.image_embeds, features.all_text_embeds, positives.image_rows, None)
    text_hits = _hits(features.text_embeds, features.all_image_embeds, positives.text_rows, targets.is_readable)
    return BatchAccuracy(
        float(image_hits) / max(1, targets.num_images),
        float(text_hits) / max(1, targets.num_texts),
    )


def _hits(own: Tensor, others: Tensor, positives: Tensor, is_column: Tensor | None) -> Tensor:
    hits = torch.zeros((), dtype=torch.int64, device=own.device)
    for rows in blocks_of(*positives.shape):
        similarities = own[rows] @ others.t()
        hide_columns_(similarities, is_column)
        hits += positives[rows].gather(1, similarities.argmax(dim=1, keepdim=True)).sum()
    return hits
