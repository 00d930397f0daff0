"""A global batch of random features, and the shares of it that processes have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.batch import Positives
from training.loss import Features, Targets, count_rows, readable_positives


def unit_rows(count: int, seed: int, width: int = 8) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def matrix(*rows: str) -> Tensor:
    """Bool matrix, x where true."""
    return torch.tensor([[character == "x" for character in row] for row in rows])


# Seven pictures and nine captions: several captions of a picture, one that three share, one of picture 4 alone.
POSITIVES = matrix(
    "xx.......", "..x......", "..xx.....", "..x.x....", ".....x...", "......xx.", "........x",
)  # fmt: skip
UNREADABLE = (4, 6)


@dataclass(frozen=True)
class World:
    """What all processes have together.

    Attributes:
        positives: bool (B, T), with those of unreadable pictures.
        is_readable: bool (B,).
    """

    image_embeds: Tensor
    text_embeds: Tensor
    scale: Tensor
    positives: Tensor
    is_readable: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.image_embeds, self.text_embeds, self.scale

    def share(self, rank: int, num_processes: int) -> tuple[Features, Targets]:
        images = torch.arange(len(self.image_embeds)).tensor_split(num_processes)[rank]
        texts = torch.arange(len(self.text_embeds)).tensor_split(num_processes)[rank]
        features = Features(
            self.image_embeds[images], self.text_embeds[texts], self.image_embeds, self.text_embeds, self.scale
        )
        own = Positives(self.positives[images], self.positives.t()[texts])
        whole = readable_positives(Positives(self.positives, self.positives.t()), self.is_readable, self.is_readable)
        num_images, num_texts = count_rows(whole).tolist()
        readable = readable_positives(own, self.is_readable[images], self.is_readable)
        return features, Targets(readable, self.is_readable, num_images, num_texts)

    def shares(self, num_processes: int) -> Iterator[tuple[Features, Targets]]:
        return (self.share(rank, num_processes) for rank in range(num_processes))


def world(
    positives: Tensor = POSITIVES,
    unreadable: tuple[int, ...] = (),
    scale: float = 7.0,
    seed: int = 0,
    width: int = 8,
    dtype: torch.dtype = torch.float32,
) -> World:
    is_readable = torch.ones(len(positives), dtype=torch.bool)
    is_readable[list(unreadable)] = False
    images, texts = unit_rows(len(positives), seed, width), unit_rows(positives.shape[1], seed + 1, width)
    return World(
        images.to(dtype).requires_grad_(),
        texts.to(dtype).requires_grad_(),
        torch.tensor(scale, dtype=dtype, requires_grad=True),
        positives,
        is_readable,
    )
