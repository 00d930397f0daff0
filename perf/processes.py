"""Processes and their memory, as /proc shows them."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

_PAGE_MIB = 4096 / 2**20
# What a process takes in its last moment is missed; the peak until then is not.
_LOOK_EVERY_S = 0.01


def descendants(pid: int) -> dict[int, list[str]]:
    """Process id -> command line, of a process and all that it started."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it ended meanwhile
                continue
    found, more = {pid}, True
    while more:
        born = {child for child, parent in parents.items() if parent in found} - found
        found, more = found | born, bool(born)
    return {one: _command(one) for one in found}


def rss_mib(pid: int) -> float:
    """Memory held by a process and all that it started; pages shared among them count once a process."""
    total = 0.0
    for one in descendants(pid):
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * _PAGE_MIB
        except OSError:
            continue
    return total


def peak_rss_bytes(pid: int | str = "self") -> int:
    """The most memory that a running process has held; 0 where it has ended.

    Not `ru_maxrss`: that begins with what the process held that it was forked from.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return max((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), default=0)


class PeakRss:
    """As a context manager: looks after a process until the block ends; `bytes` is then the most that it has held."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid, self._is_over = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakRss:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(_LOOK_EVERY_S):
            self.bytes = max(self.bytes, peak_rss_bytes(self._pid))


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []
