"""What a process computes at a step, and where it comes from: the seam between data and training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

InputIds = tuple[int, ...]  # of one text, [CLS] and [SEP] with it, without padding


class Share(NamedTuple):
    """Which of a global batch's items are one process's: start <= index < stop."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def of(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Positions in `indices` of those that are within."""
        return np.flatnonzero((indices >= self.start) & (indices < self.stop))


def share_of(count: int, rank: int, num_processes: int) -> Share:
    """Parts as even as can be, the longer ones first, as torch.tensor_split."""
    least, longer = divmod(count, num_processes)
    start = rank * least + min(rank, longer)
    return Share(start, start + least + (rank < longer))


@dataclass(frozen=True)
class Keys:
    """Equal keys belong together: what pictures and captions are, where no process knows those of the others.

    Attributes:
        images: int64 (b,), of a pair's picture.
        texts: int64 (b,), of its caption; the pair's picture and caption have the same row.
    """

    images: Tensor
    texts: Tensor


@dataclass(frozen=True)
class Positives:
    """Which captions describe which pictures, of this process's items against those of all processes.

    Attributes:
        image_rows: bool (b, T): my pictures, all captions.
        text_rows: bool (t, B): my captions, all pictures.
    """

    image_rows: Tensor
    text_rows: Tensor


@dataclass(frozen=True)
class Batch:
    """One process's share of a global batch of B pictures and T distinct captions, W processes.

    Rank r has pictures r B/W to (r + 1) B/W, and of the captions the r-th of W parts as even as can be, the longer
    parts first (as torch.tensor_split).

    Attributes:
        epoch, number: which global batch this is.
        image_ids: of the pictures, in order; to name them when something is wrong.
        pixels: uint8 (b, 3, R, R), augmented, channels_last; a quarter of what float32 would take on every way.
        is_readable: bool (b,); a picture that is not counts for nothing, whatever its pixels.
        texts: input_ids of t captions.
        positives: where pairs are known to all processes; else their keys, which are gathered.
    """

    epoch: int
    number: int
    image_ids: tuple[int, ...]
    pixels: Tensor
    is_readable: Tensor
    texts: tuple[InputIds, ...]
    positives: Positives | Keys


class Batches(Protocol):
    """The training data of one process. What it gives depends on the seed and its arguments alone."""

    def __len__(self) -> int:
        """Global batches in an epoch; what does not fill one is left out."""

    def batch(self, epoch: int, number: int) -> Batch:
        """This process's share of a global batch; called in any order, from any process."""
