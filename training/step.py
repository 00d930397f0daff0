"""One update of the weights: exact contrastive gradients of a global batch, computed in chunks by all processes.

The loss needs the embeddings of the whole batch at once, the towers do not. So embeddings are computed first, in chunks
and without keeping what a gradient would need; the loss gives each embedding's gradient; and each chunk is computed
again and its gradient passed on (GradCache, arXiv 2101.06983). Both passes draw the same dropout and the same FLIP
masks. A batch of one chunk is computed once. Memory is that of one chunk, whatever the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.batch import Batch
from training.distributed import World
from training.feature_loss import FeatureLoss, Losses
from training.freed_memory import give_back_freed
from training.order import torch_seed
from training.recipe import Recipe
from training.towers import Chunk, Engine, chunks_of
from tuwen.model import MAX_LOGIT_SCALE

Pair = tuple[Tensor, Tensor]
# Taking back what was given back costs a third of a chunk: so seldom, two per cent. Without it a batch of 128 grew from
# 755 to 1,052 MiB in 256 steps of Tiny-ViT, with it to 831.
_CHUNKS_PER_GIVING_BACK = 16


@dataclass(frozen=True)
class StepResult:
    """Of all processes together.

    Attributes:
        grad_norm: before clipping; infinite or NaN where float16 overflowed and the step was left out.
        num_unreadable: pictures of this batch that counted for nothing.
    """

    losses: Losses
    grad_norm: float
    num_unreadable: int


class Step:
    """Of one run, on one process."""

    def __init__(
        self, recipe: Recipe, world: World, engine: Engine, loss: FeatureLoss, optimizer: torch.optim.Optimizer
    ) -> None:
        self._recipe, self._world, self._engine, self._loss, self._optimizer = recipe, world, engine, loss, optimizer
        self._logit_scale = engine.towers.model.logit_scale
        self._parameters = [one for group in optimizer.param_groups for one in group["params"]]
        self._chunks_done = 0
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.engine.precision == "fp16")

    def __call__(self, batch: Batch) -> StepResult:
        """Update the weights; all processes call it together, each with its share."""
        self._optimizer.zero_grad(set_to_none=True)
        seed = torch_seed(self._recipe.run.seed, "step", batch.epoch, batch.number, self._world.rank)
        chunks = chunks_of(batch, self._recipe.optim.chunk_size)
        first = self._first_pass(chunks, seed)
        image_embeds, text_embeds = (torch.cat(parts).detach().requires_grad_() for parts in zip(*first, strict=True))
        losses, share = self._loss(image_embeds, text_embeds, batch)
        self.scaler.scale(share).backward()
        self._second_pass(chunks, first, (_grad(image_embeds), _grad(text_embeds)), seed)
        for parameter in self._loss.own_parameters():
            if parameter.grad is not None:
                self._world.sum(parameter.grad)
        unreadable = self._world.sum((~batch.is_readable).sum().to(self._world.device))
        return StepResult(losses, self._update(), int(unreadable))

    def _first_pass(self, chunks: list[Chunk], seed: int) -> list[Pair]:
        """Embeddings of each chunk: of a single one with its graph, of several without."""
        if len(chunks) == 1:
            return [self._run(chunks[0], seed, 0)]
        with torch.no_grad(), self._engine.without_statistics():
            return [self._run(chunk, seed, number) for number, chunk in enumerate(chunks)]

    def _second_pass(self, chunks: list[Chunk], first: list[Pair], grads: Pair, seed: int) -> None:
        # DDP takes the mean over processes, each with its share of the loss; the sum is the gradient.
        image_grads = (grads[0] * self._world.size).split([len(images) for images, _ in first])
        text_grads = (grads[1] * self._world.size).split([len(texts) for _, texts in first])
        for number, chunk in enumerate(chunks):
            self._give_back()
            with self._engine.accumulating(is_last=number == len(chunks) - 1):
                embeds = first[0] if len(chunks) == 1 else self._run(chunk, seed, number)
                pairs = zip(embeds, (image_grads[number], text_grads[number]), strict=True)
                learning = [(one, grad) for one, grad in pairs if one.requires_grad]  # a frozen tower has no graph
                torch.autograd.backward([one for one, _ in learning], [grad for _, grad in learning])

    def _run(self, chunk: Chunk, seed: int, number: int) -> Pair:
        torch.manual_seed(torch_seed(seed, number))
        return self._engine(chunk)

    def _give_back(self) -> None:
        """What first passes, losses and earlier chunks left in pieces; on a GPU torch sees to it."""
        if self._chunks_done % _CHUNKS_PER_GIVING_BACK == 0 and self._world.device.type == "cpu":
            give_back_freed()
        self._chunks_done += 1

    def _update(self) -> float:
        self.scaler.unscale_(self._optimizer)
        grad_norm = clip_gradients(self._parameters, self._recipe.optim.max_grad_norm, self._world)
        # Without a scaler a gradient that is not finite would reach the weights; with one it skips the step.
        if math.isfinite(grad_norm) or self.scaler.is_enabled():
            self.scaler.step(self._optimizer)
        self.scaler.update()
        with torch.no_grad():
            self._logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        return grad_norm


def _grad(embeds: Tensor) -> Tensor:
    return embeds.grad if embeds.grad is not None else torch.zeros_like(embeds)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, world: World) -> float:
    """Scale all gradients down to a norm of at most `max_norm`; returns what it was. Sharded ones count as whole."""
    sharded, whole = [], []
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor):
            sharded.append(grad.to_local())
        elif grad is not None:
            whole.append(grad)
    squares = world.sum(_squares(sharded, world)) + _squares(whole, world) if sharded else _squares(whole, world)
    norm = float(squares.sqrt())
    if norm > max_norm and math.isfinite(norm):
        torch._foreach_mul_(sharded + whole, max_norm / (norm + 1e-6))
    return norm


def _squares(grads: list[Tensor], world: World) -> Tensor:
    if not grads:
        return torch.zeros((), device=world.device)
    return torch.stack(torch._foreach_norm(grads)).float().square().sum()
