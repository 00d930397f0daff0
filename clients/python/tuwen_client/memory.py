"""Pictures in system shared memory, for a server on the same host: the message then carries an offset alone.

One region per endpoint. Its name is removed as soon as the server has mapped it, so that nothing is left in /dev/shm
however this process ends; the memory itself lives until both have unmapped it.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tuwen_client.codec import Span
from tuwen_client.errors import DeadlineExceeded, ServerUnavailable, TuwenError

log = logging.getLogger(__name__)

SHM_DIR = Path("/dev/shm")  # where shm_open looks on Linux
# The window's 64 pictures of 1 MiB; what finds no room goes in its message, as without shared memory.
REGION_BYTES = 64 << 20
_ALIGNMENT = 64


class Room:
    """Which bytes of a region are free: first fit. Does no input or output."""

    def __init__(self, size_bytes: int) -> None:
        self._free = [(0, size_bytes)]  # (offset, size), in order, never adjacent

    @property
    def free_bytes(self) -> int:
        """All that is free, in one piece or in several."""
        return sum(size for _, size in self._free)

    def take(self, size_bytes: int) -> tuple[int, int] | None:
        """(offset, size) of a free piece that holds that many bytes; None when there is none."""
        size = -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
        for position, (offset, available) in enumerate(self._free):
            if available >= size:
                self._free[position : position + 1] = [(offset + size, available - size)] if available > size else []
                return offset, size
        return None

    def give_back(self, piece: tuple[int, int]) -> None:
        """Make a piece free again."""
        merged: list[tuple[int, int]] = []
        for offset, size in sorted([*self._free, piece]):
            if merged and sum(merged[-1]) == offset:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((offset, size))
        self._free = merged


class Region:
    """Memory that a server maps as well. Threads may share it."""

    def __init__(self, size_bytes: int) -> None:
        """Reserve it.

        Raises:
            OSError: there is not so much shared memory, or no such thing on this system.
        """
        self.name = f"tuwen_client_{os.getpid()}_{secrets.token_hex(6)}"
        self.size_bytes = size_bytes
        self._room = Room(size_bytes)
        self._lock = threading.Lock()
        self._under_way = 0
        self._is_closed = False
        self._path = SHM_DIR / self.name
        descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Without this a full /dev/shm is noticed at the first write, by SIGBUS.
            os.posix_fallocate(descriptor, 0, size_bytes)
            self._memory = mmap.mmap(descriptor, size_bytes)
        except BaseException:
            self.unlink()
            raise
        finally:
            os.close(descriptor)

    @property
    def free_bytes(self) -> int:
        """What is left for pictures."""
        with self._lock:
            return self._room.free_bytes

    @property
    def is_idle(self) -> bool:
        """Whether the server is known to read none of it, now or later."""
        with self._lock:
            return self._under_way == 0

    def unlink(self) -> None:
        """Remove the name; the memory stays with those that have mapped it."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmap it here; leases that are still out may end later."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._memory.close()

    def put(self, data: bytes) -> Lease | None:
        """Copy data in; None when there is no room for it at this time."""
        with self._lock:
            piece = None if self._is_closed else self._room.take(len(data))
            if piece is None:
                return None
            self._memory[piece[0] : piece[0] + len(data)] = data
            self._under_way += 1
        return Lease(self, piece, Span(self.name, piece[0], len(data)))

    def end(self, piece: tuple[int, int], was_read: bool) -> None:
        """Of a lease."""
        with self._lock:
            if was_read:
                self._room.give_back(piece)
                self._under_way -= 1


@dataclass(frozen=True)
class Lease:
    """A piece of a region for one attempt; `end` it exactly once."""

    region: Region
    piece: tuple[int, int]
    span: Span

    def end(self, was_read: bool) -> None:
        """The attempt is over.

        Args:
            was_read: the server answered. Where it did not, it may still read: the piece is then never used again in
                this region. Nobody would get the answer of a picture overwritten half-way, but a response cache could
                keep it under the name of the whole one.
        """
        self.region.end(self.piece, was_read)


class SharedPictures:
    """The region that one endpoint shares: made when it is needed, made anew for a server that has begun anew.

    Args:
        register, unregister: tell the server; raise TuwenError.
    """

    def __init__(
        self,
        register: Callable[[Region], None],
        unregister: Callable[[Region], None],
        size_bytes: int = REGION_BYTES,
    ) -> None:
        self._register, self._unregister, self._size_bytes = register, unregister, size_bytes
        self._lock = threading.Lock()
        self._is_off = False
        self._has_warned_of_room = False
        self.region: Region | None = None

    @property
    def is_prepared(self) -> bool:
        """Whether `put` works at once, without a word with the server."""
        return self.region is not None or self._is_off

    def prepare(self) -> None:
        """Make and register the region, unless that has been done. What is in its way turns it off, with one warning.

        Raises:
            TuwenError: the server wants another token.
        """
        with self._lock:
            if self.is_prepared:
                return
            region = None
            try:
                region = Region(self._size_bytes)
                self._register(region)
            except (OSError, TuwenError) as error:
                if region is not None:
                    region.close()
                if is_refusal(error):
                    raise TuwenError(
                        "the server refuses shared memory without its admin token: pass token=..., or set "
                        "TUWEN_ADMIN_TOKEN"
                    ) from error
                if isinstance(error, (ServerUnavailable, DeadlineExceeded)):
                    return  # nothing is known of its memory; the next picture asks again
                self._is_off = True
                reason = error.strerror if isinstance(error, OSError) else error
                log.warning("shared memory cannot be used, pictures go in their messages: %s", reason)
            else:
                self.region = region
            finally:
                if region is not None:
                    region.unlink()

    def put(self, data: bytes) -> Lease | None:
        """Copy a picture in; None: send it in its message."""
        region = self.region
        if region is None:
            return None
        lease = region.put(data)
        if lease is None and region.free_bytes < self._size_bytes // 2 and not self._has_warned_of_room:
            self._has_warned_of_room = True
            log.info("shared memory has no room for %d bytes now, they go in their message", len(data))
        return lease

    def lost(self, region: Region) -> None:
        """The server does not know this region: it began anew, and so does `prepare`."""
        with self._lock:
            if self.region is region:
                self.region = None
                region.close()

    def close(self) -> None:
        """Let go of the memory on both sides, as far as nobody reads it."""
        with self._lock:
            region, self.region, self._is_off = self.region, None, True
        if region is None:
            return
        # Triton 2.51 unmaps at once what a request under way may still read, and would die of it.
        if not region.is_idle:
            log.info("the server keeps %d bytes of shared memory, which it may still read", region.size_bytes)
        else:
            try:
                self._unregister(region)
            except TuwenError as error:
                log.info("shared memory is not unregistered: %s", error)
        region.close()


def is_refusal(error: Exception) -> bool:
    """Whether a server wants a token that it did not get."""
    return isinstance(error, TuwenError) and "protocol is restricted" in error.message
