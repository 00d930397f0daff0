"""Processes that train together: who is who, and features from all of them.

`torchrun --nproc-per-node N -m training RECIPE` starts them; without it there is one, and nothing here communicates.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.batch import share_of
from tuwen.errors import InvalidInput
from tuwen.model import resolve_device

# While one process validates or writes, the others wait in a collective; a large validation set takes its time.
_TIMEOUT = timedelta(hours=4)


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: 0 to size - 1; 0 alone writes files and shows anything.
        device: where it computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.size > 1

    def share(self, total: int, rank: int | None = None) -> slice:
        """The part of so many rows that a rank (this one) has."""
        share = share_of(total, self.rank if rank is None else rank, self.size)
        return slice(share.start, share.stop)

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes, in place."""
        if self.is_distributed:
            dist.all_reduce(values)
        return values

    def gather(self, rows: Tensor, total: int, with_grad: bool = False) -> Tensor:
        """Rows of all processes in their order, of which each has its `share` of `total`.

        Args:
            with_grad: let gradients flow back to the process a row came from.
        """
        if not self.is_distributed:
            return rows  # one's own, which have their gradient
        if with_grad:
            gathered: Tensor = _GatherWithGrad.apply(rows, self, total)
            return gathered
        return self._gather(rows.detach(), total)

    def gather_around(self, rows: Tensor, total: int, with_grad: bool = True) -> Tensor:
        """Rows of all processes, where only one's own have a gradient: for a loss that all compute alike.

        Each computes 1 / size of that loss, so the gradient of its own rows is multiplied to that of the whole.
        """
        if not self.is_distributed:
            return rows
        gathered, own = self._gather(rows.detach(), total), self.share(total)
        kept = _Multiplied.apply(rows, self.size) if with_grad else rows.detach()
        return torch.cat([gathered[: own.start], kept, gathered[own.stop :]])

    def _gather(self, rows: Tensor, total: int) -> Tensor:
        shares = [self.share(total, rank) for rank in range(self.size)]
        longest = max(share.stop - share.start for share in shares)
        dtype = torch.uint8 if rows.dtype == torch.bool else rows.dtype  # gloo has no bool
        padded = torch.zeros((longest, *rows.shape[1:]), dtype=dtype, device=rows.device)
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(parts, padded)
        parts = [part[: share.stop - share.start] for part, share in zip(parts, shares, strict=True)]
        return torch.cat(parts).to(rows.dtype)

    def barrier(self) -> None:
        if self.is_distributed:
            dist.barrier()

    def share_object(self, value: Any) -> Any:
        """What the first process has: plain values, for all."""
        if not self.is_distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


class _GatherWithGrad(torch.autograd.Function):
    """all_gather whose gradient is summed over all processes, and cut to one's own rows; on every backend."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World, total: int) -> Tensor:
        ctx.share, ctx.world = world.share(total), world
        return world._gather(rows, total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return ctx.world.sum(grad.contiguous().clone())[ctx.share], None, None


class _Multiplied(torch.autograd.Function):
    """The same value; a gradient so many times as large."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


@contextmanager
def joined(device: str | None) -> Iterator[World]:
    """This process's world, from what torchrun says of it.

    Raises:
        InvalidInput: the device cannot be used.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = resolve_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(0, 1, chosen)
        return
    if sys.platform == "win32":
        os.environ.setdefault("USE_LIBUV", "0")  # torch's wheels for Windows are built without it
    try:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise InvalidInput(f"processes cannot meet: {str(error).splitlines()[0]}") from None
    try:
        yield World(rank, size, chosen)
        dist.barrier()  # one that left early would take gloo down under the others
    finally:
        gc.collect()  # sharded modules hold groups of processes, whose threads must end before the interpreter does
        dist.destroy_process_group()


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed for want of another process, and not for a reason of this one's."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
