"""From embeddings of this process to its share of the loss over all of them.

The loss sees embeddings only, float32, gathered from all processes; the towers are behind it. Shares add up, over the
processes, to the loss of the global batch, and so do their gradients to its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.batch import Batch, Keys, Positives
from training.distill import DistillHead, feature_loss, logit_loss
from training.distributed import World
from training.loss import (
    SIGMOID_LOGIT_SCALE,
    Features,
    SigmoidHead,
    Targets,
    batch_accuracy,
    contrastive_rows,
    count_rows,
    readable_positives,
    sigmoid_rows,
)
from training.recipe import Recipe
from training.teachers import Teacher
from tuwen.model import ChineseCLIP


@dataclass(frozen=True)
class Losses:
    """Of the global batch.

    Attributes:
        total: what is minimised; contrastive and distillation are its parts, weighted.
        image_accuracy, text_accuracy: share of pictures (captions) whose best in the batch belongs to them; NaN unless
            asked for.
    """

    total: float
    contrastive: float
    distillation: float
    image_accuracy: float
    text_accuracy: float


class FeatureLoss(nn.Module):
    """The loss, and what it learns beside the towers: logit_scale, which is the model's, and heads of its own.

    Args:
        teacher: whose embeddings the student's are held against.
    """

    def __init__(self, recipe: Recipe, world: World, model: ChineseCLIP, teacher: Teacher | None = None) -> None:
        super().__init__()
        self._section, self._distill, self._world = recipe.loss, recipe.distill, world
        self._reports_accuracy = recipe.run.report_batch_accuracy
        self._model = [model]  # in a list: no submodule, whose parameters would be counted twice
        self._teacher = teacher
        self.sigmoid = SigmoidHead() if recipe.loss.kind == "sigmoid" else None
        self.distill = DistillHead(model.spec.embed_dim, teacher.embed_dim) if teacher is not None else None

    def start(self) -> None:
        """Before the first step of a run."""
        if self.sigmoid is not None:
            with torch.no_grad():
                self.logit_scale.fill_(SIGMOID_LOGIT_SCALE)

    @property
    def logit_scale(self) -> nn.Parameter:
        return self._model[0].logit_scale

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """Those whose gradients no engine exchanges; logit_scale among them."""
        yield self.logit_scale
        yield from self.parameters()

    def forward(self, image_embeds: Tensor, text_embeds: Tensor, batch: Batch) -> tuple[Losses, Tensor]:
        """The losses, and this process's share of the total, to go backward from."""
        positives, is_readable = self._positives(batch), batch.is_readable.to(self._world.device)
        student = self._surround(image_embeds, text_embeds, self.logit_scale.exp(), positives)
        targets = self._targets(positives, is_readable)
        # Where all processes compute the same, each counts for its part of it.
        weight = 1.0 if self._is_local else 1 / self._world.size
        contrastive = weight * self._contrast(student, targets)
        distilled = weight * self._distilled(student, targets, positives, batch)
        shares = [contrastive.detach(), distilled.detach()]
        if self._reports_accuracy:
            accuracy = batch_accuracy(student, targets)
            both = (accuracy.image_to_text, accuracy.text_to_image)
            shares += [contrastive.new_tensor(weight * one) for one in both]
        found = self._world.sum(torch.stack(shares)).tolist()
        losses = Losses(found[0] + found[1], *(found if self._reports_accuracy else (*found, math.nan, math.nan)))
        return losses, contrastive + distilled

    def _contrast(self, student: Features, targets: Targets) -> Tensor:
        if self.sigmoid is not None:
            return sigmoid_rows(student, targets, self.sigmoid.bias)
        return contrastive_rows(student, targets)

    def _distilled(self, student: Features, targets: Targets, positives: Positives, batch: Batch) -> Tensor:
        if self._teacher is None or self.distill is None:
            return torch.zeros((), device=self._world.device)
        with torch.no_grad():
            taught = self._teacher.embed(batch)
            teacher = self._surround(taught.image_embeds, taught.text_embeds, taught.logit_scale.exp(), positives)
        section = self._distill
        loss = section.feature_weight * feature_loss(student, teacher, targets, self.distill)
        if section.logit_weight:
            loss = loss + section.logit_weight * logit_loss(student, teacher, targets)
        return loss

    @property
    def _is_local(self) -> bool:
        """Whether each process has rows of its own of one matrix of all."""
        return self._world.size == 1 or (self._section.aggregate and self._section.local_loss)

    def _surround(self, images: Tensor, texts: Tensor, scale: Tensor, positives: Positives) -> Features:
        """A process's rows, and what they are held against."""
        section, world = self._section, self._world
        if world.size == 1 or not section.aggregate:
            return Features(images, texts, images, texts, scale)
        num_images, num_texts = positives.text_rows.shape[1], positives.image_rows.shape[1]
        if section.local_loss or section.gather_with_grad:
            with_grad = section.gather_with_grad
            gathered = (world.gather(images, num_images, with_grad), world.gather(texts, num_texts, with_grad))
        else:
            gathered = (world.gather_around(images, num_images), world.gather_around(texts, num_texts))
        return (
            Features(images, texts, *gathered, scale) if section.local_loss else Features(*gathered, *gathered, scale)
        )

    def _targets(self, positives: Positives, is_readable: Tensor) -> Targets:
        world = self._world
        num_images, num_texts = positives.text_rows.shape[1], positives.image_rows.shape[1]
        if not self._section.aggregate:
            images, texts = world.share(num_images), world.share(num_texts)
            own = Positives(positives.image_rows[:, texts], positives.text_rows[:, images])
            readable = readable_positives(own, is_readable, is_readable)
            return Targets(readable, is_readable, *count_rows(readable).tolist())
        all_is_readable = world.gather(is_readable, num_images)
        readable = readable_positives(positives, is_readable, all_is_readable)
        counts = world.sum(count_rows(readable)).tolist()
        if not self._is_local:
            rows = (world.gather(readable.image_rows, num_images), world.gather(readable.text_rows, num_texts))
            readable = Positives(*rows)
        return Targets(readable, all_is_readable, *counts)

    def _positives(self, batch: Batch) -> Positives:
        device, found = self._world.device, batch.positives
        if isinstance(found, Positives):
            return Positives(found.image_rows.to(device), found.text_rows.to(device))
        return positives_of(found, self._world)


def positives_of(keys: Keys, world: World) -> Positives:
    """Pairs belong together that have the picture or the caption in common."""
    images, texts = keys.images.to(world.device), keys.texts.to(world.device)
    total = int(world.sum(torch.tensor(len(images), device=world.device)))
    all_images, all_texts = world.gather(images, total), world.gather(texts, total)
    rows = (images[:, None] == all_images) | (texts[:, None] == all_texts)
    return Positives(rows, rows)
