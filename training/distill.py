"""A student learns from a teacher: the losses on its features and the teacher's, as shares of W processes.

    teacher = open_teacher(recipe.distill, recipe.data, device)
    taught = teacher.embed(batch)                       # this process's rows; gathered as the student's are
    loss += recipe.distill.feature_weight * feature_loss(student, taught, targets, head)
    loss += recipe.distill.logit_weight * logit_loss(student, taught, targets)

Source: CLIP-KD (arXiv 2307.12732), its feature distillation and contrastive relational distillation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.loss import Features, Scratch, Targets, hide_columns_, sum_over_blocks
from training.recipe import DataSection, DistillSection
from training.teacher_features import StoredTeacher
from training.teachers import ModelTeacher, Teacher


def open_teacher(distill: DistillSection, data: DataSection, device: torch.device, chunk_size: int = 0) -> Teacher:
    """The teacher of a recipe whose distillation is on.

    Args:
        chunk_size: pictures that a teacher computes at a time; 0 takes all at once.
    Raises:
        InvalidInput: it cannot be read, or stored features cannot serve such data.
    """
    if distill.features:
        return StoredTeacher(distill.features, data, device)
    assert distill.teacher is not None  # held by DistillSection
    return ModelTeacher(distill.teacher, device, chunk_size)


class DistillHead(nn.Module):
    """From the student's width to the teacher's, a learned map a side; nothing where they are equal.

    No part of the model: it is trained along and saved with the training state, not in the result.
    """

    def __init__(self, embed_dim: int, teacher_dim: int) -> None:
        super().__init__()

        def side() -> nn.Module:
            return nn.Linear(embed_dim, teacher_dim, bias=False) if embed_dim != teacher_dim else nn.Identity()

        self.image, self.text = side(), side()


def feature_loss(student: Features, teacher: Features, targets: Targets, head: DistillHead) -> Tensor:
    """This process's share of the mean of 1 - cosine, of pictures and captions alike; of unit vectors that is half
    their squared distance. Own rows alone are looked at. A scalar; summed over processes it is the global mean.
    """
    positives = targets.positives
    images = _distance(head.image(student.image_embeds), teacher.image_embeds, positives.image_rows)
    texts = _distance(head.text(student.text_embeds), teacher.text_embeds, positives.text_rows)
    return (images / max(1, targets.num_images) + texts / max(1, targets.num_texts)) / 2


def _distance(student: Tensor, teacher: Tensor, positives: Tensor) -> Tensor:
    distances = 1 - F.cosine_similarity(student, teacher, dim=1)
    return torch.where(positives.any(dim=1), distances, 0).sum()


def logit_loss(student: Features, teacher: Features, targets: Targets) -> Tensor:
    """This process's share of how far the student's softmax is from the teacher's, each with its own scale.

    KL(teacher || student) of every row, the mean of both directions. A scalar; summed over processes it is the global
    mean.
    Args:
        teacher: gathered in the same order as the student's.
    """
    images = _divergence(
        (student.image_embeds, student.all_text_embeds, student.scale),
        (teacher.image_embeds, teacher.all_text_embeds, teacher.scale),
        targets.positives.image_rows,
        None,
    )
    texts = _divergence(
        (student.text_embeds, student.all_image_embeds, student.scale),
        (teacher.text_embeds, teacher.all_image_embeds, teacher.scale),
        targets.positives.text_rows,
        targets.is_readable,
    )
    return (images / max(1, targets.num_images) + texts / max(1, targets.num_texts)) / 2


Sides = tuple[Tensor, Tensor, Tensor]  # own rows (n, D), others (N, D), scale ()


def _divergence(student: Sides, teacher: Sides, positives: Tensor, is_column: Tensor | None) -> Tensor:
    own_of_teacher, others_of_teacher, its_scale = (side.detach() for side in teacher)

    def cost(rows: slice, logits: Tensor, scratch: Scratch) -> Tensor:
        wanted, probs = scratch
        torch.mm(its_scale * own_of_teacher[rows], others_of_teacher.t(), out=wanted)
        for log_probs in (logits, wanted):
            hide_columns_(log_probs, is_column)
            log_probs -= log_probs.amax(dim=1, keepdim=True)
            log_probs -= torch.exp(log_probs, out=probs).sum(dim=1, keepdim=True).log()
        is_row = positives[rows].any(dim=1, keepdim=True)
        torch.exp(wanted, out=probs)
        costs = wanted.sub_(logits).mul_(probs).mul_(is_row).sum()
        logits.exp_().sub_(probs).mul_(is_row)
        return costs

    return sum_over_blocks(cost, *student)
