"""Files and folders that appear whole or not at all: a kill at any moment leaves the last good state."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file under a temporary name beside `path`, renamed to it only if the block ends well."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file that the block writes, renamed to `path` only if it ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk; a power cut then loses nothing of it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot for folders
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to `path`, atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def replace_folder(staging: Path, target: Path) -> None:
    """Put the folder `staging` where `target` is, in one step: at no moment is there neither the old nor the new."""
    staging.chmod(0o755)  # mkdtemp's folders are for their owner alone
    if not target.exists():
        os.replace(staging, target)
    elif _exchange(staging, target):
        shutil.rmtree(staging)
    else:  # no such call on this system: two renames, and a kill between them leaves the old as .NAME.old
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        os.replace(staging, target)
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths atomically by Linux's renameat2; False where the system or the file system cannot."""
    current_folder, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE; source: man 2 rename
    try:
        call = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return bool(call(current_folder, os.fsencode(one), current_folder, os.fsencode(other), exchange) == 0)
