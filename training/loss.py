"""Losses on features: what pictures (B) and captions (T) that belong together should look like, of W processes.

    features = Features(image_embeds, text_embeds, all_image_embeds, all_text_embeds, scale)
    loss = contrastive_rows(features, targets)       # summed over the processes it is the loss of the global batch

Contrastive is CLIP's symmetric cross-entropy (arXiv 2103.00020, figure 3); with several positives each row's target
is spread evenly over them (arXiv 2004.11362, L_out). Sigmoid is SigLIP's (arXiv 2303.15343). Everything is float32:
call it outside autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from training.batch import Positives

# Entries of a similarity matrix that exist at a time, 16 MiB of float32: memory must not grow with the square of the
# global batch.
MAX_BLOCK_ENTRIES = 2**22

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

    def of_block(rows: slice) -> Tensor:
        logits = masked_logits(own[rows], others, scale, is_column)
        wanted = positives[rows].to(logits.dtype)
        # A row of zeros costs zero, and its gradient is zero.
        return F.cross_entropy(logits, wanted / wanted.sum(dim=1, keepdim=True).clamp(min=1), reduction="sum")

    return sum_over_blocks(of_block, *positives.shape)


def masked_logits(own: Tensor, others: Tensor, scale: Tensor, is_column: Tensor | None) -> Tensor:
    """(n, N) of own (n, D) and others (N, D); columns that do not count are as far away as can be."""
    logits = (scale * own) @ others.t()
    if is_column is None:
        return logits
    # Not -inf: the softmax of a row of those alone is NaN, and so is its gradient.
    return logits.masked_fill(~is_column, torch.finfo(logits.dtype).min)


def sum_over_blocks(of_block: Callable[[slice], Tensor], num_rows: int, num_columns: int) -> Tensor:
    """The sum of a scalar over blocks of rows of a matrix; each block is computed anew for its gradient."""
    block_rows = max(1, MAX_BLOCK_ENTRIES // max(1, num_columns))
    if num_rows <= block_rows:
        return of_block(slice(0, num_rows))
    blocks = [slice(start, start + block_rows) for start in range(0, num_rows, block_rows)]
    sums = [checkpoint(of_block, rows, use_reentrant=False, preserve_rng_state=False) for rows in blocks]
    return torch.stack(sums).sum()


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

    def of_block(rows: slice) -> Tensor:
        logits = masked_logits(features.image_embeds[rows], features.all_text_embeds, features.scale, None) + bias
        agreement = F.logsigmoid(torch.where(positives[rows], logits, -logits)).sum(dim=1)
        return -torch.where(positives[rows].any(dim=1), agreement, 0).sum()

    return sum_over_blocks(of_block, *positives.shape) / max(1, targets.num_images)


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
    def of_block(rows: slice) -> Tensor:
        best = masked_logits(own[rows], others, own.new_ones(()), is_column).argmax(dim=1, keepdim=True)
        return positives[rows].gather(1, best).sum()

    return sum_over_blocks(of_block, *positives.shape)
