"""Pictures -> a batch's pixels; one that cannot be read leaves a grey row and no error.

pixels, is_readable = to_batch([read_drafted(encoded, 224), None], 2, 224, None, generator)
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tuwen.errors import InvalidInput

# (pixels float32 (b, 3, R, R) in [0, 1], generator) -> the same, changed.
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
Picture = npt.NDArray[np.uint8]

_GREY = 128
# Pictures in float32 at a time, while they are augmented. A constant: what is drawn for a picture depends on it.
_AUGMENTED_TOGETHER = 128
_KEPT, _UNREADABLE = 1, 2


def to_batch(
    pictures: Iterable[Picture | None],
    count: int,
    resolution: int,
    augmentation: Augmentation | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Pixels uint8 (count, 3, R, R), augmented, and bool (count,): which of them were readable, so not None.

    Args:
        pictures: `count` of them, each taken when the one before is in its place, so that they exist once.
    """
    rows = np.full((count, resolution, resolution, 3), _GREY, np.uint8)
    is_readable = torch.zeros(count, dtype=torch.bool)
    for row, picture in enumerate(pictures):
        if picture is not None:
            rows[row] = picture
            is_readable[row] = True
    pixels = torch.from_numpy(rows).permute(0, 3, 1, 2)
    if augmentation is not None:
        for some in pixels.split(_AUGMENTED_TOGETHER):
            some.copy_(augmentation(as_floats(some), generator).mul(255).round_())
        pixels[~is_readable] = _GREY
    return pixels, is_readable


def as_floats(pixels: Tensor) -> Tensor:
    """float32 in [0, 1] of uint8."""
    return pixels.float().div_(255)


class PictureMemory:
    """What is known of N pictures, in memory that processes forked later share: their pixels, and which are unreadable.

    Anonymous memory rather than a file in /dev/shm, of which a container has 64 MB. A process that is spawned, not
    forked, starts with an empty one of its own.

    Raises:
        InvalidInput: `keeps_pixels`, and they are more than this machine's memory.
    """

    def __init__(self, count: int, resolution: int, keeps_pixels: bool) -> None:
        self._arguments = (count, resolution, keeps_pixels)
        size = count * resolution * resolution * 3
        if keeps_pixels and size > (memory := _memory_bytes()):
            raise InvalidInput(
                f"data.cache_decoded: {count} pictures of {resolution} x {resolution} take {size / 2**30:.1f} GiB, "
                f"this machine has {memory / 2**30:.1f} GiB"
            )
        self._states = _shared_bytes(count)
        # Pages are taken as they are written, so that what is never decoded costs nothing.
        self._pixels = _shared_bytes(size).reshape(count, resolution, resolution, 3) if keeps_pixels else None

    def __reduce__(self) -> tuple[type[PictureMemory], tuple[int, int, bool]]:
        return PictureMemory, self._arguments

    def pixels(self, picture: int) -> Picture | None:
        """uint8 (R, R, 3) if a process has kept them."""
        return self._pixels[picture] if self._pixels is not None and self._states[picture] == _KEPT else None

    def keep(self, picture: int, pixels: Picture) -> None:
        """Keep a picture's pixels for all processes, if this memory does so."""
        if self._pixels is not None:
            self._pixels[picture] = pixels
            self._states[picture] = _KEPT  # last: another process may look at any moment

    def is_first_failure(self, picture: int) -> bool:
        """Whether no process has noted this picture as unreadable before; notes it."""
        is_first = bool(self._states[picture] != _UNREADABLE)
        self._states[picture] = _UNREADABLE
        return is_first


def _shared_bytes(count: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(-1, max(1, count)), np.uint8)[:count]


def _memory_bytes() -> int:
    """Of this machine; where it does not tell, no bound."""
    if not hasattr(os, "sysconf"):
        return 2**63
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
