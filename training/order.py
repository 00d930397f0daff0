"""Orders and seeds that are pure functions of what they are made from: the same in any process, on any machine.

EpochOrder(starts=[0, 500, 900], weights=[1.0, 0.5], seed=0).items(epoch=3)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

Order = npt.NDArray[np.int64]


def stable_hash(*parts: object) -> int:
    """An int64 of `parts`, which are told apart by how they print. Not Python's hash(), which each process salts."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def torch_generator(*parts: object) -> torch.Generator:
    """A generator of torch, seeded from `parts`."""
    return torch.Generator().manual_seed(torch_seed(*parts))


def torch_seed(*parts: object) -> int:
    """A seed for torch, which takes none below zero."""
    return abs(stable_hash(*parts)) % 2**63


def shuffled(count: int, *parts: object) -> Order:
    """0..count-1 in an order drawn from `parts`."""
    # NumPy promises the raw bits of a bit generator for good, and those of `permutation` for one version only.
    keys = np.random.PCG64(stable_hash(*parts) % 2**64).random_raw(count)
    return np.argsort(keys, kind="stable")


class EpochOrder:
    """Which items an epoch shows, and in what order: a function of (seed, epoch).

    Items of source s are starts[s]..starts[s + 1] - 1. One of weight 1 shows each of its items once an epoch; one of
    0.5 shows half of them and the others in the next; one of 2.5 shows each two or three times.
    """

    def __init__(self, starts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._starts, self._seed = list(starts), seed
        sizes = [after - start for start, after in pairwise(starts)]
        # Constant, so that every epoch has as many batches as the last.
        self._counts = [
            max(1, round(weight * size)) if size else 0 for weight, size in zip(weights, sizes, strict=True)
        ]

    def __len__(self) -> int:
        """Items in an epoch."""
        return sum(self._counts)

    def items(self, epoch: int) -> Order:
        """int64 (len,): the items of an epoch in their order."""
        shown = np.concatenate([self._shown(source, epoch) for source in range(len(self._counts))])
        return shown[shuffled(len(shown), self._seed, epoch, "order")]

    def _shown(self, source: int, epoch: int) -> Order:
        """What one source shows: a window that moves on by its own length each epoch, over one order that repeats."""
        count, start = self._counts[source], self._starts[source]
        size = self._starts[source + 1] - start
        if count == size:
            return np.arange(start, start + size)
        positions = np.arange(epoch * count, (epoch + 1) * count) % size
        return start + shuffled(size, self._seed, "source", source)[positions]


def deal_distinct(items: Order, captions_of: Callable[[int], Iterable[int]], batch_size: int) -> Order:
    """Deal items to batches so that no two of a batch share a caption; one that would waits for a later batch.

    Each item goes to the first batch with room behind the last one that has any of its captions: one pass, and
    nothing is looked at twice, however often a caption comes.

    Returns:
        int64 (K, batch_size): the batches that became full. Items of others are left out.
    """
    batches = np.empty((len(items) // batch_size, batch_size), np.int64)
    filled = [0] * len(batches)
    first_free: dict[int, int] = {}  # caption -> the first batch that may have it
    first_open = 0
    for item in items.tolist():
        captions = list(captions_of(item))
        batch = max((first_free.get(caption, 0) for caption in captions), default=0)
        batch = max(batch, first_open)
        while batch < len(filled) and filled[batch] == batch_size:
            batch += 1
        if batch >= len(filled):
            continue
        batches[batch, filled[batch]] = item
        filled[batch] += 1
        first_free.update(dict.fromkeys(captions, batch + 1))
        while first_open < len(filled) and filled[first_open] == batch_size:
            first_open += 1
    return batches[np.array(filled, np.int64) == batch_size]
