"""Batches from a position on, epoch after epoch, made ahead of time by worker processes or inline.

    with Loader(open_batches(recipe.data, 224, 128, seed=0), recipe.data, start=(3, 120)) as loader:
        for batch in loader:  # it has no end

The batches are the same for any number of workers.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from training.batch import Batch, Batches
from training.dataset import IndexedBatches
from training.pixels import Augmentation
from training.recipe import DataSection
from training.shards import ShardBatches
from training.sources import open_sources
from tuwen.errors import InvalidInput, TuwenError

Position = tuple[int, int]  # epoch, and number of the global batch in it


def open_batches(
    data: DataSection,
    resolution: int,
    batch_size: int,
    seed: int,
    rank: int = 0,
    num_processes: int = 1,
    augmentation: Augmentation | None = None,
) -> Batches:
    """The training data of a recipe, from shards or from sets.

    Raises:
        InvalidInput: it is not there, malformed, or less than one batch.
    """
    if data.shards:
        return ShardBatches(data, resolution, batch_size, seed, rank, num_processes, augmentation)
    sources = open_sources(data)
    return IndexedBatches(sources, data, resolution, batch_size, seed, rank, num_processes, augmentation)


class Loader:
    """An iterator over this process's batches, without an end, and a context manager that ends its workers.

    Attributes:
        unreadable: ids of the unreadable pictures seen so far, in the order they came.
    """

    def __init__(self, batches: Batches, data: DataSection, start: Position = (0, 0)) -> None:
        self.unreadable: dict[int, None] = {}
        self._max_corrupt = data.max_corrupt
        made = _MadeBatches(batches)
        positions = _Positions(len(batches), start)
        self._source: Iterator[Batch | TuwenError] | None = (
            _from_workers(made, positions, data) if data.num_workers else map(made.__getitem__, positions)
        )

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            InvalidInput: more pictures than `data.max_corrupt` were unreadable; the sentence names the last one.
            TuwenError: a worker process died.
        """
        if self._source is None:
            raise StopIteration
        try:
            batch = next(self._source)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise TuwenError(
                f"a process that reads training data died ({error}); if it was for want of memory, "
                "lower data.num_workers or data.prefetch_batches"
            ) from None
        if isinstance(batch, TuwenError):
            raise batch
        self._count_unreadable(batch)
        return batch

    def _count_unreadable(self, batch: Batch) -> None:
        for image_id, is_readable in zip(batch.image_ids, batch.is_readable.tolist(), strict=True):
            if is_readable:
                continue
            self.unreadable[image_id] = None
            if len(self.unreadable) > self._max_corrupt:
                raise InvalidInput(
                    f"picture {image_id} cannot be read, number {len(self.unreadable)} of its kind where "
                    f"data.max_corrupt allows {self._max_corrupt}; a warning above says why, and `tuwen data check` "
                    "finds all of them"
                )

    def close(self) -> None:
        """End the workers; nothing comes after."""
        self._source = None  # its destructor tells the workers to stop, and waits for them

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _MadeBatches(Dataset["Batch | TuwenError"]):
    """Position -> batch; an error on purpose is handed over as it is, where DataLoader would wrap it in a traceback."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __getitem__(self, position: Position) -> Batch | TuwenError:
        try:
            return self._batches.batch(*position)
        except TuwenError as error:
            return error


class _Positions(Sampler[Position]):
    """All positions from one on."""

    def __init__(self, num_batches: int, start: Position) -> None:
        self._num_batches, self._start = num_batches, start

    def __iter__(self) -> Iterator[Position]:
        epoch, number = self._start
        while True:
            if number >= self._num_batches:
                epoch, number = epoch + 1, 0
            yield epoch, number
            number += 1


def _from_workers(made: _MadeBatches, positions: _Positions, data: DataSection) -> Iterator[Batch | TuwenError]:
    """Each worker makes whole batches in turn, with one thread of torch, and holds `data.prefetch_batches` ready."""
    loader = DataLoader(
        made,
        batch_size=None,
        sampler=positions,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_batches,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_parent,
        generator=torch.Generator(),  # or it would draw from the global one
    )
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    workers = iter(loader)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if _is_data_loaders(before) else before)
    return workers


def _is_data_loaders(handler: object) -> bool:
    """Whether it is the handler that DataLoader installs, once a process, for this loader or for an earlier one.

    It has a worker's death raised wherever the main process happens to be, in the middle of a step or of saving.
    Without it `next` notices, within five seconds.
    """
    return getattr(handler, "__module__", None) == "torch.utils.data._utils.signal_handling"


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C, and SIGTERM from torchrun, Slurm or systemd, reach every process; what they mean, the main one decides.

    A worker that went at once would fail the step that the main process means to finish before it saves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_parents_word, daemon=True).start()


def _await_parents_word() -> None:
    """SIGTERM from the parent itself is how it ends a worker that does not stop by itself."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
