"""A server's processes, as /proc shows them."""

from __future__ import annotations

from pathlib import Path

_PAGE_MIB = 4096 / 2**20


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


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []
